"""Adam on moments in bytes as one pass: decode, update, encode.

Codes are written where the old ones are. On TPU the pass writes the update as well, as
a block's scale reaches its numbers there only within a kernel.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton
from jaxtyping import Array

from lowrank_optax._src.kernels.adam import renewed, step_in_blocks
from lowrank_optax._src.kernels.dispatch import by_platform, warn_of_xla
from lowrank_optax._src.kernels.plan import BUDGET
from lowrank_optax._src.kernels.tiles import flat
from lowrank_optax._src.linalg.small import next_power_of_two
from lowrank_optax._src.parts import int8_map

_GPU_PARAMS = triton.CompilerParams(num_warps=4, num_stages=1)
_TPU_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel",))
_GPU_ROWS = 8  # blocks that a program takes
_VALUES = 24  # arrays of 32 bits, of one block of each row, that the arithmetic keeps


def adam_in_blocks(
    blocks: Sequence[Array],
    cols: int,
    numbers: Sequence[Any],
    plain: Callable[[], list[Array]],
) -> list[Array]:
    """Adam's direction, in the gradient's dtype, the new bytes and the new scales.

    Args:
      blocks: as `step_in_blocks` takes: gradient and bytes (..., block), scales
        (..., 1).
      cols: of a row of whole blocks.
      numbers: Adam's, see `Adam.numbers`.
      plain: makes them without a kernel.
    """
    block, dtype = blocks[0].shape[-1], blocks[0].dtype
    scalars = list(map(flat, numbers))

    def on(platform, interpret):
        taken = rows_at_once(platform, cols, block, dtype)
        if not taken:
            rows = blocks[0].size // cols, cols
            warn_of_xla(platform, f"adam_int8 of blocks of {block}", rows)
            return plain()
        if platform == "tpu":
            results = _on_tpu(taken, interpret, block, *_rows(blocks, cols), *scalars)
        else:
            # XLA makes the update where it adds it to the weights, of the old codes.
            direction = step_in_blocks(*blocks, *numbers)[0].astype(dtype)
            codes = _on_gpu(taken, interpret, *_rows(blocks, block), *scalars)
            results = [direction, *codes]
        return [x.reshape(b.shape) for x, b in zip(results, blocks, strict=True)]

    return by_platform(on, plain)


def _rows(blocks: Sequence[Array], cols: int) -> list[Array]:
    """Rows of so many numbers, and of their scales."""
    scales = cols // blocks[0].shape[-1]
    wide = [x.reshape(-1, cols) for x in blocks[:3]]
    return wide + [x.reshape(-1, scales) for x in blocks[3:]]


def rows_at_once(platform: str, cols: int, block: int, dtype: Any) -> int:
    """Rows that a program takes; 0 if it cannot.

    On GPU these are single blocks, of a size that Triton takes. On TPU all columns are
    taken, as many scales as there are; bytes lie in registers of (32, 128).
    """
    if platform == "cuda":
        return _GPU_ROWS if block == next_power_of_two(block) else 0
    fitting = (
        r for r in (128, 64, 32) if tpu_bytes(r, cols, block, dtype) <= BUDGET["tpu"]
    )
    return next(fitting, 0) if block % 128 == 0 else 0


def tpu_bytes(rows: int, cols: int, block: int, dtype: Any) -> int:
    """VMEM of a program: blocks twice, scales in whole registers, arithmetic."""
    wide = 2 * jnp.dtype(dtype).itemsize + 4
    scales = 4 * 4 * 128 * pl.cdiv(cols // block, 128)
    return rows * (2 * (cols * wide + scales) + _VALUES * 4 * block)


def _on_blocks(*given):
    """The results of some blocks, see `adam_in_blocks`, from them and the numbers."""
    direction, *moments = step_in_blocks(*given)
    largest = [int8_map.largest_of(x) for x in moments]
    codes = renewed(moments, largest, given[1:5])
    return direction.astype(given[0].dtype), *codes


def _specs(taken: int, wide: int, scales: int, numbers: int) -> list[pl.BlockSpec]:
    """Of gradient and codes, scales, and numbers."""

    def rows(cols):
        return pl.BlockSpec((taken, cols), lambda i: (i, 0))

    one = pl.BlockSpec((None, 1, 1), lambda i: (0, 0, 0))
    return [*[rows(wide)] * 3, *[rows(scales)] * 2, *[one] * numbers]


def _like(arrays: Sequence[Array]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]


def _on_tpu(taken: int, interpret: bool, block: int, *arrays: Array) -> list[Array]:
    scales = arrays[3].shape[1]

    def kernel(*refs):
        wide, scale = refs[:3], refs[3:5]
        numbers, results = refs[5:-5], refs[-5:]

        def one_block(j, new):
            part = pl.ds(pl.multiple_of(j * block, block), block)
            # A column of a scale, taken and set by a comparison: lanes have no index.
            here = jax.lax.broadcasted_iota(jnp.int32, (taken, scales), 1) == j
            old = [
                jnp.sum(jnp.where(here, x[...], 0.0), axis=1, keepdims=True)
                for x in scale
            ]
            out = _on_blocks(
                *(x[:, part] for x in wide), *old, *(x[...] for x in numbers)
            )
            for ref, x in zip(results, out[:3], strict=False):
                ref[:, part] = x
            return [jnp.where(here, x, n) for x, n in zip(out[3:], new, strict=True)]

        zeros = [jnp.zeros((taken, scales), jnp.float32)] * 2
        new = jax.lax.fori_loop(0, scales, one_block, zeros)
        for ref, x in zip(results[3:], new, strict=True):
            ref[...] = x

    rows, cols = arrays[0].shape
    ins = _specs(taken, cols, scales, len(arrays) - 5)
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, taken),),
        in_specs=ins,
        out_specs=ins[:5],
        out_shape=_like(arrays[:5]),
        input_output_aliases={k: k for k in range(1, 5)},
        compiler_params=_TPU_PARAMS,
        interpret=interpret,
        name="adam_int8",
    )(*arrays)


def _on_gpu(taken: int, interpret: bool, *arrays: Array) -> list[Array]:
    rows, block = arrays[0].shape

    def kernel(*refs):
        sources, numbers, results = refs[:5], refs[5:-4], refs[-4:]
        place = jax.lax.broadcasted_iota(jnp.int32, (taken, 1), 0)
        inside = place < rows - pl.program_id(0) * taken
        blocks = [
            triton.load(x, mask=jnp.broadcast_to(inside, x.shape), other=0)
            for x in sources
        ]
        _, *out = _on_blocks(*blocks, *(x[...] for x in numbers))
        for ref, x in zip(results, out, strict=True):
            triton.store(ref, x, mask=jnp.broadcast_to(inside, ref.shape))

    ins = _specs(taken, block, 1, len(arrays) - 5)
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, taken),),
        in_specs=ins,
        out_specs=ins[1:5],
        out_shape=_like(arrays[1:5]),
        input_output_aliases={k + 1: k for k in range(4)},
        compiler_params=_GPU_PARAMS,
        interpret=interpret,
        name="adam_int8",
    )(*arrays)
