"""What a step costs on accelerators, from the record of what compilers make of it."""

from benchmarks.accelerators.cases import CASES
from benchmarks.accelerators.table import Key, Table, seconds
from tables.records import rows

_HEAD = ("", "words", "launches", "temporaries, MiB", "least time, ms", "compile, s")


def table(target: str, shapes: str, dtype: str) -> str:
    """A line for each optimizer, and one more where it has kernels."""
    record = Table.read()
    lines = []
    for name in CASES:
        for tier in ("xla", "pallas"):
            key = Key(name, target, shapes, dtype, tier)
            row = record.rows.get(key)
            if row and "words" in row:
                lines.append(_line(key, row))
    return rows(_HEAD, lines, figures=True)


def _line(key: Key, row: dict) -> list[str]:
    def both(field, form):
        first, then = (format(row[field + x], form) for x in ("", "_refresh"))
        return first if first == then else f"{first} / {then}"

    times = [f"{1e3 * seconds(row, key.target, x):.2f}" for x in (False, True)]
    without = row["temporaries_without_refresh_mib"]
    temporaries = [row["temporaries_mib"]] if without is None else [
        without, row["temporaries_mib"]
    ]  # fmt: skip
    return [
        f"`{key.case}`" + (", kernels" if key.tier == "pallas" else ""),
        both("words", ".2f"),
        both("launches", "d"),
        " / ".join(dict.fromkeys(f"{x:.0f}" for x in temporaries)),
        " / ".join(dict.fromkeys(times)),
        f"{row['compile_s']:.1f}",
    ]


def count(field: str, method: str, target: str, *shapes: str) -> str:
    """A count of a step, with kernels where there are some; "" where nobody counted."""
    record = Table.read()
    for shape in shapes:
        for tier in ("pallas", "xla"):
            row = record.get(Key(method, target, shape, "float32", tier))
            if row and "words" in row:
                form = ".1f" if field == "words" else ",d"
                both = (format(row[field + x], form) for x in ("", "_refresh"))
                return " / ".join(dict.fromkeys(both))
    return ""
