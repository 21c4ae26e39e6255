"""Fields read from JSON, checked against the types that a dataclass gives them."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

T = TypeVar("T")


def checked_fields(
    cls: type, fields: Any, but: Sequence[str] = (), whole: bool = True
) -> dict[str, Any]:
    """The fields for a dataclass, lists made tuples, as JSON has none.

    Args:
      cls: the dataclass.
      fields: what was read.
      but: fields that are not among them.
      whole: whether all that have no default must be there.

    Raises:
      ValueError: a field is missing, unknown or of another type, by name.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"it holds {type(fields).__name__}, not an object.")
    known = {f.name: f for f in dataclasses.fields(cls) if f.name not in but}
    if unknown := sorted(set(fields) - set(known)):
        raise ValueError(f"unknown field {unknown[0]!r}.")
    required = {
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    }
    if whole and (missing := sorted(required - set(fields))):
        raise ValueError(f"it lacks {', '.join(missing)}.")
    types = typing.get_type_hints(cls)
    return {name: checked(name, x, types[name]) for name, x in fields.items()}


def checked(name: str, value: Any, expected: Any) -> Any:
    """The value, a list being made a tuple.

    Raises:
      ValueError: it is of another type than expected, by name.
    """
    value = tuple(value) if isinstance(value, list) else value
    # To Python True is a number too, and to nobody who reads a file.
    flag = isinstance(value, bool) and not isinstance(True, _plain(expected))
    try:
        check_type(
            value,
            expected,
            collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS,
        )
    except TypeCheckError:
        flag = True
    if flag:
        wanted = getattr(expected, "__name__", None)
        if wanted is None or typing.get_args(expected):
            wanted = str(expected).replace("typing.", "")
        raise ValueError(f"{name} must be {wanted}, got {_short(value)}.")
    return value


def _plain(expected: Any) -> tuple[type, ...]:
    """The classes that a flag may be of by this type: those of numbers apart."""
    if expected is Any:
        return (bool,)
    options = typing.get_args(expected) or (expected,)
    return (bool,) if bool in options else ()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
