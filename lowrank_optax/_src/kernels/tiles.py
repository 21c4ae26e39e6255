"""A pass over the tiles of a matrix, described once for XLA, GPU and TPU.

A pass is a function of one tile. Its operands and results are arrays of two axes, named
by letters: "m" and "n" are cut into tiles, any other is taken whole. The pass walks
along one of the two axes; results without it are summed over it.

    run(tile, [("mn", g), ("mr", left), ("rn", right)], [("mn", dtype)], over="n")

On TPU the steps of a walk are a grid axis, executed in order, and sums stay in VMEM; on
GPU programs run in any order, so that a walk is a loop within one, with the sums in
registers, and several programs share a long walk by partial sums.

Found on jax 0.10.2 with no device: both lower through `jax.export`. For CUDA it is
Triton, chosen by its `CompilerParams`: Mosaic GPU has no `dot_general` on plain values
and holds each whole block of a ref in shared memory. Triton wants array sizes that are
powers of two, slices refs but no values, and checks no bounds, hence the masks; JAX
promises no stability of its serialized form, so that an export must allow the custom
call. Mosaic for TPU fills edge blocks with anything, hence the masks here too.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton

from lowrank_optax._src.kernels.dispatch import by_platform
from lowrank_optax._src.low_rank import OUTER_MAX_RANK

Array = jax.Array
Spec = tuple[str, Any]  # axes and dtype

# What every GPU since Ampere has a block, and a TPU core's default share of VMEM.
BUDGET = {"cuda": 99 * 1024, "tpu": 16 * 1024 * 1024}
# From large to small; the first that fits is taken.
_TILES = {
    "cuda": ((64, 64), (32, 64), (32, 32), (32, 16), (16, 16)),
    "tpu": ((256, 512), (128, 512), (128, 256), (64, 128)),
}
_PROGRAMS = 512  # enough for each multiprocessor of a large GPU to have some
_VALUES = 6  # whole tiles of float32 that a pass keeps besides its operands, at most


def power_of_two(size: int, least: int = 1) -> int:
    return max(least, 1 << (size - 1).bit_length())


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
        return power_of_two(size, 16) if pad else size


def plan(
    platform: str, specs: Sequence[Spec], sizes: Mapping[str, int], over: str
) -> Plan | None:
    """The largest tiles that fit; None if none does."""
    for shape in _TILES[platform]:
        block = {}
        for axis, size in zip("mn", shape, strict=True):
            least = power_of_two(sizes[axis], 16) if platform == "cuda" else sizes[axis]
            block[axis] = min(size, least)
        found = Plan(platform, sizes, over, block, 0)
        found = dataclasses.replace(found, bytes=_footprint(found, specs))
        if found.bytes <= BUDGET[platform]:
            return found
    return None


def _footprint(plan: Plan, specs: Sequence[Spec]) -> int:
    """Bytes of shared memory or VMEM, counted high.

    On GPU all that is multiplied or stored passes through shared memory, but for thin
    factors and sums, which stay in registers. On TPU each block is there twice, as the
    next one is fetched meanwhile, in whole registers of (8, 128).
    """
    on_tpu = plan.platform == "tpu"
    total = (_VALUES if on_tpu else 2) * 4 * plan.block["m"] * plan.block["n"]
    for axes, dtype in specs:
        rows, cols = map(plan.taken, axes)
        if on_tpu:
            rows, cols = pl.cdiv(rows, 8) * 8, pl.cdiv(cols, 128) * 128
        elif is_thin(axes, plan.sizes):
            continue
        total += (1 + on_tpu) * rows * cols * jnp.dtype(dtype).itemsize
    return total


def is_thin(axes: str, sizes: Mapping[str, int]) -> bool:
    """Whether an operand is a factor whose rank is small enough for outer products."""
    return "r" in axes and sizes["r"] <= OUTER_MAX_RANK


def product(left: Any, right: Any) -> Array:
    """``left @ right``; of thin factors as they are loaded, lists of their vectors."""
    if not isinstance(left, list):
        return dot(left, right)
    terms = (a * b for a, b in zip(left, right, strict=True))
    return functools.reduce(jnp.add, terms)


def dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """A product at the highest precision, over one axis of each."""
    axes = ((contract[0],), (contract[1],)), ((), ())
    return jax.lax.dot_general(
        a,
        b,
        axes,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def run(
    tile: Callable[..., tuple[Array, ...]],
    ins: Sequence[tuple[str, Any]],
    outs: Sequence[Spec],
    over: str,
) -> list[Array]:
    """Run a pass on what is compiled for; see the module.

    Args:
      tile: from the blocks of all operands to those of all results. What lies beyond
        the edges of a matrix arrives as zero, and must add nothing to a sum.
      ins: axes and array of each operand, ``(*batch, ., .)`` or a number for "11"; the
        first has all batch axes.
      outs: axes and dtype of each result.
      over: the axis of the walk, "m" or "n".

    Returns:
      The results, ``(*batch, ., .)``.
    """
    batch = ins[0][1].shape[:-2]
    arrays = [_flat(x) for _, x in ins]

    def on(platform, interpret, *arrays):
        named = [(axes, x) for (axes, _), x in zip(ins, arrays, strict=True)]
        return sweep(platform, interpret, tile, named, outs, over)

    results = by_platform(on, *arrays)
    return [x.reshape(*batch, *x.shape[1:]) for x in results]


def _flat(x: Any) -> Array:
    x = jnp.asarray(x)
    if x.ndim == 0:
        x = x.astype(jnp.float32)[None, None]
    return x.reshape(-1, *x.shape[-2:])


def sweep(
    platform: str,
    interpret: bool,
    tile: Callable[..., tuple[Array, ...]],
    ins: Sequence[tuple[str, Array]],
    outs: Sequence[Spec],
    over: str,
) -> list[Array]:
    """`run` on one platform, with arrays ``(batch or 1, ., .)``.

    Args:
      platform: "cuda", "tpu", or "xla" for one tile that is the whole matrix, as also
        where no tile fits.
      interpret: whether to interpret the kernel.
    """
    sizes: dict[str, int] = {}
    for axes, x in ins:
        sizes |= zip(axes, x.shape[1:], strict=True)
    batch = max(x.shape[0] for _, x in ins)
    cut = None
    if platform != "xla":
        specs = [(axes, x.dtype) for axes, x in ins] + list(outs)
        cut = plan(platform, specs, sizes, over)
    if cut is None:
        arrays = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for _, x in ins)
        return list(jax.vmap(tile)(*arrays))
    run = _on_gpu if platform == "cuda" else _on_tpu
    return run(cut, batch, interpret, tile, ins, outs)


def _on_tpu(cut: Plan, batch, interpret, tile, ins, outs) -> list[Array]:
    outer, over = cut.outer, cut.over

    def spec(axes, batched=True):
        def index(b, i, j):
            at = {outer: i, over: j}
            return (b if batched else 0, *(at.get(a, 0) for a in axes))

        return pl.BlockSpec((None, *map(cut.taken, axes)), index)

    def load(ref, axes, at):
        if is_thin(axes, cut.sizes):
            along = axes.index("r")
            part = [slice(None), slice(None)]
            vectors = []
            for k in range(cut.sizes["r"]):
                part[along] = slice(k, k + 1)
                vectors.append(mask(ref[tuple(part)], axes, at))
            return vectors
        return mask(ref[...], axes, at)

    def mask(x, axes, at):
        for position, axis in enumerate(axes):
            if (
                axis in at
                and cut.sizes[axis] % cut.block[axis]
                and x.shape[position] > 1
            ):
                place = jax.lax.broadcasted_iota(jnp.int32, x.shape, position)
                x = jnp.where(place < cut.sizes[axis] - at[axis], x, jnp.zeros_like(x))
        return x

    def kernel(*refs):
        step = pl.program_id(2)
        at = {outer: pl.program_id(1) * cut.block[outer], over: step * cut.block[over]}
        blocks = [load(ref, axes, at) for ref, (axes, _) in zip(refs, ins)]
        for ref, (axes, _), x in zip(
            refs[len(ins) :], outs, tile(*blocks), strict=True
        ):
            if over in axes:
                ref[...] = x
                continue

            @pl.when(step == 0)
            def _(ref=ref):
                ref[...] = jnp.zeros_like(ref)

            ref[...] += x

    return pl.pallas_call(
        kernel,
        grid=(batch, cut.steps(outer), cut.steps(over)),
        in_specs=[spec(axes, x.shape[0] > 1) for axes, x in ins],
        out_specs=[spec(axes) for axes, _ in outs],
        out_shape=[
            jax.ShapeDtypeStruct((batch, *(cut.sizes[a] for a in axes)), dtype)
            for axes, dtype in outs
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name=tile.__name__,
    )(*(x for _, x in ins))


def _on_gpu(cut: Plan, batch, interpret, tile, ins, outs) -> list[Array]:
    outer, over = cut.outer, cut.over
    shares = max(1, min(_PROGRAMS // (batch * cut.steps(outer)), cut.steps(over) // 4))
    each = pl.cdiv(cut.steps(over), shares)

    def places(axes, at):
        """Of a block of a ref: its slices, and which of its entries are there."""
        slices, inside = [], None
        shape = tuple(1 if a == "r" and a in at else cut.taken(a) for a in axes)
        for position, (axis, size) in enumerate(zip(axes, shape, strict=True)):
            start = at.get(axis, 0)
            slices.append(pl.ds(start, size))
            if cut.sizes[axis] % size:  # never so of one vector
                place = jax.lax.broadcasted_iota(jnp.int32, shape, position)
                here = place < cut.sizes[axis] - start
                inside = here if inside is None else inside & here
        return tuple(slices), inside

    def load(ref, axes, at):
        if is_thin(axes, cut.sizes) and "r" not in at:
            return [load(ref, axes, at | {"r": k}) for k in range(cut.sizes["r"])]
        slices, inside = places(axes, at)
        zero = None if inside is None else jnp.zeros([], ref.dtype)
        return triton.load(ref.at[slices], mask=inside, other=zero)

    def store(ref, axes, at, x):
        slices, inside = places(axes, at)
        triton.store(ref.at[slices], x, mask=inside)

    def kernel(*refs):
        here = {outer: pl.program_id(1) * cut.block[outer]}
        first = pl.program_id(2) * each
        sources = list(zip(refs, ins))
        results = list(zip(refs[len(ins) :], outs, strict=True))
        held = {
            k: load(ref, axes, here)
            for k, (ref, (axes, _)) in enumerate(sources)
            if over not in axes
        }

        def step(i, sums):
            at = here | {over: (first + i) * cut.block[over]}
            blocks = [
                held[k] if k in held else load(ref, axes, at)
                for k, (ref, (axes, _)) in enumerate(sources)
            ]
            new, sums = tile(*blocks), iter(sums)
            added = []
            for (ref, (axes, _)), x in zip(results, new, strict=True):
                if over in axes:
                    store(ref, axes, at, x)
                else:
                    added.append(next(sums) + x)
            return added

        summed = [(r, axes) for r, (axes, _) in results if over not in axes]
        zeros = [jnp.zeros([*map(cut.taken, axes)], jnp.float32) for _, axes in summed]
        sums = jax.lax.fori_loop(0, each, step, zeros)
        for (ref, axes), x in zip(summed, sums, strict=True):
            store(ref, axes, here, x)

    def whole(shape, index):
        return pl.BlockSpec((*[None] * (len(shape) - 2), *shape[-2:]), index)

    def in_spec(x):
        batched = x.shape[0] > 1
        return whole(x.shape, lambda b, i, s: (b if batched else 0, 0, 0))

    shapes, specs = [], []
    for axes, dtype in outs:
        size = [cut.sizes[a] for a in axes]
        if over in axes:
            shapes.append(jax.ShapeDtypeStruct((batch, *size), dtype))
            specs.append(whole(shapes[-1].shape, lambda b, i, s: (b, 0, 0)))
        else:
            shapes.append(jax.ShapeDtypeStruct((batch, shares, *size), dtype))
            specs.append(whole(shapes[-1].shape, lambda b, i, s: (b, s, 0, 0)))
    results = pl.pallas_call(
        kernel,
        grid=(batch, cut.steps(outer), shares),
        in_specs=[in_spec(x) for _, x in ins],
        out_specs=specs,
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name=tile.__name__,
    )(*(x for _, x in ins))
    return [x.sum(1) if x.ndim == 4 else x for x in results]
