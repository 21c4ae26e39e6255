"""Random numbers for stacks of matrices, a key for each matrix.

So what a matrix of a stack sees does not depend on the others in it, nor on whether
these are updated with it.

Large matrices are made by a hash of the key and of an entry's place: a few integer
operations an entry inside the loop that uses it, where a key's own generator takes
hundreds and stores its words, and no communication on sharded axes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._src.linalg.products import wide


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
    return over_keys(key, lambda k: sample(k, rest, dtype))


def split(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two keys, or stacks of keys, from one."""
    pair = over_keys(key, jax.random.split)
    return pair[..., 0], pair[..., 1]


def seeds(key: jax.Array) -> jax.Array:
    """A seed of the hash for each key."""
    words = jax.random.key_data(key)
    # Scrambled, as those of near seeds would be the same rows in another order.
    return _scramble(words[..., 0] * jnp.uint32(0x85EBCA6B) ^ words[..., -1])


def _scramble(h: jax.Array) -> jax.Array:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    return h


def _mix(h: jax.Array, size: int) -> jax.Array:
    """An integer hash of ``h`` and of the place along a new last axis."""
    place = jax.lax.broadcasted_iota(jnp.uint32, (size,), 0)
    return _scramble((h[..., None] ^ place) * jnp.uint32(0x9E3779B9))


def bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random words, of one key or of one for each matrix of a stack.

    Their high bits are the better ones.
    """
    return _hash(seeds(key), shape)


def _hash(h: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    for size in shape[h.ndim :]:
        h = _mix(h, size)
    return h


def normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal entries, independent up to the hash; keys as of `bits`."""
    # The middles of 2^23 intervals of (-1, 1), exact in float32: never an end.
    place = (bits(key, shape) >> 9).astype(jnp.int32)
    place = place.astype(wide(dtype))
    x = jax.lax.erf_inv((place + 0.5) * 2.0**-22 - 1.0)
    return (2**0.5 * x).astype(dtype)


def signs(seed: jax.Array, rows: int, cols: int, dtype: Any) -> jax.Array:
    """``(*batch, rows, cols)`` of +-1 in general position, from ``(*batch,)`` seeds.

    As good a sketch as a Gaussian one.
    """
    h = _hash(seed, (*seed.shape, rows, cols))
    return jnp.where((h >> 31) == 0, 1.0, -1.0).astype(dtype)


def fixed_signs(rows: int, cols: int) -> jax.Array:
    """A fixed (rows, cols) matrix of +-1, in general position as of `signs`."""
    # A seed whose leading square blocks are all far from singular: one in 50 is.
    return signs(jnp.uint32(125), rows, cols, jnp.float32)


def fixed_uniform(rows: int, cols: int) -> jax.Array:
    """A fixed (rows, cols) matrix of numbers in (-1, 1), far from any that is given.

    No sum of a few of its entries is zero, as it often is with signs: what is added of
    it to dependent columns makes them independent.
    """
    h = _hash(jnp.uint32(125), (rows, cols))
    return ((h >> 9).astype(jnp.float32) + 0.5) * 2.0**-22 - 1.0


def over_keys(key: jax.Array, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """``function`` of each key of a stack; of the words of a key that is not typed."""
    if not _is_typed(key):  # as jax.random.PRNGKey makes them
        return function(key)
    for _ in range(key.ndim):
        function = jax.vmap(function)
    return function(key)


def _is_typed(key: jax.Array) -> bool:
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
