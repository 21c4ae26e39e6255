"""Files that are either whole or not there, whenever a process is killed."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from examples.common.errors import BadFile, one_line
from examples.common.processes import by_first, of_first

T = TypeVar("T")


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """The path of a draft, which takes the file's place when it is whole.

    A link in the file's place is replaced, not written through. Where anything fails,
    as on a full disk, an older file stays as it is and no draft remains.

    Raises:
      OSError: naming the file, whatever a library raised while it wrote.
    """
    draft = path.with_name(f"{path.name}.tmp")
    try:
        # It might be a link too.
        draft.unlink(missing_ok=True)
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except Exception as error:
        # NumPy, safetensors and tokenizers name no path, and have classes of their own.
        raise OSError(f"Cannot write {path}: {one_line(error)}") from error
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Writes UTF-8, replacing an older file in one step; returns the path."""
    with aside(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, value: Any) -> Path:
    """Writes a value, replacing an older file in one step; returns the path."""
    return write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
      OSError: it cannot be read.
      BadFile: it is not JSON, naming it.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadFile(f"{path} is not UTF-8 (byte {error.start}).") from error
    except RecursionError as error:
        raise BadFile(f"{path} is nested too deeply to be read.") from error
    except ValueError as error:
        raise BadFile(f"{path} is not JSON: {error}.") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      OSError: it cannot be read.
      BadFile: it is no JSON, or no object, naming it.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise BadFile(f"{path} holds {type(value).__name__}, not a JSON object.")
    return value


def read_or_make(
    path: Path, make: Callable[[], Any], check: Callable[[Any], T] = lambda value: value
) -> T:
    """What the JSON file holds; where there is none, what is made and then written.

    The value is the one read back in both cases: a resumed job sees what it would
    have seen. Of several processes each calls this, and makes the value.

    Args:
      path: the file.
      make: makes the value.
      check: of what was read, what is returned; raises ValueError for what cannot have
        been made here.

    Raises:
      BadFile: the file is damaged, or was edited, naming it.
    """
    if not of_first(path.exists):
        made = make()
        by_first(lambda: write_json(path, made))
    value = read_json(path)
    try:
        return check(value)
    except ValueError as error:
        raise BadFile(
            f"{path} is not as it was written: {error} Delete it to have it made again."
        ) from error


def sha256(paths: Iterable[Path]) -> str:
    """Hash of the names and the contents of files, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Hash of the contents of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
