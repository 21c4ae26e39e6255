"""What one bad gradient does to each optimizer, from the record."""

from benchmarks.faults import ABSENT, FAULTS, cell, explained
from tables.records import named, record, rows


def table() -> str:
    """A line for each optimizer, a column for each kind of fault."""
    found = record("faults")["figures"]
    lines = ((named(name), *map(cell, row.values())) for name, row in found.items())
    return rows(("", *FAULTS), lines, figures=True)


def reasons() -> str:
    """Why some cells are large, and why some factories have no line."""
    found = explained(record("faults")["figures"])
    large = [
        f"- {named(name)}, {' and '.join(labels)}: {reason}"
        for (name, reason), labels in found.items()
    ]
    absent = [f"- `{name}`: {why}." for name, why in ABSENT.items()]
    return "\n".join(
        [
            "### Why cells are above 3",
            "",
            *large,
            "",
            "### Not in the table",
            "",
            *absent,
        ]
    )
