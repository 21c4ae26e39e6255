"""JSON lines and arrays: the one reader of all files of examples."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
      ValueError: it is not UTF-8, naming file and line.
      OSError: it cannot be read.
    """
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: not UTF-8 (byte {error.start} of the file)."
        ) from error


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The object of each line that is not blank, and where it stands, for errors.

    Lines end in a line feed: a JSON string may hold all other separators as they are.

    Raises:
      ValueError: a line is no JSON object, or holds half of a character, which no file
        can hold; naming file and line.
      OSError: it cannot be read.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _parsed(line, where)
        if not isinstance(row, dict):
            raise ValueError(f"{where}: not a JSON object.")
        yield where, row


def _parsed(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text else ""
        raise ValueError(f"{where}{line}: not JSON ({error.msg}).") from error
    except RecursionError as error:
        raise ValueError(f"{where}: nested too deeply.") from error
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: half of a surrogate pair, which is no character."
        ) from error
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{where}: not JSON ({error}).") from error
    return value


def read_array(path: Path) -> Iterator[tuple[str, Row]]:
    """The objects of a file that is one JSON array, and where each stands, for errors.

    Raises:
      ValueError: it is no array of objects, naming file and item.
      OSError: it cannot be read.
    """
    rows = _parsed(read_text(path), str(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path}: not a JSON array.")
    for number, row in enumerate(rows, start=1):
        where = f"{path}, item {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: not a JSON object.")
        yield where, row


def text_of(row: Row, name: str, where: str) -> str:
    """The string under a name.

    Raises:
      ValueError: there is none, naming file and line.
    """
    if not isinstance(row.get(name), str):
        lack = "no" if name not in row else "no text under"
        raise ValueError(f"{where}: {lack} {name!r}.")
    return row[name]
