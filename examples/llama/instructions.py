"""Instructions with responses: read from files, and split.

A file is JSONL, a JSON array in a file named `.json`, or CSV with a header. What it
holds is told by its columns: see `FORMS`.
"""

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.common.data import held_out
from examples.common.jsonl import Row, read_array, read_rows, read_text
from examples.llama.forms import FORMS, GSM8K, Form, Instruction
from examples.llama.problems import arithmetic

ARITHMETIC = "arithmetic"

_PROBLEMS = 4000


@dataclass(frozen=True)
class Instructions:
    """Examples to train on, examples to test on, and where they come from."""

    source: str
    train: tuple[Instruction, ...]
    test: tuple[Instruction, ...]

    @property
    def sha256(self) -> str:
        """Hash of both parts, in hexadecimal."""
        parts = [[_content(x) for x in part] for part in self.parts]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def parts(self) -> tuple[tuple[Instruction, ...], tuple[Instruction, ...]]:
        """Training and test."""
        return self.train, self.test


def _content(x: Instruction) -> list[str]:
    tests = () if x.unit_test is None else dataclasses.astuple(x.unit_test)
    return [x.prompt, x.response, str(x.number), *tests]


def load_instructions(data: str, test: Path | None) -> Instructions:
    """Reads both parts.

    Args:
      data: a file, or "arithmetic" for problems that are made up.
      test: a file; None to hold out one example of twenty, chosen by what it says.

    Raises:
      ValueError: a file that is empty, malformed or not UTF-8, naming it and the row.
      OSError: a file that is missing or cannot be read.
    """
    if data == ARITHMETIC:
        found = [
            GSM8K.instruction(row, f"{ARITHMETIC}, problem {number}")
            for number, row in enumerate(arithmetic(_PROBLEMS, seed=0), start=1)
        ]
    else:
        found = read_instructions(Path(data))
    if test is not None:
        source = f"{data}, tested on {test}"
        return Instructions(source, tuple(found), tuple(read_instructions(test)))
    # Equal examples fall on the same side.
    kept = held_out([x.prompt for x in found])
    train = tuple(x for x in found if x.prompt not in kept)
    if not train:
        raise ValueError(f"{data}: one prompt cannot be split. Give a --test file too.")
    return Instructions(data, train, tuple(x for x in found if x.prompt in kept))


def read_instructions(path: Path) -> list[Instruction]:
    """All examples of a file.

    Raises:
      ValueError: see `load_instructions`.
      OSError: the file cannot be read.
    """
    rows = {".csv": _csv_rows, ".json": read_array}.get(path.suffix, read_rows)
    form, examples = None, []
    for where, row in rows(path):
        form = form or _form_of(row, where)
        examples.append(form.instruction(row, where))
    if not examples:
        raise ValueError(f"{path}: no example in it.")
    return examples


def _form_of(row: Row, where: str) -> Form:
    """The form whose columns the first row has, or comes nearest to."""
    # Of two that are as near, the one that asks for less.
    best = max(FORMS, key=lambda form: (form.present(row), -len(form.columns)))
    if not best.present(row):
        known = "; ".join(", ".join(form.columns) for form in FORMS)
        raise ValueError(
            f"{where}: columns {', '.join(map(repr, row))}, expected one of {known}."
        )
    return best


def _csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                expected = len(reader.fieldnames or ())
                raise ValueError(f"{where}: not {expected} columns as in the header.")
            yield where, row
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num + 1}: not CSV ({error})."
        ) from error
