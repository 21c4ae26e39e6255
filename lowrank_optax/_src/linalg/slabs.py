"""A pass over matrices in a loop, a few rows at a time."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
from jaxtyping import Array

from lowrank_optax._src.linalg import meshes

T = TypeVar("T")
Index = Array | int

# Rows that a TPU keeps together of bytes, and about how many numbers are a slab: some
# ten arrays of it fit the fast memory of a TPU.
_TILE, _NUMBERS = 32, 3 * 2**18


def in_slabs(
    function: Callable[[list[Array], list[Array]], list[Array]],
    fixed: Sequence[Array],
    renewed: Sequence[Array],
) -> list[Array]:
    """``function`` of some rows of matrices, which it renews, and so of all rows.

    On a mesh the loop itself gathers nothing: of an axis that may be split, it takes
    the same place in the part of every device.

    Args:
      function: takes rows of ``fixed`` and of ``renewed``, (..., rows, cols), and gives
        those of ``renewed`` anew.
      fixed: arrays (*batch, m, n), with any n each.
      renewed: the same.
    """
    *lead, cols = fixed[0].shape
    devices = meshes.devices(fixed[0])
    apart = [math.gcd(size, devices) for size in lead]
    *batch, rows = local = [a // b for a, b in zip(lead, apart, strict=True)]

    def interleaved(sizes: Sequence[int]) -> list[int]:
        return list(itertools.chain.from_iterable(zip(apart, sizes, strict=True)))

    def viewed(arrays: Sequence[Array]) -> list[Array]:
        return [x.reshape(*interleaved(local), x.shape[-1]) for x in arrays]

    def slab(place: Sequence[Index], new: list[Array], size: int) -> list[Array]:
        part = interleaved([1] * len(batch) + [size])
        at = [*(x for y in place for x in (0, y)), 0]
        old = [
            [jax.lax.dynamic_slice(x, at, (*part, x.shape[-1])) for x in arrays]
            for arrays in (seen, new)
        ]
        # Else XLA would change the layout of whole matrices before the loop.
        found = function(*jax.lax.optimization_barrier(old))
        found = jax.lax.optimization_barrier(found)
        pairs = zip(new, found, strict=True)
        return [jax.lax.dynamic_update_slice(x, y, at) for x, y in pairs]

    # So many numbers are on each device of a row of the loop, if one axis is split.
    wide = max(cols * math.prod(apart) // devices, 1)
    taken = max(_NUMBERS // wide // _TILE, 1) * _TILE
    whole, rest = divmod(rows, taken)
    seen, new = viewed(fixed), viewed(renewed)
    for start, size, count in ((0, taken, whole), (rows - rest, rest, 1)):
        if size and count:

            def body(place, new, start=start, size=size):
                *place, number = place
                return slab([*place, start + number * size], new, size)

            new = _nested(body, new, [*batch, count])
    return [y.reshape(x.shape) for x, y in zip(renewed, new, strict=True)]


def _nested(
    body: Callable[[list[Index], T], T], new: T, counts: Sequence[int], *place: Index
) -> T:
    """Loops within loops: XLA sees that starts are multiples of what a slab has."""
    if not counts:
        return body([*place], new)
    count, *counts = counts
    if count == 1:
        return _nested(body, new, counts, *place, 0)
    return jax.lax.fori_loop(
        0, count, lambda i, new: _nested(body, new, counts, *place, i), new
    )
