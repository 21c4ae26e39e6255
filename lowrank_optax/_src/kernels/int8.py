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

from lowrank_optax._src.kernels.adam import Adam, adam_step
from lowrank_optax._src.kernels.dispatch import by_platform, warn_of_xla
from lowrank_optax._src.kernels.plan import BUDGET, power_of_two
from lowrank_optax._src.kernels.tiles import flat
from lowrank_optax._src.parts import int8_map
from lowrank_optax._src.parts.codec import BlockInt8Code

Array = jax.Array
_GPU_PARAMS = triton.CompilerParams(num_warps=4, num_stages=1)
_TPU_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel",))
_GPU_ROWS = 8  # blocks that a program takes
_VALUES = 24  # arrays of 32 bits, of one block of each row, that the arithmetic keeps


def adam_in_blocks(
    adam: Adam, block: int, grad: Array, mu: BlockInt8Code, nu: BlockInt8Code, count
) -> tuple[Array, BlockInt8Code, BlockInt8Code]:
    """Adam's direction, in the gradient's dtype, and the new codes of both moments.

    Args:
      adam: the optimizer's numbers.
      block: of the codes.
      grad: (*batch, m, n), float32 or narrower.
      mu, nu: a signed and an unsigned code.
      count: of Adam's updates before.
    """
    padded = (
        (grad, 0.0),
        (mu.index, int8_map.zero(True)),
        (nu.index, int8_map.zero(False)),
    )
    rows = [_in_rows(x, block, zero) for x, zero in padded]
    largest = [x.largest.reshape(len(rows[0]), -1) for x in (mu, nu)]
    arrays = [*rows, *largest, *map(flat, adam.numbers(count))]

    def on(platform, interpret, *arrays):
        return _on(platform, interpret, block, *arrays)

    def plain(*arrays):
        return _in_single_blocks(adam_on_blocks, block, *arrays)

    *wide, mu_largest, nu_largest = by_platform(on, plain, *arrays)
    update, mu_index, nu_index = (_from_rows(x, grad.shape) for x in wide)
    return (
        update,
        BlockInt8Code(mu_index, mu_largest.reshape(mu.largest.shape)),
        BlockInt8Code(nu_index, nu_largest.reshape(nu.largest.shape)),
    )


def _in_rows(x: Array, block: int, zero: float) -> Array:
    """Rows of whole blocks: those of x, or single blocks where they run over rows.

    What fills the last of them is ``zero``, in a code the number that stands for it.
    """
    *batch, m, n = x.shape
    if n % block == 0:
        return x.reshape(-1, n)
    x = x.reshape(*batch, m * n)
    pad = [(0, 0)] * len(batch) + [(0, -m * n % block)]
    return jnp.pad(x, pad, constant_values=zero).reshape(-1, block)


def _from_rows(x: Array, shape: tuple[int, ...]) -> Array:
    *batch, m, n = shape
    return x.reshape(*batch, -1)[..., : m * n].reshape(shape)


def _on(platform: str, interpret: bool, block: int, *arrays: Array) -> list[Array]:
    taken = rows_at_once(platform, arrays[0].shape[1], block, arrays[0].dtype)
    if not taken:
        warn_of_xla(platform, f"adam_int8 of blocks of {block}", arrays[0].shape)
    if taken and platform == "tpu":
        return _on_tpu(taken, interpret, block, *arrays)

    def run(*blocks):
        # XLA makes the update where it adds it to the weights, of the old codes.
        update, *codes = adam_on_blocks(*blocks)
        return update, *(_on_gpu(taken, interpret, *blocks) if taken else codes)

    return _in_single_blocks(run, block, *arrays)


def _in_single_blocks(
    run: Callable[..., Sequence[Array]], block: int, *arrays: Array
) -> list[Array]:
    """``run`` on rows of one block each."""
    single = [x.reshape(-1, block) for x in arrays[:3]]
    single += [x.reshape(-1, 1) for x in arrays[3:5]]
    results = run(*single, *(x[0] for x in arrays[5:]))
    shapes = [x.shape for x in arrays[:5]]
    return [x.reshape(s) for x, s in zip(results, shapes, strict=True)]


def rows_at_once(platform: str, cols: int, block: int, dtype: Any) -> int:
    """Rows that a program takes; 0 if it cannot.

    On GPU these are single blocks, of a size that Triton takes. On TPU all columns are
    taken, as many scales as there are; bytes lie in registers of (32, 128).
    """
    if platform == "cuda":
        return _GPU_ROWS if block == power_of_two(block) else 0
    fitting = (
        r for r in (128, 64, 32) if tpu_bytes(r, cols, block, dtype) <= BUDGET["tpu"]
    )
    return next(fitting, 0) if block % 128 == 0 else 0


def tpu_bytes(rows: int, cols: int, block: int, dtype: Any) -> int:
    """VMEM of a program: blocks twice, scales in whole registers, arithmetic."""
    wide = 2 * jnp.dtype(dtype).itemsize + 4
    scales = 4 * 4 * 128 * pl.cdiv(cols // block, 128)
    return rows * (2 * (cols * wide + scales) + _VALUES * 4 * block)


def adam_on_blocks(g, mu_index, nu_index, mu_largest, nu_largest, *numbers):
    """Adam on some blocks ``(rows, block)`` with their scales ``(rows, 1)``.

    A block whose new moments are not finite keeps the old ones.

    Returns:
      ``(update, mu_index, nu_index, mu_largest, nu_largest)``.
    """
    old = mu_index, nu_index, mu_largest, nu_largest
    update, mu, nu = adam_step(
        g.astype(jnp.float32),
        int8_map.decode(mu_index, True) * mu_largest,
        int8_map.decode(nu_index, False) * nu_largest,
        *numbers,
    )
    coded = int8_map.encode(mu, True), int8_map.encode(nu, False)
    codes, scales = zip(*coded, strict=True)
    ok = (scales[0] < jnp.inf) & (scales[1] < jnp.inf)
    new = (jnp.where(ok, x, y) for x, y in zip((*codes, *scales), old, strict=True))
    return update.astype(g.dtype), *new


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
            out = adam_on_blocks(
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
        _, *out = adam_on_blocks(*blocks, *(x[...] for x in numbers))
        for ref, x in zip(results, out, strict=True):
            triton.store(ref, x, mask=jnp.broadcast_to(inside, ref.shape))

    arrays = *arrays[:5], *(x[None] for x in arrays[5:])
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
