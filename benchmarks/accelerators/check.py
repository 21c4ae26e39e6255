"""Compile every method again, and compare what it costs with the committed table.

    python -m benchmarks.accelerators.check
    python -m benchmarks.accelerators.check --subset ci --jobs 2

Fails where a count differs by more than 5%. Who made it better records the row anew
(``python -m benchmarks.accelerators --redo ROW``) and commits the table.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

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
_TARGETS = ("h100", "v5e")


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
    return seen + [
        key
        for target, shapes in (("h100", "leaf"), ("v5e", "leaf-ordinary"))
        for key in keys((target,), (shapes,), ("float32",), ("xla", "pallas"))
        if CASES[key.case].own and (target == "h100" or key.case in on_tpu)
        if key.tier == "xla" or (target == "h100" and key.case in kernels)
    ]


def differences(recorded: Row, found: Row) -> Iterator[str]:
    """What is not as it was recorded, a line each."""
    for row, name in ((found, "now"), (recorded, "in the table")):
        if "error" in row:
            yield f"{name}: {row['error']}"
            return
    for count, room in _COUNTS.items():
        before, after = recorded.get(count), found.get(count)
        if before is None and after is None:
            continue
        if before is None or after is None:
            yield f"{count}: {before} in the table, {after} now"
        elif abs(after - before) > max(room, _ROOM * before):
            percent = f" ({after / before - 1:+.0%})" if before else ""
            what = "worse" if after > before else "better: record it"
            yield f"{count}: {before} in the table, {after} now{percent}, {what}"


def failures(key: Key, table: Table, found: Row) -> list[str]:
    """What is wrong with a row; empty if nothing is."""
    recorded = table.rows.get(key)
    if recorded is None:
        return ["not in the table: record it"]
    if "as" in recorded or "as" in found:
        same = recorded.get("as") == found.get("as")
        return [] if same else [f"{recorded} in the table, {found} now"]
    wrong = list(differences(recorded, found))
    if CASES[key.case].own and found.get("imprecise"):
        wrong.append(f"{found['imprecise']} products are not at the highest precision")
    return wrong


def _request(key: Key, table: Table) -> Request:
    """Counted as the row of the table was."""
    row = table.rows.get(key, {})
    return Request(
        **key._asdict(),
        unmarked=row.get("rule") == "all",
        loops=bool(row.get("unbounded")),
    )


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
    table = Table.read()
    wanted = ci() if arguments.subset == "ci" else whole(table)
    wanted = [key for key in wanted if re.search(arguments.rows, str(key))]
    # What XLA did not finish when it was recorded is not waited for again.
    late = [
        k for k in wanted if "not compiled" in table.rows.get(k, {}).get("error", "")
    ]
    todo = [k for k in wanted if k not in late]
    made = {row["versions"] for row in table.rows.values() if "versions" in row}
    if made - {versions()}:
        print(f"Recorded with {'; '.join(sorted(made))}; here {versions()}.")
    failed = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        running = {
            pool.submit(in_process, _request(k, table), arguments.timeout): k
            for k in todo
        }
        for number, done in enumerate(as_completed(running), 1):
            key = running[done]
            wrong = failures(key, table, done.result())
            print(f"{number}/{len(todo)} {key}: {'; '.join(wrong) or 'ok'}", flush=True)
            if wrong:
                failed[key] = wrong
    print(f"\n{len(todo) - len(failed)} as in the table, {len(failed)} not.")
    for key, wrong in sorted(failed.items()):
        print(f"\n{key}", *wrong, sep="\n  ")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
