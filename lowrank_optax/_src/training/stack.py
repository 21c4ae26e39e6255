"""Which part of stacks of layers an update is of: all of them, unless told otherwise.

What a transformation does to a layer must not depend on whether it is given the whole
stack or, by `layerwise`, one layer after the other.
"""

import contextlib
from collections.abc import Iterator

import jax

_parts: list[tuple[jax.Array, int]] = []


@contextlib.contextmanager
def one_layer(place: jax.Array, depth: int) -> Iterator[None]:
    """Let the stacks within, of one layer, be those at a place of ``depth`` layers."""
    _parts.append((place, depth))
    try:
        yield
    finally:
        _parts.pop()


def place() -> jax.Array | int:
    """Where in the whole stacks the first layer of those given stands."""
    return _parts[-1][0] if _parts else 0


def parts() -> int:
    """How many times larger than those given the whole stacks are."""
    return _parts[-1][1] if _parts else 1
