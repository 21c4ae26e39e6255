"""Compile every method again, and compare what it costs with the committed tables.

    python -m benchmarks.accelerators.check
    python -m benchmarks.accelerators.check --subset ci --jobs 2

Fails where a count differs by more than 5%. Who made it better records the row anew
(``python -m benchmarks.accelerators --redo ROW``) and commits the table.
"""

import argparse
import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from benchmarks.accelerators import mesh_table, meshes
from benchmarks.accelerators.cases import CASES
from benchmarks.accelerators.measure import Request, Row, in_process
from benchmarks.accelerators.table import Key, Table, keys, versions

_ROOM = 0.05
# What may differ besides, as it is small: of words, a look at a flag or a number.
_COUNTS = {
    "words": 0.02,
    "words_refresh": 0.02,
    "launches": 1,
    "launches_refresh": 1,
    "library": 0,
    "library_refresh": 0,
    "temporaries_mib": 0.5,
    "temporaries_without_refresh_mib": 0.5,
}
_MOVES = {f"{k} {x}": 1 for k in ("ordinary", "refresh") for x in ("count", "largest")}
_MOVES |= {f"{k} bytes": 1024 for k in ("ordinary", "refresh")}
_MOVES |= {"temporaries": 2**19}
_TARGETS = ("h100", "v5e")
# Sums of all leaves in one collective, gathers that a TPU would have apart, and stacks
# that stay where they are.
_MESHES = (
    "galore_adamw|h100|7b|both",
    "galore_adamw|h100|7b-stacked|layers",
    "galore_adamw|h100|7b-stacked|rows",
    "galore_plus_adamw|h100|7b|both",
    "mlorc_adamw|h100|7b|rows",
    "mlorc_lion|v5e|7b|rows",
)


def whole(table: Table) -> list[Key]:
    """All that was recorded for these targets, and what `ci` wants: some hours."""
    known = {k for k in table.rows if k.target in _TARGETS}
    return sorted(known | set(ci()))


def ci() -> list[Key]:
    """Every method on one matrix, and a few on a TPU: some minutes.

    On the TPU without refreshes, of which each takes minutes to compile.
    """
    kernels = {"adamw_8bit", "mlorc_adamw"}
    on_tpu = {"adam_mini", "adamw_8bit", "apollo_adamw", "galore_adamw"}
    turned = ("adam_mini", "fira_adamw", "galore_plus_adamw", "ldadamw")
    seen = [Key(case, "h100", "turned", "float32", "xla") for case in turned]
    # Launches that many leaves have in common.
    seen.append(Key("mlorc_adamw", "h100", "7b", "float32", "xla"))
    return seen + [
        key
        for target, shapes in (("h100", "leaf"), ("v5e", "leaf-ordinary"))
        for key in keys((target,), (shapes,), ("float32",), ("xla", "pallas"))
        if CASES[key.case].own and (target == "h100" or key.case in on_tpu)
        if key.tier == "xla" or (target == "h100" and key.case in kernels)
    ]


def differences(recorded: Row, found: Row, rooms: Mapping[str, float]) -> Iterator[str]:
    """What is not as it was recorded, a line each.

    Args:
      recorded, found: counts by name.
      rooms: what is compared, and by how much each may differ if 5% are less.
    """
    for row, name in ((found, "now"), (recorded, "in the table")):
        if "error" in row:
            yield f"{name}: {row['error']}"
            return
    for count, room in rooms.items():
        before, after = recorded.get(count), found.get(count)
        if before is None and after is None:
            continue
        if before is None or after is None:
            yield f"{count}: {before} in the table, {after} now"
        elif abs(after - before) > max(room, _ROOM * before):
            percent = f" ({after / before - 1:+.0%})" if before else ""
            what = "worse" if after > before else "better: record it"
            yield f"{count}: {before} in the table, {after} now{percent}, {what}"


def mesh_failures(key: str, found: Row) -> list[str]:
    """What is wrong with a row of `meshes`; empty if nothing is."""
    recorded = mesh_table.read().get(key)
    if recorded is None:
        return ["not in the record of meshes: keep it"]
    return list(differences(*map(mesh_table.counts, (recorded, found)), _MOVES))


def failures(key: Key, table: Table, found: Row) -> list[str]:
    """What is wrong with a row; empty if nothing is."""
    recorded = table.rows.get(key)
    if recorded is None:
        return ["not in the table: record it"]
    if "as" in recorded or "as" in found:
        same = recorded.get("as") == found.get("as")
        return [] if same else [f"{recorded} in the table, {found} now"]
    wrong = list(differences(recorded, found, _COUNTS))
    if CASES[key.case].own and found.get("imprecise"):
        wrong.append(f"{found['imprecise']} products are not at the highest precision")
    return wrong


@dataclass(frozen=True)
class Wanted:
    """A row to be counted again.

    Attributes:
      name: for people.
      count: counts it, in so many seconds at most.
      failures: what is wrong with what was counted.
      known: whether XLA had finished it when it was recorded.
    """

    name: str
    count: Callable[[float], Row]
    failures: Callable[[Row], list[str]]
    known: bool = True


def of_table(key: Key, table: Table) -> Wanted:
    """A row of the table, counted as it was."""
    row = table.rows.get(key, {})
    request = Request(
        **key._asdict(),
        unmarked=row.get("rule") == "all",
        loops=bool(row.get("unbounded")),
    )
    return Wanted(
        str(key),
        functools.partial(in_process, request),
        functools.partial(failures, key, table),
        known="not compiled" not in row.get("error", ""),
    )


def of_meshes(key: str) -> Wanted:
    """A row of the record of meshes."""
    count = functools.partial(meshes.in_process, key)
    return Wanted(key, count, functools.partial(mesh_failures, key))


def main() -> None:
    """Compare, and exit with 1 where something differs."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerators.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--subset", choices=("whole", "ci"), default="whole")
    parser.add_argument("--rows", default="", help="a regular expression of the rows")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a row")
    arguments = parser.parse_args()
    table, ours = Table.read(), arguments.subset == "ci"
    wanted = [
        *(of_table(key, table) for key in (ci() if ours else whole(table))),
        *map(of_meshes, _MESHES if ours else mesh_table.read()),
    ]
    # What XLA did not finish when it was recorded is not waited for again.
    todo = [x for x in wanted if x.known and re.search(arguments.rows, x.name)]
    made = {row["versions"] for row in table.rows.values() if "versions" in row}
    if made - {versions()}:
        print(f"Recorded with {'; '.join(sorted(made))}; here {versions()}.")
    failed = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        running = {pool.submit(x.count, arguments.timeout): x for x in todo}
        for number, done in enumerate(as_completed(running), 1):
            x = running[done]
            wrong = x.failures(done.result())
            print(
                f"{number}/{len(todo)} {x.name}: {'; '.join(wrong) or 'ok'}", flush=True
            )
            if wrong:
                failed[x.name] = wrong
    print(f"\n{len(todo) - len(failed)} as in the table, {len(failed)} not.")
    for name, wrong in sorted(failed.items()):
        print(f"\n{name}", *wrong, sep="\n  ")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
