"""Errors as one line."""

_SHOWN = 4


def one_line(error: Exception) -> str:
    """The message; of a list of problems the first few, and how many there are more."""
    lines = str(error).splitlines()
    if len(lines) > _SHOWN:
        lines = [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} more"]
    return " ".join("; ".join(line.strip() for line in lines).split())
