"""Count one row: an optimizer, on a target, for some shapes.

    python -m benchmarks.accelerators.measure h100 --case mlorc_adamw --shapes leaf
    python -m benchmarks.accelerators.measure v5e --optimizer "lro.mlorc_lion(1e-3)"

The result is printed as JSON. Beside what the row holds, `--dump DIR` writes the texts
of the programs. A record of many rows is made by `python -m benchmarks.accelerators`,
with a process such as this one for each row.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from benchmarks.accelerators import counting, hlo, pallas, programs
from benchmarks.accelerators.cases import CASES, Case
from benchmarks.accelerators.targets import TARGETS, environment, sharding

CHILD = "--request"  # then comes what the process counts

Row = dict[str, str | int | float | None]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is counted, and how.

    Attributes:
      target, shapes, dtype, tier: see `targets`, `programs` and `lro.kernels.dispatch`.
      case: a name in `cases.CASES`, if `optimizer` is empty.
      optimizer: an expression of `lro`, `optax`, `jnp` and `jax`.
      unmarked: whether unmarked conditionals count as refreshes, too.
      loops: whether a loop of unknown length counts once instead of being refused.
      ordinary: whether the program without its refresh is compiled as well.
      dump: a directory for the texts.
    """

    target: str
    case: str = ""
    shapes: str = "leaf"
    dtype: str = "float32"
    tier: str = "xla"
    optimizer: str = ""
    unmarked: bool = False
    loops: bool = False
    ordinary: bool = True
    dump: str = ""


def measure(request: Request) -> Row:
    """The counts of one program, see the module; JAX must be set up for the target.

    Raises:
      ValueError: for what cannot be counted, such as a loop of unknown length.
    """
    target = TARGETS[request.target]
    case, tx = _optimizer(request)
    params = programs.parameters(
        request.shapes, request.dtype, sharding(request.target)
    )
    program = programs.trace(tx, params, target.platform, request.tier)
    without = programs.without_refresh(program) if request.ordinary else None
    if programs.is_ordinary(request.shapes):
        program, without = without or program, None
    traffic = pallas.traffic(program.jaxpr.jaxpr, target.platform)
    if request.tier == "pallas" and not traffic:
        return {"as": "xla"}  # no kernel is used: the same program
    compiled = programs.compile_program(program)
    _dump(request, "stablehlo", compiled.lowered)
    _dump(request, "hlo", compiled.text)
    module = hlo.parse(compiled.text)
    rule = "all" if request.unmarked else case.rule
    ordinary, refresh = (
        counting.Counter(module, traffic, due, rule).count() for due in (False, True)
    )
    if not (request.loops or case.loops):
        counting.check_bounded(ordinary, refresh)
    row = _counts(program, ordinary, refresh, compiled.accessed)
    marked, unmarked = counting.conditionals(module)
    dots, low = programs.products(compiled.lowered)
    mib = 2**20
    return row | {
        "temporaries_mib": round(compiled.temporaries / mib, 3),
        "temporaries_without_refresh_mib": without
        and round(programs.compile_program(without).temporaries / mib, 3),
        "dots": dots,
        "imprecise": low + len(pallas.imprecise(program.jaxpr.jaxpr, target.platform)),
        "pallas_calls": len(traffic),
        "refreshes": marked,
        "conditionals": unmarked,
        "rule": rule,
        "unbounded": len(ordinary.unbounded | refresh.unbounded),
        "compile_s": round(compiled.seconds, 1),
    }


def _optimizer(request: Request) -> tuple[Case, optax.GradientTransformation]:
    if not request.optimizer:
        case = CASES[request.case]
        return case, case.build(request.shapes)
    known = {"lro": lro, "optax": optax, "jnp": jnp, "jax": jax}
    tx = eval(request.optimizer, known)  # what the caller of this program wrote
    return Case(lambda rate: tx), tx


def _counts(
    program: programs.Program,
    ordinary: counting.Cost,
    refresh: counting.Cost,
    accessed: float,
) -> Row:
    """Bytes in words of four for each weight, and in sizes of the parameters."""
    parameters = program.arrays[: program.parameters]
    weights = sum(x.size for x in parameters)
    size = sum(x.size * x.dtype.itemsize for x in parameters)
    return {
        "words": round(ordinary.bytes / 4 / weights, 3),
        "words_refresh": round(refresh.bytes / 4 / weights, 3),
        "sizes": round(ordinary.bytes / size, 3),
        "sizes_refresh": round(refresh.bytes / size, 3),
        "xla_words": round(accessed / 4 / weights, 3) if accessed else None,
        "launches": int(ordinary.launches),
        "launches_refresh": int(refresh.launches),
        "library": int(ordinary.calls),
        "library_refresh": int(refresh.calls),
        "weights_mib": round(size / 2**20, 3),
    }


def _dump(request: Request, suffix: str, text: str) -> None:
    if request.dump:
        directory = Path(request.dump)
        directory.mkdir(parents=True, exist_ok=True)
        parts = (request.case or "optimizer", request.target, request.shapes)
        name = "_".join((*parts, request.dtype, request.tier))
        (directory / f"{name}.{suffix}.txt").write_text(text)


def in_process(request: Request, timeout: float) -> Row:
    """The counts by a process of its own, or ``{"error": why there are none}``."""
    return answer(__spec__.name, json.dumps(vars(request)), request.target, timeout)


def answer(module: str, request: str, target: str, timeout: float) -> Row:
    """What a module prints of a request in a process that is set up for the target."""
    command = [sys.executable, "-m", module, CHILD, request]
    try:
        done = subprocess.run(
            command,
            env=os.environ | environment(target),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not compiled after {timeout:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return {"error": _reason(lines)}
    return json.loads(done.stdout.splitlines()[-1])


def _reason(lines: list[str]) -> str:
    """The exception in a traceback, without what JAX adds below it."""
    found = [x for x in lines if "Error" in x.partition(":")[0] and x[:1].strip()]
    return (found or lines)[-1][:400]


def main() -> None:
    """Count what the command line asks for."""
    if sys.argv[1:2] == [CHILD]:
        print(json.dumps(measure(Request(**json.loads(sys.argv[2])))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    for field in dataclasses.fields(Request)[1:]:
        flag = f"--{field.name}"
        if isinstance(field.default, bool):
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=field.default)
        else:
            parser.add_argument(flag, default=field.default)
    parser.add_argument("--timeout", type=float, default=600.0)
    given = vars(parser.parse_args())
    timeout = given.pop("timeout")
    print(json.dumps(in_process(Request(**given), timeout), indent=1))


if __name__ == "__main__":
    main()
