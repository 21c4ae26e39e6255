"""How a pass over a matrix is cut into tiles that fit the fast memory of a device."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from lowrank_optax._src.linalg.products import OUTER_MAX_RANK
from lowrank_optax._src.linalg.small import next_power_of_two

# What every GPU since Ampere has a block, and a TPU core's default share of VMEM.
BUDGET = {"cuda": 99 * 1024, "tpu": 16 * 1024 * 1024}
# From large to small; the first that fits is taken. Of "m" and "n" on TPU, where the
# last axis fills registers. On GPU of the axis that stays and the axis of the walk:
# what a tile reads beside the gradient, 20 rows for MLorc, is as long as the latter.
_TILES = {
    "cuda": ((128, 32), (64, 64), (32, 64), (32, 32), (32, 16), (16, 16)),
    "tpu": ((256, 512), (128, 512), (128, 256), (128, 128)),
}
_VALUES = 6  # whole tiles of float32 that a pass keeps besides its operands, at most


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a pass is cut into tiles on a platform.

    Attributes:
      platform: "cuda" or "tpu".
      sizes: of all axes by letter.
      over: the axis of the walk.
      block: of "m" and "n".
      bytes: of fast memory that a program needs, counted by `_footprint`.
    """

    platform: str
    sizes: Mapping[str, int]
    over: str
    block: Mapping[str, int]
    bytes: int

    @property
    def outer(self) -> str:
        return "m" if self.over == "n" else "n"

    def steps(self, axis: str) -> int:
        return pl.cdiv(self.sizes[axis], self.block[axis])

    def taken(self, axis: str) -> int:
        """The size of an axis in a tile; on GPU rounded up to what Triton takes."""
        if axis in self.block:
            return self.block[axis]
        size = self.sizes[axis]
        pad = self.platform == "cuda" and size > 1
        return next_power_of_two(size, 16) if pad else size


def plan(
    platform: str,
    ins: Sequence[str],
    outs: Sequence[str],
    over: str,
    sizes: Mapping[str, int],
    dtype: Any,
) -> Plan | None:
    """The largest tiles that fit; None if none does.

    Args:
      platform: "cuda" or "tpu".
      ins, outs: axes of operands and results.
      over: the axis of the walk.
      sizes: of all axes by letter.
      dtype: of the gradient, see `itemsize`.
    """
    for shape in _TILES[platform]:
        block: dict[str, int] = {}
        axes = "nm" if platform == "cuda" and over == "m" else "mn"
        for axis, size in zip(axes, shape, strict=True):
            least = (
                next_power_of_two(sizes[axis], 16)
                if platform == "cuda"
                else sizes[axis]
            )
            block[axis] = min(size, least)
        found = Plan(platform, sizes, over, block, 0)
        found = dataclasses.replace(found, bytes=_footprint(found, ins, outs, dtype))
        if found.bytes <= BUDGET[platform]:
            return found
    return None


def itemsize(axes: str, dtype: Any) -> int:
    """Bytes of a number: the gradient is in ``dtype``, all else in float32."""
    return jnp.dtype(dtype).itemsize if is_full(axes) else 4


def is_full(axes: str) -> bool:
    """Whether an array is of the matrix's own shape; "nm" if it lies transposed."""
    return axes in ("mn", "nm")


def upright(axes: str, x: Array) -> Array:
    """An array "nm" as one of "mn", or back; others as they are."""
    return x.mT if axes == "nm" else x


def _footprint(cut: Plan, ins: Sequence[str], outs: Sequence[str], dtype: Any) -> int:
    """Bytes of shared memory or VMEM, counted high.

    On GPU all that is multiplied passes through shared memory, but for thin factors and
    sums, which stay in registers. On TPU each block is there twice, as the next one is
    fetched meanwhile, in whole registers of (8, 128).
    """
    on_tpu = cut.platform == "tpu"
    total = (_VALUES if on_tpu else 2) * 4 * cut.block["m"] * cut.block["n"]
    for axes in [*ins, *(outs if on_tpu else ())]:
        rows, cols = map(cut.taken, axes)
        if on_tpu:
            rows, cols = pl.cdiv(rows, 8) * 8, pl.cdiv(cols, 128) * 128
        elif is_thin(axes, cut.sizes):
            continue
        total += (1 + on_tpu) * rows * cols * itemsize(axes, dtype)
    return total


def sizes_of(ins: Sequence[str], arrays: Sequence[Array]) -> dict[str, int]:
    """The size of each axis by letter, from stacks of matrices."""
    sizes: dict[str, int] = {}
    for axes, x in zip(ins, arrays, strict=True):
        sizes |= zip(axes, x.shape[1:], strict=True)
    return sizes


def is_thin(axes: str, sizes: Mapping[str, int]) -> bool:
    """Whether an operand is a factor whose rank is small enough for outer products."""
    return "r" in axes and sizes["r"] <= OUTER_MAX_RANK
