"""Metrics as JSON lines: one object a logged step, in order of steps."""

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_metrics(path: Path) -> list[Record]:
    """All records of a file; of a process killed while writing, all whole ones."""
    records = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


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
        self.kept = [record for record in before if record["step"] <= keep]
        # Replaced in one step, so that a kill in between loses nothing.
        draft = path.with_suffix(".tmp")
        draft.write_text("".join(json.dumps(record) + "\n" for record in self.kept))
        draft.replace(path)
        self._file = path.open("a")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
