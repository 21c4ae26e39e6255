"""Hugging Face's `config.json`: reading its fields, and checks that models share."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_DTYPES = ("float32", "bfloat16", "float16")

Fields = dict[str, Any]


def stored_fields(config: type, but: Sequence[str]) -> tuple[str, ...]:
    """Names of the fields of a config's class that the file has too: all `but` some."""
    return tuple(f.name for f in dataclasses.fields(config) if f.name not in but)


def required_fields(config: type) -> tuple[str, ...]:
    """Names of the fields of a config's class that have no default."""
    return tuple(
        f.name for f in dataclasses.fields(config) if f.default is dataclasses.MISSING
    )


def read_object(path: Path) -> Fields:
    """The object in a JSON file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no JSON, or no object.
    """
    raw = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise ValueError(f"it holds {type(raw).__name__}, not a JSON object.")
    return raw


def check_file(raw: Fields, required: Sequence[str], fixed: Mapping[str, Any]) -> None:
    """Raises ValueError unless the fields are there that a model needs.

    Args:
      raw: the fields of a file.
      required: names of those without a default.
      fixed: fields that change the function a model computes, each with the one value
        that it can represent. A missing field has this value there too.
    """
    missing = [name for name in required if name not in raw]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}.")
    for name, only in fixed.items():
        if raw.get(name, only) != only:
            raise ValueError(
                f"{name}={raw[name]!r} is not supported, only {only!r} is."
            )


def check_counts(**values: Any) -> None:
    """Raises ValueError for a value that is no whole number of at least 1, by name."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{name} must be a whole number of at least 1, got {value!r}."
            )


def check_positive(**values: Any) -> None:
    """Raises ValueError for a value that is no positive finite number, by name."""
    for name, value in values.items():
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value!r}.")


def check_dtypes(**values: Any) -> None:
    """Raises ValueError for a value that is no type of the models here, by name."""
    for name, value in values.items():
        if value not in _DTYPES:
            raise ValueError(
                f"{name} must be one of {', '.join(_DTYPES)}, got {value!r}."
            )
