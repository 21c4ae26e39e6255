"""The random key of each leaf."""

import operator
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax._src.engines import batching


def leaf_keys(
    key: int | jax.Array, paths: list[str], step: jax.Array | list[jax.Array]
) -> list[jax.Array]:
    """The random key of each leaf at one step: equal on every host, restart-exact.

    ``fold_in(fold_in(key, crc32(path)), step)``, for all leaves in one operation; the
    step is that of all of them, or a list of one for each.
    """
    if not isinstance(key, jax.Array):
        key = jax.random.key(operator.index(key))
    if not paths:
        return []
    names = [zlib.crc32(path.encode()) for path in paths]
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
        key, np.array(names, np.uint32)
    )
    steps = jnp.broadcast_to(jnp.asarray(step), (len(paths),))
    return batching.unstack(jax.vmap(jax.random.fold_in)(keys, steps), steps[0])
