"""Warnings that name the user's line, however deep in the library they arise."""

import sys
import warnings

from lowrank_optax._src.leaves.context import is_quiet

# What may stand between that line and the warning.
_BETWEEN = frozenset(("lowrank_optax", "jax", "optax", "flax", "contextlib"))


def warn(message: str) -> None:
    """Warn of the nearest line outside of this library and of those that call it."""
    if is_quiet():
        return
    level, frame = 2, sys._getframe(1)
    while (back := frame.f_back) and _package(frame.f_globals) in _BETWEEN:
        level, frame = level + 1, back
    warnings.warn(message, stacklevel=level)


def _package(names: dict[str, object]) -> str:
    return str(names.get("__name__")).partition(".")[0]
