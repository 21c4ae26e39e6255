"""The random keys of a leaf: equal on every host, restart-exact."""

import operator
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lowrank_optax._src.leaves.context import layer_place
from lowrank_optax._src.leaves.paths import Path
from lowrank_optax._src.linalg.random import over_keys


class Seed(NamedTuple):
    """From what a leaf's keys are made at each step.

    Attributes:
      key: of the whole transformation.
      name: a hash of the leaf's path.
      place: where its first matrix stands in the whole stack, see `context.one_layer`.
    """

    key: jax.Array
    name: np.uint32
    place: jax.Array | int


def leaf_seed(key: int | jax.Array, path: Path) -> Seed:
    """The seed of the leaf at a path, for a key or an int that stands for one."""
    # A slash within a part is another character than the one between two.
    text = "/".join(part.replace("/", "\0") for part in path)
    name = np.uint32(zlib.crc32(text.encode()))
    return Seed(_threefry(key), name, layer_place())


def _threefry(key: int | jax.Array) -> jax.Array:
    """A key of the generator whose numbers do not depend on the keys beside it.

    Others, which may be the default, draw for a stack of keys from the first one.
    """
    impl = "threefry2x32"
    if not isinstance(key, (jax.Array, np.ndarray)):
        seed = operator.index(key)
        if not -(2**63) <= seed < 2**63:
            raise ValueError(
                f"`key` must be a key or a seed from -2**63 to 2**63 - 1, got {seed}."
            )
        return jax.random.key(seed, impl=impl)
    words = jnp.asarray(key)
    if not words.ndim and jnp.issubdtype(words.dtype, jnp.integer):
        return jax.random.key(words, impl=impl)
    if jnp.issubdtype(words.dtype, jax.dtypes.prng_key):
        words = jax.random.key_data(words)
    made = jax.random.wrap_key_data(words[..., :2], impl=impl)
    for i in range(2, words.shape[-1]):
        made = jax.random.fold_in(made, words[..., i])
    return made


def matrix_keys(
    seed: Seed, step: jax.Array, batch: tuple[int, ...], field: str = ""
) -> jax.Array:
    """``(*batch,)`` keys, one for each matrix of a leaf, at a step.

    ``fold_in(fold_in(key, crc32(path)), step)``, folded by the name of a state field if
    one is given, and by the places of the matrix along each batch axis. So what a
    matrix of a stack sees does not depend on the others in it, nor on whether these are
    updated with it.
    """
    key = _leaf_key(seed.key, seed.name, step)
    if field:
        key = jax.random.fold_in(key, np.uint32(zlib.crc32(field.encode())))
    return _placed(key, seed, batch)


def matrix_keys_each(
    seeds: Sequence[Seed], step: jax.Array, batches: Sequence[tuple[int, ...]]
) -> list[jax.Array]:
    """`matrix_keys` of leaves of one transformation, those of all leaves at once."""
    if not seeds:
        return []
    names = jnp.array([seed.name for seed in seeds])
    keys = jax.vmap(_leaf_key, in_axes=(None, 0, None))(seeds[0].key, names, step)
    return list(map(_placed, keys, seeds, batches))


def _leaf_key(key: jax.Array, name: ArrayLike, step: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, name), step)


def _placed(key: jax.Array, seed: Seed, batch: tuple[int, ...]) -> jax.Array:
    """A leaf's key, folded by the places of its matrices."""
    for axis, size in enumerate(batch):
        places = jnp.arange(size) + (seed.place if axis == 0 else 0)
        fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        key = over_keys(key, lambda k, fold=fold, places=places: fold(k, places))
    return key
