"""Files that are either whole or not there, whenever a process is killed."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> Path:
    """Writes a value, replacing an older file in one step; returns the path."""
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(json.dumps(value, indent=2) + "\n")
    return draft.replace(path)


def read_or_make(path: Path, make: Callable[[], Any]) -> Any:
    """What the JSON file holds; where there is none, what is made and then written.

    The value is the one read back in both cases: a resumed job sees what it would
    have seen.
    """
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_text())


def sha256(paths: Iterable[Path]) -> str:
    """Hash of the names and the contents of files, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        digest.update(path.name.encode() + b"\0" + content)
    return digest.hexdigest()
