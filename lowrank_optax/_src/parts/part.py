"""Parts as arguments of compiled functions."""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile ``function(parts, *arrays)`` once for equal parts and equal shapes.

    Leaves of equal shape share one body, and so do the transformations that
    `optax.inject_hyperparams` makes anew at every update: numbers in the parts (frozen
    dataclasses, nested at will) that are arrays become arguments.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def body(skeleton, numbers, *args):
        return function(_fill(skeleton, numbers), *args)

    @functools.wraps(function)
    def call(parts, *args):
        numbers: list[Any] = []
        return body(_empty(parts, numbers), numbers, *args)

    return call


def kind(part: Any) -> Hashable:
    """The same for equal parts, whose arrays must be the same objects."""
    numbers: list[Any] = []
    return _empty(part, numbers), tuple(map(id, numbers))


@dataclasses.dataclass(frozen=True)
class _Hole:
    number: int


def _rebuild(part: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(part, tuple):
        return tuple(_rebuild(x, change) for x in part)
    if not dataclasses.is_dataclass(part) or isinstance(part, (type, _Hole)):
        return change(part)
    new = object.__new__(type(part))  # validated when it was made
    for field in dataclasses.fields(part):
        value = _rebuild(getattr(part, field.name), change)
        object.__setattr__(new, field.name, value)
    return new


def _empty(parts: Any, numbers: list[Any]) -> Any:
    def take(x):
        if not isinstance(x, (jax.Array, np.ndarray)):
            return x
        numbers.append(x)
        return _Hole(len(numbers) - 1)

    return _rebuild(parts, take)


def _fill(skeleton: Any, numbers: list[Any]) -> Any:
    return _rebuild(
        skeleton, lambda x: numbers[x.number] if isinstance(x, _Hole) else x
    )
