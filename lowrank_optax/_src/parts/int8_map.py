"""The 256 numbers of dynamic quantization (Dettmers et al. 2022), and the nearest one.

Followed by arithmetic instead of by their table: each of the seven decades is a linear
grid, and neither CPUs nor TPUs are fast at gathering from a table. What lies between
two of the numbers to the last bit of float32 may go to the other of them.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


@functools.cache
def dynamic_map(signed: bool) -> np.ndarray:
    """The 256 numbers in [-1, 1] or [0, 1], ascending."""
    numbers = [np.array([0.0, 1.0])]
    for decade in range(7):
        grid = np.linspace(0.1, 1.0, 2 ** (decade + (not signed)) + 1)
        middle = (grid[1:] + grid[:-1]) / 2 * 10.0 ** (decade - 6)
        numbers += [middle, -middle] if signed else [middle]
    return np.sort(np.concatenate(numbers))


@functools.cache
def zero(signed: bool) -> int:
    """The index of zero in the map."""
    return int(np.argmin(np.abs(dynamic_map(signed))))


class _Grid(NamedTuple):
    """Positive numbers of the map at equal distances, counted from 1."""

    start: float
    last: float
    first: float
    step: float
    border: float  # from where the first is the nearest


@functools.cache
def _grids(signed: bool) -> tuple[_Grid, ...]:
    """The seven decades, and the number 1 after them."""
    numbers = dynamic_map(signed)
    numbers = numbers[numbers > 0]
    found, start = [], 0
    for decade in range(8):
        size = 1 if decade == 7 else 2 ** (decade + (not signed))
        first = float(numbers[start])
        step = 0.9 * 10.0 ** (decade - 6) / size
        # What is not zero keeps its sign, as the smallest number: a second moment of
        # zero below a momentum that is not would be a division by epsilon.
        border = 0.0 if start == 0 else float(numbers[start - 1] + first) / 2
        found.append(_Grid(start + 1.0, float(start + size), first, step, border))
        start += size
    return tuple(found)


def decode(index: Array, signed: bool) -> Array:
    """Numbers of the map, in float32."""
    offset = index.astype(jnp.int32).astype(jnp.float32) - zero(signed)
    place, grids = jnp.abs(offset), _grids(signed)
    start, first, step = _of_last(
        [(place >= grid.start, (grid.start, grid.first, grid.step)) for grid in grids],
        [jnp.zeros_like(place)] * 3,
    )
    value = first + step * (place - start)
    return jnp.where(offset < 0, -value, value) if signed else value


def _of_last(
    cases: Iterable[tuple[Array, Sequence[float]]], otherwise: Sequence[Array]
) -> Sequence[Array]:
    """The numbers of the last case that holds, entry by entry."""
    for holds, numbers in cases:
        pairs = zip(numbers, otherwise, strict=True)
        otherwise = [jnp.where(holds, x, y) for x, y in pairs]
    return otherwise


def largest_of(x: Array) -> Array:
    """The largest magnitude of each row, (..., 1)."""
    # By the bits of the numbers, of which those that are no number are the largest.
    bits = jax.lax.bitcast_convert_type(jnp.abs(x).astype(jnp.float32), jnp.int32)
    largest = jnp.max(bits, axis=-1, keepdims=True)
    return jax.lax.bitcast_convert_type(largest, jnp.float32)


def nearest(x: Array, largest: Array, signed: bool) -> Array:
    """Index of the number of the map that is nearest to ``x / largest``."""
    # Beside a large number a small one would vanish, and a second moment that is not
    # zero must not be: it is divided by a smaller number first. `unit` keeps its sign,
    # so that `x` has one reader: XLA's GPU backend would write an array with two.
    less = jnp.where(largest > 1, 2.0**-60, 1.0)
    unit = x / (jnp.where(largest > 0, largest, 1.0) * less)
    whole, none = jnp.abs(unit), jnp.zeros_like(unit)
    size = whole * less
    start, last, first, step = _of_last(
        [
            (size > border if border else whole > 0, grid)
            for *grid, border in _grids(signed)
        ],
        [none, none, none, none + 1],
    )
    # Halves go down, as where the middle itself is not passed.
    place = jnp.ceil((size - first) / step + (start - 0.5))
    place = jnp.minimum(jnp.maximum(place, start), last)
    if signed:
        # The map has 1 but not -1.
        negative = -jnp.minimum(place, float(zero(True)))
        place = jnp.where(unit < 0, negative, place)
    return (zero(signed) + place).astype(jnp.int32).astype(jnp.uint8)
