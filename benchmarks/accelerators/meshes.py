"""What a step moves between the devices of a mesh, read from the compiled program.

    python -m benchmarks.accelerators.meshes cpu --cases "mlorc|galore_adamw"
    python -m benchmarks.accelerators.meshes h100 --shapes 7b --splits rows columns
    python -m benchmarks.accelerators.meshes v5e --shapes 7b-stacked --cases mlorc_adamw

Eight devices as a 4 x 2 mesh: simulated ones, or H100s or TPUs that are not there. A
conditional counts as in `counting`: that of a refresh as its cheapest branch in an
ordinary step, all others as their dearest. "7b" are the matrices of a layer of
LLaMA-7B, "7b-stacked" those of all 32 in seven stacks.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from benchmarks.accelerators import hlo, mesh_table
from benchmarks.accelerators.cases import CASES
from benchmarks.accelerators.counting import is_refresh
from benchmarks.accelerators.measure import CHILD, answer
from benchmarks.accelerators.programs import shapes as llama
from benchmarks.accelerators.targets import devices, environment

_KINDS = re.compile(
    r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|"
    r"collective-broadcast|ragged-all-to-all"
)
_AXES = ("a", "b")
# Where the rows and columns of each matrix lie.
SPLITS = {
    "rows": P(_AXES, None),
    "columns": P(None, _AXES),
    "both": P("a", "b"),
    "layers": P(_AXES, None, None),
}
_LAYERS = 8
_EIGHT = {"h100": "1x1x8", "v5e": "v5e:4x2"}
# The target: numbers over k max(m, n); collectives a group of equal leaves, and of all.
ROOM, A_GROUP, A_MODEL = 1.1, 12, 8


@dataclasses.dataclass(frozen=True)
class Moves:
    """The collectives of one step.

    Attributes:
      count: how many there are.
      largest: numbers of the largest array that one makes or takes, on one device.
      bytes: of all that they make or take, whichever is more, on one device.
    """

    count: int = 0
    largest: int = 0
    bytes: int = 0

    def __add__(self, other: "Moves") -> "Moves":
        largest = max(self.largest, other.largest)
        return Moves(self.count + other.count, largest, self.bytes + other.bytes)

    def times(self, count: int) -> "Moves":
        return Moves(count * self.count, self.largest, count * self.bytes)


def moves(module: hlo.Module, refresh: bool) -> Moves:
    """What a compiled step moves, with all refreshes due or none."""
    return _moves(module, module.entry, refresh, set())


def _moves(module: hlo.Module, name: str, refresh: bool, begun: set[str]) -> Moves:
    around, total = module.computations[name], Moves()
    for x in around.instructions:
        if x.opcode == "conditional":
            branches = [_moves(module, y, refresh, set()) for y in x.branches]
            choose = max if refresh or not is_refresh(x) else min
            total += choose(branches, key=lambda m: (m.bytes, m.count))
        elif x.opcode == "while":
            body = _moves(module, x.called("body")[0], refresh, set())
            total += body.times(module.trips(around, x) or 1)
        elif x.opcode in ("call", "async-start", "fusion"):
            for inner in x.called("to_apply", "calls"):
                total += _moves(module, inner, refresh, begun)
        elif _kind(x) and _begins(x, begun):
            total += _moved(around, x)
    return total


def _begins(x: hlo.Instruction, begun: set[str]) -> bool:
    """Whether a collective is no further part of one that has begun.

    XLA's TPU compiler takes one in steps, each within a fusion of other work.
    """
    chain = re.search(r'chain_id="(\d+)"', x.rest)
    if chain is None:
        return True
    new = chain[1] not in begun
    begun.add(chain[1])
    return new


def _kind(x: hlo.Instruction) -> str | None:
    """Of a collective, which."""
    kind = x.opcode.removesuffix("-start")
    return kind if _KINDS.fullmatch(kind) else None


def _moved(around: hlo.Computation, x: hlo.Instruction) -> Moves:
    taken = [a for y in around.operands(x) for a in y.result]
    sides = taken, x.result
    # Of an all-to-all the arrays are the parts of one.
    whole = sum if x.opcode.startswith("all-to-all") else max
    largest = max(whole(math.prod(a.dims) for a in side) for side in sides)
    size = max(sum(a.size for a in side) for side in sides)
    return Moves(1, largest, int(size))


def mesh_of(target: str) -> Mesh:
    """Eight devices of a target as a mesh of 4 x 2; "cpu" for simulated ones."""
    found = jax.devices("cpu") if target == "cpu" else devices(target, _EIGHT[target])
    grid = np.array(found[:8]).reshape(4, 2)
    return Mesh(grid, _AXES, axis_types=(AxisType.Auto,) * 2)


def matrices(name: str) -> dict[str, tuple[int, ...]]:
    """Three groups of equal matrices, or those of LLaMA-7B, see the module."""
    if name != "small":
        return llama(name)
    found = {"q_proj": (128, 128), "up_proj": (128, 384), "down_proj": (384, 128)}
    return {f"layer0/{path}": shape for path, shape in found.items()}


def parameters(name: str, split: str, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The matrices on a mesh; of "layers" so many stacks of them, if they are none."""
    stacked = name == "7b-stacked"
    stack = (_LAYERS,) if split == "layers" and not stacked else ()
    before = (None,) if split != "layers" and stacked else ()
    where = NamedSharding(mesh, P(*before, *SPLITS[split]))
    return {
        path: jax.ShapeDtypeStruct((*stack, *shape), jnp.float32, sharding=where)
        for path, shape in matrices(name).items()
    }


def compiled(
    tx: optax.GradientTransformation, params: Any, mesh: Mesh, target: str
) -> tuple[hlo.Module, int, str]:
    """A step, its parameters and state where they belong, and its temporaries."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    places = lro.state_shardings(tx, params, mesh)
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, plain),
        places,
    )
    out = jax.tree.map(lambda x: x.sharding, params), places
    run = jax.jit(step, donate_argnums=(0, 1), out_shardings=out)
    platform = {"h100": "cuda", "cpu": "cpu"}.get(target, "tpu")
    lowered = run.trace(params, state, params).lower(lowering_platforms=(platform,))
    found = lowered.compile()
    text = found.as_text() or ""
    return hlo.parse(text), found.memory_analysis().temp_size_in_bytes, text


def _hybrid(learning_rate: float, rank: int, matrices: Any = None):
    method = lro.hybrid_subspace(
        optax.scale_by_adam(), rank=rank, leading=rank // 2, matrices=matrices
    )
    return optax.chain(method, optax.scale_by_learning_rate(learning_rate))


_GALORE = CASES["galore_adamw"]
_EXACT = {"subspace": lro.TopSingular("gram_eigh")}
_PEERS = ("optax.adamw", "optax.contrib.galore")
ALL = {name: case for name, case in CASES.items() if case.own or name in _PEERS} | {
    "galore_gram_eigh": dataclasses.replace(_GALORE, options=_GALORE.options | _EXACT),
    "hybrid": dataclasses.replace(_GALORE, factory=_hybrid),
}
# These look for all singular vectors, not only for as many as their rank.
EXACT = ("fira_i3s_adamw", "galore_gram_eigh", "hybrid", "i3s_adamw", "ldadamw")


def case(
    name: str, shapes: str, split: str
) -> tuple[optax.GradientTransformation, int]:
    """An optimizer for some shapes, and the columns k of its sketches."""
    found = ALL[name]
    options = dict(found.options)
    if shapes == "small":
        small = {"rank": 8, "max_rank": 8}
        options |= {k: min(x, options[k]) for k, x in small.items() if k in options}
    rank = options.get("rank", options.get("max_rank", 0))
    found = dataclasses.replace(found, options=options)
    tx = found.build("7b-stacked" if split == "layers" else shapes)
    return tx, rank + (4 if name.startswith("mlorc") else 8)


def row(target: str, name: str, shapes: str, split: str, dump: str = "") -> dict:
    """One line of the table."""
    mesh = mesh_of(target)
    params = parameters(shapes, split, mesh)
    tx, k = case(name, shapes, split)
    start = time.perf_counter()
    module, temporaries, text = compiled(tx, params, mesh, target)
    seconds = time.perf_counter() - start
    if dump:
        Path(dump).write_text(text)
    ordinary, refresh = (moves(module, due) for due in (False, True))
    # The long sides of all matrices of a leaf: these are moved together.
    longest = max(x.size // min(x.shape[-2:]) for x in params.values())
    widest = max(min(x.shape[-2:]) for x in params.values())
    return {
        "k": k,
        "bound": int(ROOM * (widest if name in EXACT else k) * longest),
        "thin": int(ROOM * k * longest),
        "most": A_GROUP * len({x.shape for x in params.values()}) + A_MODEL,
        "ordinary": dataclasses.asdict(ordinary),
        "refresh": dataclasses.asdict(refresh),
        "temporaries": temporaries,
        "weights": sum(4 * math.prod(x.shape) for x in params.values()),
        "compile_s": round(seconds, 1),
    }


def in_process(key: str, timeout: float) -> dict:
    """The row of "case|target|shapes|split" by a process of its own, or its error."""
    return answer(__spec__.name, key, key.split("|")[1], timeout)


def rows(arguments: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    shapes = arguments.shapes
    for name in ALL:
        if not re.search(arguments.cases, name):
            continue
        for split in arguments.splits:
            if not ALL[name].fits("7b-stacked" if split == "layers" else shapes):
                continue
            key = "|".join((name, arguments.target, shapes, split))
            try:
                yield (
                    key,
                    row(arguments.target, name, shapes, split, arguments.dump),
                )
            except Exception as error:  # what does not compile is part of the table
                yield key, {"error": f"{type(error).__name__}: {str(error)[:200]}"}


def main() -> None:
    if sys.argv[1:2] == [CHILD]:
        name, target, *rest = sys.argv[2].split("|")
        print(json.dumps(row(target, name, *rest)))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=("cpu", "h100", "v5e"))
    parser.add_argument("--cases", default="")
    parser.add_argument("--shapes", default="small")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=[*SPLITS])
    parser.add_argument("--dump", default="", help="a file for XLA's text")
    parser.add_argument("--keep", action="store_true", help="in the record")
    arguments = parser.parse_args()
    variables = environment(arguments.target)
    if any(os.environ.get(k) != x for k, x in variables.items()):
        command = [sys.executable, "-m", __spec__.name, *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=os.environ | variables).returncode)
    for key, found in rows(arguments):
        print(key, found, flush=True)
        if arguments.keep:
            mesh_table.add(key, found)
    if arguments.keep:
        mesh_table.write_markdown()


if __name__ == "__main__":
    main()
