"""The 256 numbers of dynamic quantization (Dettmers et al. 2022), and the nearest one.

Followed by arithmetic instead of by their table: each of the seven decades is a linear
grid, and neither CPUs nor TPUs are fast at gathering from a table. What lies between
two of the numbers to the last bit of float32 may go to the other of them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


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
    place = jnp.abs(offset)
    value = jnp.zeros_like(place)
    for start, _, first, step, _ in _grids(signed):
        value = jnp.where(place >= start, first + step * (place - start), value)
    return jnp.where(offset < 0, -value, value) if signed else value


def largest_of(x: Array) -> Array:
    """The largest magnitude of each row, (..., 1)."""
    size = jnp.abs(x)
    # What is not a number must be seen in the scale, whatever a maximum makes of it.
    return jnp.max(jnp.where(size == size, size, jnp.inf), axis=-1, keepdims=True)


def encode(x: Array, signed: bool) -> tuple[Array, Array]:
    """Index of the nearest number of the map, and the largest magnitude of each row."""
    largest = largest_of(x)
    return nearest(x, largest, signed), largest


def nearest(x: Array, largest: Array, signed: bool) -> Array:
    """Index of the number of the map that is nearest to ``x / largest``."""
    unit = jnp.abs(x) / jnp.where(largest > 0, largest, 1.0)
    place = jnp.zeros_like(unit)
    for start, last, first, step, border in _grids(signed):
        # Halves go down, as where the middle itself is not passed.
        within = jnp.ceil((unit - first) / step + (start - 0.5))
        within = jnp.minimum(jnp.maximum(within, start), last)
        place = jnp.where(unit > border, within, place)
    if signed:
        # The map has 1 but not -1.
        place = jnp.where(x < 0, -jnp.minimum(place, float(zero(True))), place)
    return (zero(signed) + place).astype(jnp.int32).astype(jnp.uint8)
