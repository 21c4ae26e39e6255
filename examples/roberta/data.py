"""Labelled texts: GLUE's TSV files, JSONL, CSV, or the `datasets` package."""

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.common.data import probe_hub
from examples.common.jsonl import read_rows, read_text
from examples.roberta.tasks import Task

DEFAULT_HUB_DATASET = "nyu-mll/glue"

_SUFFIXES = (".tsv", ".txt", ".jsonl", ".csv")
_HELD_OUT = 10  # of a single file, one row of so many
_LOWEST, _HIGHEST = 0.0, 5.0  # of the numbers that STS-B predicts


@dataclass(frozen=True)
class Examples:
    """Texts, each one or a pair, and their labels.

    Attributes:
      texts: a tuple of one or two strings an example.
      labels: (examples,): int32 numbers of classes, or float32.
      left_out: how many broken rows there are besides.
    """

    texts: Sequence[tuple[str, ...]]
    labels: np.ndarray
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | np.ndarray) -> "Examples":
        """The examples of the given numbers."""
        return Examples([self.texts[row] for row in rows], self.labels[rows])


@dataclass(frozen=True)
class Dataset:
    """What is trained and validated on.

    Attributes:
      source: where it is from, in words.
      labels: names of the classes; none where a number is predicted.
      train: the training set.
      validation: the validation sets by name, "" where there is one.
    """

    source: str
    labels: tuple[str, ...]
    train: Examples
    validation: Mapping[str, Examples]

    @property
    def sha256(self) -> str:
        """Hash of all texts and labels, in hexadecimal."""
        digest = hashlib.sha256()
        for examples in (self.train, *self.validation.values()):
            rows = [[*texts] for texts in examples.texts]
            digest.update(json.dumps([rows, examples.labels.tolist()]).encode())
        return digest.hexdigest()


def load_dataset(task: Task, spec: str) -> Dataset:
    """Reads the data of a GLUE task.

    Args:
      task: the task.
      spec: a directory with a training and a validation file, or one file, of which
        every tenth row is then held out: GLUE's TSV, JSONL or CSV, the last two with
        columns as the hub's dataset has them. `hf:OWNER/NAME`, a dataset of the
        Hugging Face hub; `auto`, GLUE from there.

    Raises:
      ValueError: a file that is not there, not UTF-8, empty, or has a wrong row, which
        is then named; a hub dataset that cannot be read.
    """
    if spec == "auto":
        probe_hub()
        return _hub(task, DEFAULT_HUB_DATASET)
    if spec.startswith("hf:"):
        return _hub(task, spec.removeprefix("hf:"))
    path = Path(spec)
    if path.is_dir():
        train = _find(path, task, task.train)
        files = {n: _find(path, task, stems) for n, stems in task.validation.items()}
        source = ", ".join(file.name for file in (train, *files.values()))
        validation = {name: read_examples(file, task) for name, file in files.items()}
        return Dataset(source, task.labels, read_examples(train, task), validation)
    if path.is_file():
        return _held_out(path, task)
    raise ValueError(f"Cannot read data {spec!r}: no such file or directory.")


def read_examples(path: Path, task: Task) -> Examples:
    """Reads one file.

    Raises:
      ValueError: naming the file and the row.
    """
    rows = {".jsonl": _jsonl, ".csv": _csv}.get(path.suffix)
    numbered = _tsv(path, task) if rows is None else rows(path)
    examples = _examples(numbered, task, str(path))
    if not len(examples):
        raise ValueError(f"{path}: it has no rows.")
    return examples


def _held_out(path: Path, task: Task) -> Dataset:
    examples = read_examples(path, task)
    held_out = np.arange(len(examples)) % _HELD_OUT == _HELD_OUT - 1
    if not held_out.any():
        raise ValueError(
            f"{path}: {len(examples)} rows are too few to hold out every tenth."
        )
    validation = examples.take(np.flatnonzero(held_out))
    return Dataset(
        f"{path.name}, every tenth row held out",
        task.labels,
        examples.take(np.flatnonzero(~held_out)),
        {name: validation for name in task.validation},
    )


def _find(directory: Path, task: Task, stems: Sequence[str]) -> Path:
    """The first file there is under any of the usual names."""
    names = [f"{p}{s}" for s in stems for p in ("", f"{task.name}_", f"{task.title}_")]
    for folder in (directory, directory / task.title, directory / task.name):
        for name in names:
            for suffix in _SUFFIXES:
                if (path := folder / f"{name}{suffix}").is_file():
                    return path
    raise ValueError(
        f"{directory} has no file for {task.title} called {' or '.join(names)}, with"
        f" {', '.join(_SUFFIXES)}, nor has its directory {task.title}."
    )


Rows = Iterator[tuple[int, Mapping[str, Any] | None]]
"""The number of a row, which is that of its line, and its values by column; None where
it is broken and that is tolerated."""


def _tsv(path: Path, task: Task) -> Rows:
    """Rows of unquoted cells: GLUE's texts have quotation marks of their own."""
    # Not splitlines(): texts contain separators that only Unicode calls line ends.
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    if lines and not lines[-1]:
        lines.pop()
    first = 0 if task.header else 1
    names = task.header or (lines[0].split("\t") if lines else [])
    if lines:
        _check_columns(names, task, path)
    broken = 0
    for number, line in enumerate(lines[first:], start=first + 1):
        cells = line.split("\t")
        if len(cells) != len(names):
            broken += 1
            if broken <= task.tolerated * len(lines):
                yield number, None
                continue
            raise ValueError(
                f"{path}: row {number} has {len(cells)} columns, expected {len(names)}:"
                f" {', '.join(names)}."
            )
        yield number, dict(zip(names, cells, strict=True))


def _csv(path: Path) -> Rows:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                names = reader.fieldnames or ()
                raise ValueError(
                    f"{path}: row {reader.line_num} does not have {len(names)} columns:"
                    f" {', '.join(names)}."
                )
            yield reader.line_num, row
    except csv.Error as error:
        row = reader.reader.line_num
        raise ValueError(f"{path}: row {row}: {error}.") from error


def _jsonl(path: Path) -> Rows:
    for where, row in read_rows(path):
        yield int(where.rpartition(" ")[2]), row


def _check_columns(names: Iterable[str], task: Task, where: object) -> None:
    names = list(names)
    for options in (*task.texts, task.label):
        if not any(name in names for name in options):
            raise ValueError(
                f"{where}: row 1: there is no column {' or '.join(map(repr, options))}"
                f" for {task.title} among {', '.join(map(repr, names))}."
            )


def _examples(rows: Rows, task: Task, where: str) -> Examples:
    texts, labels, left_out = [], [], 0
    for number, row in rows:
        if row is None:
            left_out += 1
            continue
        at = f"{where}: row {number}"
        own = tuple(_value(row, options, at) for options in task.texts)
        if not all(isinstance(text, str) for text in own):
            raise ValueError(f"{at}: its text is no string.")
        texts.append(own)
        labels.append(_label(_value(row, task.label, at), task, at))
    dtype = np.int32 if task.labels else np.float32
    return Examples(texts, np.array(labels, dtype), left_out)


def _value(row: Mapping[str, Any], options: Sequence[str], at: str) -> Any:
    for name in options:
        if name in row:
            return row[name]
    raise ValueError(f"{at}: there is no {' or '.join(map(repr, options))}.")


def _label(value: Any, task: Task, at: str) -> float:
    """The number of a class, given by it or by name, or what is predicted."""
    if not task.labels:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not _LOWEST <= number <= _HIGHEST:
            raise ValueError(
                f"{at}: the label {value!r} is no number from {_LOWEST:g} to"
                f" {_HIGHEST:g}."
            )
        return number
    if value in task.labels:
        return task.labels.index(value)
    numbers = [str(number) for number in range(len(task.labels))]
    if isinstance(value, bool) or str(value) not in numbers:
        raise ValueError(
            f"{at}: the label {value!r} is none of {', '.join(task.labels)}, or"
            f" {', '.join(numbers)}."
        )
    return int(value)


def _hub(task: Task, name: str) -> Dataset:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"Cannot read data 'hf:{name}': the package `datasets` is missing. Install"
            f" it, or give {task.title}'s files by --data."
        ) from error

    def read(split: str) -> Examples:
        rows = datasets.load_dataset(name, task.name, split=split)
        return _examples(iter(enumerate(rows, start=1)), task, f"hf:{name} {split}")

    try:
        validation = {
            part: read("_".join(filter(None, ("validation", part))))
            for part in task.validation
        }
        return Dataset(f"hf:{name}", task.labels, read("train"), validation)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Cannot read data 'hf:{name}': {error} Or give {task.title}'s files by"
            " --data."
        ) from error
