"""Fill the table of counts, and write it out.

    python -m benchmarks.accelerators --list
    python -m benchmarks.accelerators --targets h100 --shapes leaf --cases mlorc
    python -m benchmarks.accelerators --redo "^galore.*v5e"

Rows that are in the table are kept, so that it can be stopped and started again. Each
row is counted in a process of its own, which may take no longer than the timeout: what
XLA's compiler does not finish is a row that says so.
"""

import argparse
import re
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarks.accelerators.measure import Request, Row, in_process
from benchmarks.accelerators.programs import SHAPES
from benchmarks.accelerators.table import (
    DTYPES,
    RECORD,
    TIERS,
    Key,
    Table,
    keys,
    versions,
)
from benchmarks.accelerators.targets import TARGETS


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerators",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def several(name: str, choices: tuple[str, ...], default: tuple[str, ...]) -> None:
        text = f"default: {' '.join(default)}"
        parser.add_argument(
            name, nargs="+", choices=choices, default=default, help=text
        )

    several("--targets", tuple(TARGETS), ("h100", "v5e", "v6e"))
    several("--shapes", SHAPES, ("leaf", "7b", "7b-stacked"))
    several("--dtypes", DTYPES, DTYPES)
    several("--tiers", (*TIERS, "auto"), TIERS)
    parser.add_argument(
        "--cases", default="", help="a regular expression of their names"
    )
    parser.add_argument("--redo", help="count anew what matches case|target|shapes|...")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a row")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument("--out", type=Path, default=RECORD, help="the table")
    parser.add_argument("--list", action="store_true", help="only say what is missing")
    parser.add_argument(
        "--unmarked",
        action="store_true",
        help="take conditionals that are not marked for refreshes, and mark the row",
    )
    parser.add_argument(
        "--loops",
        action="store_true",
        help="count loops of unknown length once, and mark the row",
    )
    return parser.parse_args()


def row(key: Key, arguments: argparse.Namespace) -> Row:
    """Count one row; what it was counted with stands in it."""
    more = {"unmarked": arguments.unmarked, "loops": arguments.loops}
    found = in_process(Request(**key._asdict(), **more), arguments.timeout)
    return found | {"versions": versions()}


def main() -> None:
    """Count what is missing."""
    arguments = _arguments()
    table = Table.read(arguments.out)
    lists = arguments.targets, arguments.shapes, arguments.dtypes, arguments.tiers
    wanted = [k for k in keys(*lists) if re.search(arguments.cases, k.case)]
    again = re.compile(arguments.redo) if arguments.redo is not None else None
    missing = [
        k for k in wanted if k not in table.rows or again and again.search(str(k))
    ]
    print(f"{len(wanted)} rows, {len(missing)} to count", flush=True)
    if arguments.list:
        print(*missing, sep="\n")
        return
    with ThreadPoolExecutor(arguments.jobs) as pool:
        start = time.perf_counter()
        running = {pool.submit(row, key, arguments): key for key in missing}
        for number, done in enumerate(as_completed(running), 1):
            key, found = running[done], done.result()
            table.put(key, found)
            passed = time.perf_counter() - start
            short = {
                k: found[k] for k in ("error", "as", "words", "launches") if k in found
            }
            print(f"{number}/{len(missing)} {passed:.0f} s {key} {short}", flush=True)
    table.write_markdown()


if __name__ == "__main__":
    main()
