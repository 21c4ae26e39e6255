"""Hugging Face's `config.json`: reading its fields, and checks that models share."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

_DTYPES = ("float32", "bfloat16", "float16")
_MOST_LAYERS = 4096  # the deepest that were published have a thousand

Fields = dict[str, Any]


def stored_fields(config: type, but: Sequence[str]) -> tuple[str, ...]:
    """Names of the fields of a config's class that the file has too: all `but` some."""
    return tuple(f.name for f in dataclasses.fields(config) if f.name not in but)


def required_fields(config: type) -> tuple[str, ...]:
    """Names of the fields of a config's class that have no default."""
    return tuple(
        f.name for f in dataclasses.fields(config) if f.default is dataclasses.MISSING
    )


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


def check_counts(most: int = 2**31 - 1, **values: Any) -> None:
    """Raises ValueError for a value that is no whole number from 1 to `most`, by name.

    Tokens and positions are counted in 32 bits.
    """
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{name} must be a whole number of at least 1, got {value!r}."
            )
        if value > most:
            raise ValueError(f"{name} must be at most {most:,}, got {value:,}.")


def check_layers(layers: Any) -> None:
    """Raises ValueError for a number of layers that is none, or of no known model.

    Layers are made one by one, which takes minutes where a number is absurd.
    """
    check_counts(_MOST_LAYERS, num_hidden_layers=layers)


def check_room(parameters: int, dtype: str, source: object) -> None:
    """Raises ValueError for a model whose weights alone this machine cannot hold."""
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for device in jax.local_devices():
        if device.platform != "cpu":
            room += (device.memory_stats() or {}).get("bytes_limit", 0)
    size = parameters * (4 if dtype == "float32" else 2)
    if size > room:
        raise ValueError(
            f"Cannot make the model of {source}: its {parameters:,} weights in {dtype}"
            f" take {size / 2**30:,.1f} GiB, and this machine has {room / 2**30:,.1f}."
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
