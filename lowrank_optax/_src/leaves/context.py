"""What is said to transformations from around them, through whatever wraps them.

Optax hands an ``init`` nothing but parameters, and an ``update`` only what each wrapper
passes on. What is said is local to a thread, and what can be compared is in JAX's key
of each compilation: a wrapper that compiles is compiled anew where something else is
said. The place of a layer, which may be traced, and the log of views are not.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Literal, TypeVar

import jax

from lowrank_optax._src.leaves.paths import Path

Phase = Literal["start", "add", "finish"]
T = TypeVar("T")

_phase = jax.make_user_context(default_value=None)
_depth = jax.make_user_context(default_value=1)
_limits = jax.make_user_context(default_value=())
_beside = jax.make_user_context(default_value=())
_axes = jax.make_user_context(default_value=None)
_recording = jax.make_user_context(default_value=None)
_place: ContextVar[jax.Array | int] = ContextVar("place", default=0)
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
    return _phase.value


def accumulation(phase: Phase) -> contextlib.AbstractContextManager[Any]:
    """Let transformations within take their part in the sum of several gradients."""
    return _phase(phase)


def averaging() -> tuple[str, ...] | None:
    """The axes of devices over which `average_gradients` averages, see there."""
    return _axes.value


def averaged_over(axes: tuple[str, ...]) -> contextlib.AbstractContextManager[Any]:
    """Let transformations within average what they see of the devices' gradients."""
    return _axes(axes)


@contextlib.contextmanager
def one_layer(place: jax.Array, depth: int) -> Iterator[None]:
    """Let the stacks within, of one layer, be those at a place of ``depth`` layers.

    What a transformation does to a layer must not depend on whether it is given the
    whole stack or, by `layerwise`, one layer after the other.
    """
    with _depth(depth), _within(_place, place):
        yield


def layer_place() -> jax.Array | int:
    """Where in the whole stacks the first layer of those given stands."""
    return _place.get()


def layer_depth() -> int:
    """How many times larger than those given the whole stacks are."""
    return _depth.value


def limits() -> tuple[tuple[Path, int], ...]:
    """Path and limit of each rank that is limited here, see `limited_ranks`."""
    return _limits.value


def limited_ranks(
    limits: Mapping[Path, int],
) -> contextlib.AbstractContextManager[Any]:
    """Let state that is created within have at most these ranks, by path."""
    known = dict(_limits.value)
    smallest = known | {p: min(r, known.get(p, r)) for p, r in limits.items()}
    return _limits(tuple(sorted(smallest.items())))


def left_out(
    shapes: dict[Path, jax.ShapeDtypeStruct],
) -> contextlib.AbstractContextManager[Any]:
    """Let the leaves within be chosen as if those were beside them that are left out.

    Which axes an output of attention has is told by its queries, and these may be
    frozen, or belong to another part of a partition.
    """
    return _beside(tuple((beside() | shapes).items()))


def beside() -> dict[Path, jax.ShapeDtypeStruct]:
    """The parameters that are left out of a tree, see `left_out`."""
    return dict(_beside.value)


@contextlib.contextmanager
def record_views() -> Iterator[list[Any]]:
    """Collect the views that every transformation initialised within makes.

    An ``init`` that compiles is traced anew, as a program from memory makes none.
    """
    found: list[Any] = []
    with _recording(object()), _within(_log, found):
        yield found


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Initialise a transformation for its shapes only: record and warn of nothing."""
    with _recording("nothing"), _within(_log, None):
        yield


def is_quiet() -> bool:
    return _recording.value == "nothing"


def note_views(views: list[Any]) -> None:
    """Add views to the collection that is going on, if one is."""
    log = _log.get()
    if log is not None:
        log.extend(views)
