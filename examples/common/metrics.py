"""Metrics as JSON lines: one object a logged step, in order of steps."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from examples.common.errors import BadFile
from examples.common.files import file_sha256, read_or_make, write_text

Record = dict[str, Any]


def read_metrics(path: Path) -> list[Record]:
    """All records of a file; of a process killed while writing, all whole ones.

    Raises:
      BadFile: a line is no record, other than a last one that was not written to its
        end.
      OSError: it cannot be read.
    """
    if not path.exists():
        return []
    records: list[Record] = []
    # What is behind the last line feed was not written to its end.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            record = None
        step = record.get("step") if isinstance(record, dict) else None
        before = records[-1]["step"] if records else -1
        if not isinstance(record, dict) or type(step) is not int or step <= before:
            raise BadFile(
                f"{path}, line {number}: not the record of a step after {before}. The"
                " file is damaged, or was edited: restore it."
            )
        records.append(record)
    return records


def summed_up(
    summary: Path,
    metrics: Path,
    make: Callable[[], Record],
    check: Callable[[Record], Record],
) -> tuple[Record, list[Record]]:
    """The summary of a run that is done, and its records; it is run if there is none.

    Args:
      summary: the file that says that the run is done.
      metrics: the file of its records, whose hash is in the summary.
      make: runs it, and sums it up.
      check: of the summary; raises ValueError for what cannot be one.

    Raises:
      BadFile: one of both is damaged, or was edited, naming it.
    """

    def made() -> Record:
        return {**make(), "metrics_sha256": file_sha256(metrics)}

    def checked(value: Any) -> tuple[Record, Any]:
        fields = dict(value) if isinstance(value, dict) else {}
        expected = fields.pop("metrics_sha256", None)
        return check(fields), expected

    found, expected = read_or_make(summary, made, checked)
    if not metrics.is_file() or file_sha256(metrics) != expected:
        raise BadFile(
            f"{metrics} is not as it was when the run was done: lines are missing or"
            f" changed. Restore it, or delete {metrics.parent} to run it again."
        )
    return found, read_metrics(metrics)


class NoLog:
    """That of a process that does not write."""

    kept: Sequence[Record] = ()

    def write(self, record: Record) -> None:
        pass

    def sync(self) -> None:
        pass

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class MetricsLog:
    """Appends records to a file, each on disk when `write` returns.

    Args:
      path: the file, made anew unless there is something to keep.
      keep: records up to this step stay, later ones are dropped, because a run that
        continues from a checkpoint takes those steps again. None keeps nothing.

    Attributes:
      kept: the records that stayed.
    """

    def __init__(self, path: Path, keep: int | None = None):
        before = [] if keep is None else read_metrics(path)
        self.kept = [r for r in before if keep is not None and r["step"] <= keep]
        write_text(path, "".join(json.dumps(record) + "\n" for record in self.kept))
        self._path = path
        # Without a buffer: what a full disk refuses is not tried again at the end.
        self._file = path.open("ab", buffering=0)

    def write(self, record: Record) -> None:
        rest = (json.dumps(record) + "\n").encode()
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(f"Cannot write {self._path}: {error}") from error

    def sync(self) -> None:
        """Returns when the disk has it all."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
