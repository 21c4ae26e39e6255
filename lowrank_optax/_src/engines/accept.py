"""What is not finite never becomes state."""

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from lowrank_optax._src.engines.order import wait

T = TypeVar("T")


def increment(step: jax.Array) -> jax.Array:
    """The next step; after the largest int32 comes the middle of its range.

    So what is periodic goes on, and what has begun does not begin again.
    """
    last = jnp.iinfo(step.dtype).max
    return jnp.where(step < last, step + 1, last // 2)


def tree_where(accept: jax.Array, new: T, old: T) -> T:
    """``new`` where a scalar (or a predicate a matrix) accepts it, else ``old``."""

    def pick(x, y):
        mask = accept.reshape(accept.shape + (1,) * (x.ndim - accept.ndim))
        return jnp.where(mask, x, y)

    return jax.tree.map(pick, new, old)


def all_finite(tree: Any) -> jax.Array:
    """Whether every array is finite."""
    each = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.stack(each).all() if each else jnp.array(True)


def accept_finite(new: T, old: T) -> T:
    """``new`` if every array of it is finite, else ``old``: bad input never sticks."""
    return tree_where(all_finite(new), new, old)


def accept_each(new: Any, old: Any, batch: int) -> Any:
    """As `accept_finite`, each array by itself and each matrix of the batch axes."""

    def accept(x, y):
        behind = tuple(range(min(batch, x.ndim), x.ndim))
        return tree_where(jnp.all(jnp.isfinite(x), axis=behind), x, y)

    return jax.tree.map(accept, new, old)


def accept_together(new: T, old: T, direction: jax.Array, told_by: Any = None) -> T:
    """``new`` if all of it is finite, else ``old``: what belongs together.

    The direction is made of the old state too: on CPU it comes first, or the new state
    could not take the old one's place in memory.

    Args:
      new, old: the state of a leaf.
      direction: of the update.
      told_by: arrays that are finite where all of ``new`` is; None for itself.
    """
    told_by = new if told_by is None else told_by
    return tree_where(wait(all_finite(told_by), [direction]), new, old)


def accept_leaf(new: Any, old: Any, direction: jax.Array) -> Any:
    """The state of one leaf, which belongs together.

    Its small arrays tell whether to accept it. Those that are as large as the direction
    are looked at number by number, in the pass in which they are written; the numbers
    of one place in all of them belong together. The direction comes first, as in
    `accept_together`.
    """
    leaves = jax.tree.leaves(new)
    large = [x for x in leaves if x.size == direction.size]
    if len({x.shape for x in large}) > 1:  # in which places do not correspond
        return accept_together(new, old, direction)
    small = [x for x in leaves if x.size != direction.size]
    ok = wait(all_finite(small), [direction])
    each = functools.reduce(jnp.logical_and, map(jnp.isfinite, large), ok)

    def pick(x, y):
        return jnp.where(each if x.size == direction.size else ok, x, y)

    return jax.tree.map(pick, new, old)
