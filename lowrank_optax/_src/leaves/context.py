"""What is said to transformations from around them, through whatever wraps them.

Optax hands an ``init`` nothing but parameters, and an ``update`` only what each wrapper
passes on. Each variable here is one of a context, so that several threads may trace at
once.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Literal, TypeVar

import jax

from lowrank_optax._src.leaves.paths import Path

Phase = Literal["start", "add", "finish"]
T = TypeVar("T")

_phase: ContextVar[Phase | None] = ContextVar("phase", default=None)
_layer: ContextVar[tuple[jax.Array | int, int]] = ContextVar("layer", default=(0, 1))
_limits: ContextVar[tuple[tuple[Path, int], ...]] = ContextVar("limits", default=())
_beside: ContextVar[tuple[tuple[Path, Any], ...]] = ContextVar("beside", default=())
_log: ContextVar[list[Any] | None] = ContextVar("log", default=None)


@contextlib.contextmanager
def _within(variable: ContextVar[Any], value: T) -> Iterator[T]:
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


def accumulating() -> Phase | None:
    """What `accumulate_gradients` asks of the engine inside of it, see there."""
    return _phase.get()


def accumulation(phase: Phase) -> contextlib.AbstractContextManager[Any]:
    """Let transformations within take their part in the sum of several gradients."""
    return _within(_phase, phase)


def one_layer(place: jax.Array, depth: int) -> contextlib.AbstractContextManager[Any]:
    """Let the stacks within, of one layer, be those at a place of ``depth`` layers.

    What a transformation does to a layer must not depend on whether it is given the
    whole stack or, by `layerwise`, one layer after the other.
    """
    return _within(_layer, (place, depth))


def layer_place() -> jax.Array | int:
    """Where in the whole stacks the first layer of those given stands."""
    return _layer.get()[0]


def layer_depth() -> int:
    """How many times larger than those given the whole stacks are."""
    return _layer.get()[1]


def limits() -> tuple[tuple[Path, int], ...]:
    """Path and limit of each rank that is limited here, see `limited_ranks`."""
    return _limits.get()


def around() -> tuple[Any, ...]:
    """What the shapes of a state depend on, besides parameters and transformation."""
    return limits(), accumulating() is not None, layer_depth(), _beside.get()


def limited_ranks(
    limits: Mapping[Path, int],
) -> contextlib.AbstractContextManager[Any]:
    """Let state that is created within have at most these ranks, by path."""
    known = dict(_limits.get())
    smallest = known | {p: min(r, known.get(p, r)) for p, r in limits.items()}
    return _within(_limits, tuple(sorted(smallest.items())))


def without_gradient(
    shapes: dict[Path, jax.ShapeDtypeStruct],
) -> contextlib.AbstractContextManager[Any]:
    """Let the leaves within be chosen as if those were beside them that are left out.

    Which axes an output of attention has is told by its queries, and these may be
    frozen.
    """
    return _within(_beside, tuple((dict(_beside.get()) | shapes).items()))


def beside() -> dict[Path, jax.ShapeDtypeStruct]:
    """The parameters that are left out of an update, see `without_gradient`."""
    return dict(_beside.get())


def record_views() -> contextlib.AbstractContextManager[list[Any]]:
    """Collect the views that every transformation initialised within makes."""
    found: list[Any] = []
    return _within(_log, found)


def note_views(views: list[Any]) -> None:
    """Add views to the collection that is going on, if one is."""
    log = _log.get()
    if log is not None:
        log.extend(views)
