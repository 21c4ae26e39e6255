"""When a basis is renewed."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax._src.parts import compatible
from lowrank_optax._src.parts.checks import check_number


def _check_period(period: Any, name: str = "update_every") -> None:
    check_number(period, name)
    if not isinstance(period, jax.Array) and period < 1:
        raise ValueError(f"`{name}` must be at least 1, got {period}.")


@dataclasses.dataclass(frozen=True)
class Every:
    """Every leaf at steps 0, T, 2T, ..., as the papers have it.

    Args:
      update_every: T.

    >>> import optax, lowrank_optax as lro
    >>> every = lro.Every(500)
    >>> tx = lro.project_gradients(optax.scale_by_adam(), rank=4, refresh=every)
    """

    update_every: Any

    def __post_init__(self):
        _check_period(self.update_every)

    def init(self, view, phase):
        return optax.MaskedNode()

    def due(self, state, step):
        return step % self.update_every == 0

    def after(self, state, due, size, overlap):
        return state


class StaggeredState(NamedTuple):
    """State of `Staggered`, of one leaf.

    Attributes:
      left: steps to the next renewal, int32.
    """

    left: jax.Array


@dataclasses.dataclass(frozen=True)
class Staggered:
    """Each leaf every T steps, the leaves spread over the period by their cost.

    The step time stays flat where `Every` has one long step in T.

    Args:
      update_every: T.

    >>> import optax, lowrank_optax as lro
    >>> one_by_one = lro.Staggered(500)
    >>> tx = lro.project_gradients(optax.scale_by_adam(), rank=4, refresh=one_by_one)
    """

    update_every: Any

    def __post_init__(self):
        _check_period(self.update_every)

    def init(self, view, phase):
        offset = jnp.floor(phase * jnp.asarray(self.update_every, jnp.float32))
        return StaggeredState((self.update_every - offset).astype(jnp.int32))

    def due(self, state, step):
        return state.left <= 0

    def after(self, state, due, size, overlap):
        period = jnp.asarray(self.update_every, jnp.int32)
        return StaggeredState(jnp.where(state.left <= 0, period, state.left) - 1)


class ConvergenceState(NamedTuple):
    """State of `OnConvergence`, one scalar each a leaf.

    Attributes:
      age: steps since the last renewal, int32.
      average: of the projected gradient's norm; starts at the reference.
      reference: norm of the whole gradient at the last renewal.
    """

    age: jax.Array
    average: jax.Array
    reference: jax.Array


# Of the average; single norms of stochastic gradients cross any line by chance (AR-12).
_DECAY = 0.9


@dataclasses.dataclass(frozen=True)
class OnConvergence:
    """When the projected gradient has become small, within bounds: AdaRankGrad's rule.

    A leaf is due once an average of ``||P^T G||_F`` over the steps before is at most
    ``threshold`` times ``||G||_F`` of its last renewal (AR-11, AR-12), but not before
    ``min_interval`` steps (AR-9) and always after ``max_interval``. Norms that are not
    finite are left out; the steps count.

    Args:
      threshold: c, in [0, 1]; with 0 only ``max_interval`` counts.
      max_interval: the most steps from one renewal to the next.
      min_interval: the fewest, unless ``max_interval`` is below.

    >>> import optax, lowrank_optax as lro
    >>> tx = lro.project_gradients(
    ...     optax.scale_by_adam(), rank=4, refresh=lro.OnConvergence(0.5)
    ... )
    """

    threshold: Any
    max_interval: Any = 200
    min_interval: Any = 20
    requires: ClassVar[tuple[str, ...]] = (compatible.ORTHONORMAL, compatible.CHOSEN)

    def __post_init__(self):
        for name in ("max_interval", "min_interval"):
            _check_period(getattr(self, name), name)
        if isinstance(self.threshold, float) and not 0 <= self.threshold <= 1:
            raise ValueError(f"`threshold` must be in [0, 1], got {self.threshold}.")

    def init(self, view, phase):
        return ConvergenceState(jnp.zeros([], jnp.int32), jnp.zeros([]), jnp.zeros([]))

    def due(self, state, step):
        converged = state.average <= self.threshold * state.reference
        # Without a reference, as after gradients of zero, nothing has become small.
        converged &= (state.reference > 0) & (state.age >= self.min_interval)
        return converged | (state.age >= self.max_interval)

    def after(self, state, due, size, overlap):
        return ConvergenceState(
            age=jnp.where(due, 1, state.age + 1),
            average=jnp.where(due, size, self._average(state, size)),
            reference=jnp.where(due, size, state.reference),
        )

    def _average(self, state, size):
        return _DECAY * state.average + (1 - _DECAY) * size


class DriftState(NamedTuple):
    """State of `WhenDrifted`, of one leaf.

    Attributes:
      left: steps to the next renewal, int32.
      stretch: how many periods lie between two renewals, int32.
      recent: the last overlaps, negative where there is none yet.
    """

    left: jax.Array
    stretch: jax.Array
    recent: jax.Array


# Overlaps that are looked at, as in Q-GaLore's code.
_RECENT = 5


@dataclasses.dataclass(frozen=True)
class WhenDrifted:
    """Less and less often while the subspace hardly turns: Q-GaLore's lazy rule.

    At every renewal the overlap ``||new^T old||_F^2 / r`` of the subspaces is noted,
    which no sign or order of the vectors changes. When the mean of the last five
    reaches the threshold, the leaf's period doubles, and five new ones are awaited.

    Args:
      update_every: T, the period at the start.
      threshold: of the mean overlap; above 1 the period never changes.
      max_stretch: the period grows to at most so many times T.

    >>> import optax, lowrank_optax as lro
    >>> tx = lro.project_gradients(
    ...     optax.scale_by_adam(), rank=4, refresh=lro.WhenDrifted(200)
    ... )
    """

    update_every: Any
    threshold: Any = 0.4
    max_stretch: Any = 16
    requires: ClassVar[tuple[str, ...]] = (compatible.ORTHONORMAL, compatible.CHOSEN)

    def __post_init__(self):
        _check_period(self.update_every)
        if isinstance(self.max_stretch, int) and self.max_stretch < 1:
            raise ValueError(f"`max_stretch` must be at least 1: {self.max_stretch}.")

    def init(self, view, phase):
        # No mean over one of these is positive: five overlaps have to come in first.
        none = jnp.full([_RECENT], -float(_RECENT), jnp.float32)
        return DriftState(jnp.zeros([], jnp.int32), jnp.ones([], jnp.int32), none)

    def due(self, state, step):
        return state.left <= 0

    def after(self, state, due, size, overlap):
        compared = due & (overlap > 0)
        recent = jnp.append(state.recent[1:], overlap)
        recent = jnp.where(compared, recent, state.recent)
        steady = compared & (jnp.mean(recent) >= self.threshold)
        longer = jnp.minimum(2 * state.stretch, self.max_stretch).astype(jnp.int32)
        stretch = jnp.where(steady, longer, state.stretch)
        # No longer than can be counted.
        longest = jnp.maximum(np.iinfo(np.int32).max // self.update_every, 1)
        period = (jnp.minimum(stretch, longest) * self.update_every).astype(jnp.int32)
        return DriftState(
            left=jnp.where(due, period, state.left) - 1,
            stretch=stretch,
            recent=jnp.where(steady, -float(_RECENT), recent),
        )


def spread(costs: list[float]) -> list[np.float32]:
    """The phases of leaves of these costs: midpoints of their shares of all cost."""
    cost = np.array(costs, np.float64)
    total = max(cost.sum(), 1.0)
    return list(((np.cumsum(cost) - cost / 2) / total).astype(np.float32))
