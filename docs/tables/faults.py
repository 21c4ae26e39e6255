"""What one bad gradient does to each optimizer, from the record."""

import re

from benchmarks.faults import table as written
from tables.records import named, record, rows


def _parts() -> tuple[list[list[str]], str]:
    """The cells of the record's table, and what stands below it."""
    text = written(record("faults")["figures"])
    body, _, below = text.partition("\n## ")
    lines = [x for x in body.splitlines() if x.startswith("|")]
    return [[x.strip() for x in line[1:-1].split("|")] for line in lines], below


def table() -> str:
    """A line for each optimizer, a column for each kind of fault."""
    (head, _, *lines), _ = _parts()
    return rows(head, ((named(name), *cells) for name, *cells in lines), figures=True)


def reasons() -> str:
    """Why some cells are large, and why some factories have no line."""
    text = "### " + _parts()[1].replace("\n## ", "\n### ")
    return re.sub(r"^- ([\w.]+)(?=[,:])", r"- `\1`", text, flags=re.M)
