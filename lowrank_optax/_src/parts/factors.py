"""A matrix of state as two thin factors, and what is made of their product."""

import math
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowrank_optax._src.linalg.meshes import gathered, split_axes, whole_each
from lowrank_optax._src.linalg.products import OUTER_MAX_RANK, outer_product

T = TypeVar("T")


class LowRankCode(NamedTuple):
    """A matrix as ``left @ right``.

    Attributes:
      left: (*batch, m, r), carries the scale; zero columns are unused.
      right: (*batch, r, n), unit rows, the next warm start.
    """

    left: Float[Array, "*b m r"]
    right: Float[Array, "*b r n"]


def is_small(factor: Array) -> bool:
    """Whether the rank is so small that a factor may be whole on each device."""
    return min(factor.shape[-2:]) <= OUTER_MAX_RANK


def whole_codes(states: Iterable[T]) -> list[T]:
    """Trees of codes, on a mesh whole on each device if their rank is small.

    Those of all leaves are exchanged at once so, before any leaf waits for its own.
    """
    found = []
    for tree in states:
        arrays, structure = jax.tree.flatten(tree)
        if all(map(is_small, arrays)):
            arrays = whole_each(arrays)
        found.append(structure.unflatten(arrays))
    return found


def low_rank_product(code: LowRankCode, turned: bool = False) -> Array:
    """``left @ right``, or its transpose; at small rank as a sum that fuses."""
    left, right = (code.right.mT, code.left.mT) if turned else code
    if is_small(right):
        # With the gradient, the product has the places of that.
        left, right = gathered(left), gathered(right)
    return outer_product(left, right)


def negative_mean(left: Array, right: Array) -> Float[Array, "*b 1 1"]:
    """Zeta of MLorc's equation 2: the mean of ``|x|`` over ``x < 0``, x = left @ right.

    The product is formed entry by entry inside of the sums, and never stored.
    """

    def sums(left, right, again):
        x, y = (outer_product(a, right) for a in (left, again))
        terms = jnp.minimum(x, 0.0), (y < 0).astype(y.dtype)
        return tuple(jnp.sum(term, axis=(-2, -1), keepdims=True) for term in terms)

    def at_once(left, right):
        # Each sum forms its own product: one for both, XLA's GPU backend would store if
        # the stack is large.
        return sums(left, right, jax.lax.optimization_barrier(left))

    def by_blocks(left, right):
        if split_axes(left):  # simulated devices: a sum over them for each block
            return at_once(left, right)
        # XLA's CPU backend would store the product: there, of some rows at a time.
        *batch, m, r = left.shape
        blocks = math.gcd(m, 16)
        rows = jnp.moveaxis(left.reshape(*batch, m // blocks, blocks, r), -2, 0)

        def add(total, block):
            return jax.tree.map(jnp.add, total, sums(block, right, block)), None

        start = jnp.zeros((*left.shape[:-2], 1, 1), left.dtype)
        return jax.lax.scan(add, (start, start), rows)[0]

    right = gathered(right)  # so that the rows of the left one split the product
    below, count = jax.lax.platform_dependent(
        left, right, cpu=by_blocks, default=at_once
    )
    return -below / jnp.maximum(count, 1.0)


def mean_entry(left: Array, right: Array) -> Float[Array, "*b 1 1"]:
    """The mean of ``left @ right``, by the means of its factors."""
    columns = jnp.mean(left, axis=-2, keepdims=True)
    rows = jnp.mean(right, axis=-1, keepdims=True)
    return jnp.sum(columns * rows.mT, axis=-1, keepdims=True)


def clamp_negative(
    x: Float[Array, "*b m n"], zeta: Float[Array, "*b 1 1"]
) -> Float[Array, "*b m n"]:
    """``max(x, 0) + zeta [x < 0]`` (ML-6): exact zeros stay zero."""
    return jnp.where(x < 0, zeta, x)
