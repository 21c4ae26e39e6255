"""Errors as one line."""

_SHOWN = 4


class BadFile(ValueError):
    """A file of a run, or of a model, cannot be used; the message names it."""


def one_line(error: BaseException) -> str:
    """The message; of a list of problems the first few, and how many there are more."""
    lines = str(error).splitlines() or [type(error).__name__]
    if len(lines) > _SHOWN:
        lines = [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} more"]
    return " ".join("; ".join(line.strip() for line in lines).split())
