"""What `accumulate_gradients` asks of the engines inside of it."""

import contextlib
from collections.abc import Iterator

_phases: list[str] = []


def accumulating() -> str | None:
    """What `accumulate_gradients` asks of the engine inside of it, see there."""
    return _phases[-1] if _phases else None


@contextlib.contextmanager
def accumulation(phase: str) -> Iterator[None]:
    """Let transformations within take their part in the sum of several gradients."""
    _phases.append(phase)
    try:
        yield
    finally:
        _phases.pop()
