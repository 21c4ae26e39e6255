"""Random numbers for stacks of matrices, a key for each matrix.

So what a matrix of a stack sees does not depend on the others in it, nor on whether
these are updated with it.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._src import stack


def matrix_keys(key: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """The keys ``(*batch,)`` of a leaf's matrices: its own, folded by their places."""
    for axis, size in enumerate(batch):
        places = jnp.arange(size) + (stack.place() if axis == 0 else 0)
        key = _over(
            key,
            lambda k, places=places: jax.vmap(
                lambda place: jax.random.fold_in(k, place)
            )(places),
        )
    return key


def draw(
    sample: Callable[..., jax.Array], key: jax.Array, shape: tuple[int, ...], dtype: Any
) -> jax.Array:
    """``sample(key, shape, dtype)``, of which each key ``(*batch,)`` draws its part.

    For parts of one's own: on a stack of matrices, `Subspace.select` and its like are
    given a key for each.

    Args:
      sample: such as ``jax.random.normal``.
      key: one key, or an array of keys.
      shape: that of the result, beginning with the shape of ``key``.
      dtype: of the result.

    Returns:
      An array of this shape.

    >>> import jax, jax.numpy as jnp, lowrank_optax as lro
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> x = lro.linalg.draw(jax.random.normal, keys, (3, 4, 2), jnp.float32)
    >>> bool((x[1] == jax.random.normal(keys[1], (4, 2))).all())
    True
    """
    rest = shape[key.ndim :] if _is_typed(key) else shape
    return _over(key, lambda k: sample(k, rest, dtype))


def split(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two keys, or stacks of keys, from one."""
    pair = _over(key, jax.random.split)
    return pair[..., 0], pair[..., 1]


def named(key: jax.Array, name: str) -> jax.Array:
    """A key, or a stack of keys, of its own for a name."""
    return _over(key, lambda k: jax.random.fold_in(k, zlib.crc32(name.encode())))


def _over(key: jax.Array, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
    if not _is_typed(key):  # as jax.random.PRNGKey makes them
        return function(key)
    for _ in range(key.ndim):
        function = jax.vmap(function)
    return function(key)


def _is_typed(key: jax.Array) -> bool:
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
