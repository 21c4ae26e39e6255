"""Passes over tiles on GPU, by Triton: a walk is a loop within a program."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array

from lowrank_optax._src.kernels.plan import Plan, is_thin, upright

At = Mapping[str, Any]  # where along its axis a tile starts

PARAMS = triton.CompilerParams(num_warps=8, num_stages=1)
_PROGRAMS = 256  # about two for each multiprocessor of an H100


@dataclasses.dataclass(frozen=True)
class Access:
    """Reads and writes of tiles, masked where a grid goes beyond the edges.

    Attributes:
      cut: see `Plan`.
      origin: zero, but no constant: JAX refuses a slice that starts at one and goes
        beyond the edges.
      shares: how many programs share a walk.
    """

    cut: Plan
    origin: Array
    shares: int

    @property
    def each(self) -> int:
        """Steps that a program makes."""
        return pl.cdiv(self.cut.steps(self.cut.over), self.shares)

    def load(self, ref: Any, axes: str, at: At) -> Any:
        """A tile with zeros beyond the edges; the list of its vectors if it is thin."""
        if is_thin(axes, self.cut.sizes) and "r" not in at:
            numbers = range(self.cut.sizes["r"])
            return [self.load(ref, axes, {**at, "r": k}) for k in numbers]
        slices, inside = self._places(axes, at)
        zero = None if inside is None else jnp.zeros([], ref.dtype)
        block = triton.load(ref.at[slices], mask=inside, other=zero)
        return upright(axes, block)

    def store(self, ref: Any, axes: str, at: At, x: Array) -> None:
        slices, inside = self._places(axes, at)
        triton.store(ref.at[slices], upright(axes, x), mask=inside)

    def _places(self, axes: str, at: At) -> tuple[tuple[Any, ...], Array | None]:
        """The slices of a tile, and which of its entries are there; None for all."""
        cut = self.cut
        shape = tuple(1 if a == "r" and a in at else cut.taken(a) for a in axes)
        covered = {"r": cut.sizes.get("r")} if "r" in at else {}
        covered[cut.outer] = cut.steps(cut.outer) * cut.block[cut.outer]
        covered[cut.over] = self.shares * self.each * cut.block[cut.over]
        slices, inside = [], None
        for position, (axis, size) in enumerate(zip(axes, shape, strict=True)):
            start = at.get(axis, 0 if size <= cut.sizes[axis] else self.origin)
            slices.append(pl.ds(start, size))
            if covered.get(axis, size) != cut.sizes[axis]:
                place = jax.lax.broadcasted_iota(jnp.int32, shape, position)
                here = place < cut.sizes[axis] - start
                inside = here if inside is None else inside & here
        return tuple(slices), inside


def _whole(shape: Sequence[int], index: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
    """One matrix of a stack; the kernel takes tiles of it itself."""
    return pl.BlockSpec((*[None] * (len(shape) - 2), *shape[-2:]), index)


def matrix_of(x: Any) -> pl.BlockSpec:
    """The matrix of the first grid axis, of an array with one or with all of them."""
    batched = x.shape[0] > 1
    return _whole(x.shape, lambda b, *_: (b if batched else 0, 0, 0))


def walk(
    cut: Plan,
    interpret: bool,
    tile: Callable[..., tuple[Array, ...]],
    ins: Sequence[str],
    arrays: Sequence[Array],
    outs: Sequence[str],
    shapes: Sequence[Any],
) -> list[Array]:
    """A `tiles.Pass` on GPU; ``shapes`` of the results."""
    outer, over, batch = cut.outer, cut.over, len(arrays[0])
    wanted = _PROGRAMS // (batch * cut.steps(outer))
    shares = max(1, min(wanted, cut.steps(over) // 4))

    def kernel(*refs):
        access = Access(cut, 0 * pl.program_id(0), shares)
        here = {outer: pl.program_id(1) * cut.block[outer]}
        first = pl.program_id(2) * access.each
        sources = list(zip(refs[: len(ins)], ins, strict=True))
        held = {
            k: access.load(ref, axes, here)
            for k, (ref, axes) in enumerate(sources)
            if over not in axes
        }

        def step(i, sums):
            at = here | {over: (first + i) * cut.block[over]}
            blocks = [
                held[k] if k in held else access.load(ref, axes, at)
                for k, (ref, axes) in enumerate(sources)
            ]
            return [s + x for s, x in zip(sums, tile(*blocks), strict=True)]

        zeros = [jnp.zeros([*map(cut.taken, axes)], jnp.float32) for axes in outs]
        sums = jax.lax.fori_loop(0, access.each, step, zeros)
        for ref, axes, x in zip(refs[len(ins) :], outs, sums, strict=True):
            access.store(ref, axes, here, x)

    # Of each sum, a part from each program that shares the walk.
    parts = jax.eval_shape(
        lambda xs: [jnp.repeat(x[:, None], shares, axis=1) for x in xs], shapes
    )
    results = pl.pallas_call(
        kernel,
        grid=(batch, cut.steps(outer), shares),
        in_specs=[matrix_of(x) for x in arrays],
        out_specs=[_whole(x.shape, lambda b, i, s: (b, s, 0, 0)) for x in parts],
        out_shape=parts,
        compiler_params=PARAMS,
        interpret=interpret,
        name=tile.__name__,
    )(*arrays)
    return [x.sum(1) for x in results]
