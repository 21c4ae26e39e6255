"""What is not finite never becomes state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._src.engines import batching


def increment(step: jax.Array) -> jax.Array:
    """The next step; stays at the largest int32 instead of wrapping around."""
    return jnp.asarray(optax.safe_increment(step))


def tree_where(accept: jax.Array, new: Any, old: Any) -> Any:
    """``new`` where a scalar (or a predicate a matrix) accepts it, else ``old``."""

    def pick(x, y):
        mask = accept.reshape(accept.shape + (1,) * (x.ndim - accept.ndim))
        return jnp.where(mask, x, y)

    return jax.tree.map(pick, new, old)


def all_finite(tree: Any) -> jax.Array:
    """Whether every array is finite."""
    each = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.stack(each).all() if each else jnp.array(True)


def accept_finite(new: Any, old: Any, direction: jax.Array | None = None) -> Any:
    """``new`` if every array of it is finite, else ``old``: bad input never sticks.

    What else is made of the old state, as the direction is, must come before the new
    one, which then can take its place in memory.
    """
    ok = all_finite(new)
    return tree_where(
        ok if direction is None else batching.after(ok, direction), new, old
    )
