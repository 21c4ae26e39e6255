"""Passes over tiles on TPU, by Mosaic: the steps of a walk are the last grid axis."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from lowrank_optax._src.kernels.plan import Plan, is_thin, upright

At = Mapping[str, Any]  # where along its axis a tile starts

PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def block_spec(
    cut: Plan, axes: str, tile_at: Callable[[Any, Any], At], batched: bool = True
) -> pl.BlockSpec:
    """The block of an array in each step; ``tile_at(i, j)`` are numbers of tiles."""

    def index(b, i, j):
        at = tile_at(i, j)
        return (b if batched else 0, *(at.get(a, 0) for a in axes))

    return pl.BlockSpec((None, *map(cut.taken, axes)), index)


def load(cut: Plan, ref: Any, axes: str, at: At) -> Any:
    """A block with zeros beyond the edges; the list of its vectors if it is thin."""

    def inside(x):
        for position, axis in enumerate(axes):
            if axis in at and cut.sizes[axis] % cut.block[axis]:
                place = jax.lax.broadcasted_iota(jnp.int32, x.shape, position)
                here = place < cut.sizes[axis] - at[axis]
                x = jnp.where(here, x, jnp.zeros_like(x))
        return x

    if not is_thin(axes, cut.sizes):
        return upright(axes, inside(ref[...]))
    numbers = range(cut.sizes["r"])
    if axes[0] == "r":
        return [inside(ref[k : k + 1, :]) for k in numbers]
    return [inside(ref[:, k : k + 1]) for k in numbers]


def walk(
    cut: Plan,
    interpret: bool,
    tile: Callable[..., tuple[Array, ...]],
    ins: Sequence[str],
    arrays: Sequence[Array],
    outs: Sequence[str],
    shapes: Sequence[Any],
) -> list[Array]:
    """A `tiles.Pass` on TPU; ``shapes`` of the results."""
    outer, over = cut.outer, cut.over

    def tile_at(i, j):
        return {outer: i, over: j}

    def kernel(*refs):
        step = pl.program_id(2)
        at = {outer: pl.program_id(1) * cut.block[outer], over: step * cut.block[over]}
        sources, results = refs[: len(ins)], refs[len(ins) :]
        blocks = [load(cut, *source, at) for source in zip(sources, ins, strict=True)]
        for ref, x in zip(results, tile(*blocks), strict=True):

            @pl.when(step == 0)
            def _(ref=ref):
                ref[...] = jnp.zeros_like(ref)

            ref[...] += x

    return pl.pallas_call(
        kernel,
        grid=(len(arrays[0]), cut.steps(outer), cut.steps(over)),
        in_specs=[
            block_spec(cut, axes, tile_at, len(x) > 1)
            for axes, x in zip(ins, arrays, strict=True)
        ],
        out_specs=[block_spec(cut, axes, tile_at) for axes in outs],
        out_shape=shapes,
        compiler_params=PARAMS,
        interpret=interpret,
        name=tile.__name__,
    )(*arrays)
