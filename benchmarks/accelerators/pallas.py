"""What Pallas kernels read and write, counted in the traced program.

XLA sees a custom call with its operands and results, and not how often a kernel reads
them. The traced program has the kernel itself, its grid and its blocks.

On TPU, Mosaic fetches a block where its index differs from that of the grid's step
before, and writes a block back where the next step has another. On GPU, Triton's
kernels load and store themselves, see `triton`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt
from jax.extend import core

from benchmarks.accelerators.counting import Signature
from benchmarks.accelerators.triton import Walk

_STARTS = {"dma_start", "dma_wait", "copy_smem_to_gmem", "copy_gmem_to_smem"}


class Call(NamedTuple):
    """A call of a kernel in a traced program."""

    name: str
    params: dict[str, Any]
    operands: tuple[tuple[int, ...], ...]
    results: tuple[tuple[int, ...], ...]

    @property
    def grid(self) -> tuple[int, ...]:
        return self.params["grid_mapping"].grid

    @property
    def kernel(self) -> core.Jaxpr:
        return self.params["jaxpr"]

    @property
    def signature(self) -> Signature:
        return self.name, self.operands, self.results


def calls(jaxpr: core.Jaxpr, platform: str) -> Iterator[Call]:
    """All calls of kernels in a traced program.

    Args:
      jaxpr: the program.
      platform: "cuda" or "tpu": of what depends on it, only that part counts.
    """
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            operands = tuple(tuple(x.aval.shape) for x in eqn.invars)
            results = tuple(tuple(x.aval.shape) for x in eqn.outvars)
            yield Call(eqn.params["name"], eqn.params, operands, results)
        else:
            for inner in _parts(eqn, platform):
                yield from calls(inner, platform)


def _parts(eqn: core.JaxprEqn, platform: str) -> list[core.Jaxpr]:
    chosen = eqn.params.get("branches_platforms")
    if chosen:
        place = next(i for i, x in enumerate(chosen) if x is None or platform in x)
        return [eqn.params["branches"][place].jaxpr]
    return list(core.jaxprs_in_params(eqn.params))


def traffic(jaxpr: core.Jaxpr, platform: str) -> dict[Signature, tuple[float, ...]]:
    """Bytes that each call of a kernel reads of its operands and writes of its results.

    Of two kernels of one name and the same shapes, the dearer one counts.

    Raises:
      ValueError: where a kernel does something that cannot be counted.
    """
    count = _loaded if platform == "cuda" else _fetched
    found: dict[Signature, tuple[float, ...]] = {}
    seen: dict[int, tuple[float, ...]] = {}
    for call in calls(jaxpr, platform):
        if id(call.kernel) not in seen:
            seen[id(call.kernel)] = count(call)
        moved = seen[id(call.kernel)]
        found[call.signature] = max(moved, found.get(call.signature, ()), key=sum)
    return found


def imprecise(jaxpr: core.Jaxpr, platform: str) -> list[str]:
    """The kernel of each product of float32 that is below the highest precision."""
    found = []
    for call in calls(jaxpr, platform):
        for eqn in _walk(call.kernel):
            if eqn.primitive.name == "dot_general" and not is_precise(eqn):
                found.append(call.name)
    return found


def is_precise(eqn: core.JaxprEqn) -> bool:
    """Whether a product is at the highest precision, or of narrow numbers anyway."""
    if not any(x.aval.dtype == np.float32 for x in eqn.invars):
        return True
    precision = eqn.params["precision"]
    pair = precision if isinstance(precision, tuple) else (precision, precision)
    return pair == (jax.lax.Precision.HIGHEST,) * 2


def _walk(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from _walk(inner)


def _itemsize(dtype: npt.DTypeLike) -> int:
    return np.dtype(dtype).itemsize


def _fetched(call: Call) -> tuple[float, ...]:
    """Bytes of each operand and result that Mosaic's pipeline moves."""
    mapping = call.params["grid_mapping"]
    if mapping.num_index_operands or not all(isinstance(x, int) for x in call.grid):
        raise ValueError(f"The grid of {call.name} depends on data: cannot count it.")
    if any(eqn.primitive.name in _STARTS for eqn in _walk(call.kernel)):
        raise ValueError(f"{call.name} copies by itself: cannot count its reads.")
    points = np.indices(call.grid).reshape(len(call.grid), -1)
    return tuple(_fetches(x, points) for x in mapping.block_mappings)


def _fetches(block: Any, points: np.ndarray) -> float:
    """Bytes of one array's blocks, each as often as it is fetched.

    Args:
      block: Pallas's mapping of the array.
      points: (axes, steps), the places in the grid in the order of the steps.
    """
    shape = block.array_aval.shape
    index = block.index_map_jaxpr
    starts = [np.asarray(p, np.int32) for p in points]
    where = jax.vmap(core.jaxpr_as_fun(index), axis_size=points.shape[1])(*starts)
    places = np.stack([np.broadcast_to(x, points.shape[1:]) for x in where])
    new = np.ones(points.shape[1], bool)
    new[1:] = np.any(places[:, 1:] != places[:, :-1], axis=0)
    taken = np.ones(points.shape[1])
    for place, dim, size in zip(places, block.block_shape, shape, strict=True):
        kind = type(dim).__name__
        if kind == "Squeezed" or dim is None:
            continue
        if kind not in ("Blocked", "int"):
            raise ValueError(f"A block of {block.origin} is {dim}: cannot count it.")
        width = dim if isinstance(dim, int) else dim.block_size
        taken = taken * np.clip(size - place * width, 0, width)
    return float(np.sum(taken[new])) * _itemsize(block.array_aval.dtype)


def _loaded(call: Call) -> tuple[float, ...]:
    """Bytes of each operand and result that a Triton kernel loads and stores."""
    walk = Walk(call.name, call.grid)
    arguments = len(call.operands) + len(call.results)
    refs = {x: i for i, x in enumerate(call.kernel.invars) if i < arguments}
    walk.run(call.kernel, refs, {}, walk.everywhere)
    return tuple(walk.moved[i] for i in range(arguments))
