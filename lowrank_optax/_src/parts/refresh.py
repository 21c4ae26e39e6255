"""When a basis is renewed."""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax._src.parts import compatible
from lowrank_optax._src.parts.checks import (
    check_choice,
    check_number,
    check_range,
)


def _check_period(period: Any, name: str = "update_every") -> None:
    check_number(period, name)
    check_range(period, name, 1)


@dataclasses.dataclass(frozen=True)
class Every:
    """Every leaf at steps 0, T, 2T, ..., as the papers have it.

    Args:
      update_every: T, in steps.

    >>> import optax, lowrank_optax as lro
    >>> every = lro.Every(500)
    >>> tx = lro.project_gradients(optax.scale_by_adam(), rank=4, refresh=every)
    """

    update_every: Any
    in_step: ClassVar[bool] = True

    def __post_init__(self):
        _check_period(self.update_every)

    def init(self, view, phase):
        return optax.MaskedNode()

    def due(self, state, step):
        return step % self.update_every == 0

    def after(self, state, due, seen):
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
      update_every: T, in steps.

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

    def after(self, state, due, seen):
        period = jnp.asarray(self.update_every, jnp.int32)
        return StaggeredState(jnp.where(state.left <= 0, period, state.left) - 1)


class ConvergenceState(NamedTuple):
    """State of `OnConvergence`, one number each a matrix.

    Attributes:
      age: steps since the last renewal, int32.
      average: of what is judged, see there.
      reference: what it is compared with; zero where nothing has been seen.
    """

    age: jax.Array
    average: jax.Array
    reference: jax.Array


Measure = Literal["share", "norm"]

# Of the average; single norms of stochastic gradients cross any line by chance (AR-12).
_DECAY = 0.9


@dataclasses.dataclass(frozen=True)
class OnConvergence:
    """When a basis has lost the gradient, within bounds: AdaRankGrad's rule.

    Each matrix of a stack by itself, once what is judged has become small, but not
    before ``min_interval`` steps (AR-9) and always after ``max_interval``.

    * The "share": an average of ``||P^T G||_F^2 / ||G||_F^2 - r / m`` has fallen to
      ``threshold`` times its mean over the first ``min_interval`` gradients after the
      renewal. Of noise without a direction, any basis of r columns has r / m.
    * The "norm", as the paper has it: an average of ``||P^T G||_F`` is at most
      ``threshold`` times ``||G||_F`` of the renewal (AR-11, AR-12). That gradient is
      captured as no other batch's is, and small batches meet this almost at once.

    Gradients of zero and norms that are not finite are left out; the steps count.

    Args:
      threshold: c, in [0, 1]; with 0 only ``max_interval`` counts.
      max_interval: the most steps from one renewal to the next.
      min_interval: the fewest, unless ``max_interval`` is below.
      measure: what is judged. The share reads the gradient once more at each step.

    >>> import optax, lowrank_optax as lro
    >>> tx = lro.project_gradients(
    ...     optax.scale_by_adam(), rank=4, refresh=lro.OnConvergence(0.5)
    ... )
    """

    threshold: Any = 0.5
    max_interval: Any = 200
    min_interval: Any = 20
    measure: Measure = "share"
    requires: ClassVar[tuple[str, ...]] = (compatible.ORTHONORMAL, compatible.CHOSEN)

    def __post_init__(self):
        for name in ("max_interval", "min_interval"):
            _check_period(getattr(self, name), name)
        check_range(self.threshold, "threshold", 0, 1)
        check_choice(self.measure, "measure", Measure)

    def init(self, view, phase):
        # Each with memory of its own, so that the state can be donated.
        return ConvergenceState(
            *(view.zeros(dtype=kind) for kind in (jnp.int32, jnp.float32, jnp.float32))
        )

    def due(self, state, step):
        converged = state.average <= self.threshold * jnp.maximum(state.reference, 0)
        # Without a reference, as after gradients of zero, nothing has become small.
        converged &= (state.reference != 0) & (state.age >= self.min_interval)
        # With zero only the longest interval counts, whatever the basis has.
        converged &= jnp.asarray(self.threshold) > 0
        return converged | (state.age >= self.max_interval)

    def after(self, state, due, seen):
        age = jnp.where(due, 1, state.age + 1)
        judge = self._share if self.measure == "share" else self._norm
        average, reference = judge(state, due, seen)
        return ConvergenceState(
            age, average.astype(jnp.float32), reference.astype(jnp.float32)
        )

    def _share(self, state, due, seen):
        there = seen.whole > 0
        share = (seen.size / jnp.where(there, seen.whole, 1.0)) ** 2 - seen.chance
        weight = jnp.maximum(1 / jnp.maximum(state.age, 1), 1 - _DECAY)
        average = state.average + weight * (share - state.average)
        average = jnp.where(there, average, state.average)
        early = state.age <= self.min_interval
        reference = jnp.where(early, average, state.reference)
        return jnp.where(due, 0.0, average), jnp.where(due, 0.0, reference)

    def _norm(self, state, due, seen):
        average = _DECAY * state.average + (1 - _DECAY) * seen.size
        return (
            jnp.where(due, seen.whole, average),
            jnp.where(due, seen.whole, state.reference),
        )


class DriftState(NamedTuple):
    """State of `WhenDrifted`.

    Attributes:
      left: (*batch,), steps to the next renewal, int32.
      stretch: (*batch,), how many periods lie between two renewals, int32.
      recent: (*batch, 5), the last overlaps, negative where there is none yet.
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
    reaches the threshold, the matrix' period doubles, and five new ones are awaited.
    Each matrix of a stack has a period of its own.

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
        check_range(self.max_stretch, "max_stretch", 1)

    def init(self, view, phase):
        return DriftState(
            view.zeros(dtype=jnp.int32),
            view.full(jnp.ones, dtype=jnp.int32),
            view.full(_none_yet, _RECENT, dtype=jnp.float32),
        )

    def due(self, state, step):
        return state.left <= 0

    def after(self, state, due, seen):
        compared = due & (seen.overlap > 0)
        recent = jnp.append(state.recent[..., 1:], seen.overlap[..., None], axis=-1)
        recent = jnp.where(compared[..., None], recent, state.recent)
        steady = compared & (jnp.mean(recent, axis=-1) >= self.threshold)
        longer = jnp.minimum(2 * state.stretch, self.max_stretch).astype(jnp.int32)
        stretch = jnp.where(steady, longer, state.stretch)
        # No longer than can be counted.
        longest = jnp.maximum(np.iinfo(np.int32).max // self.update_every, 1)
        period = (jnp.minimum(stretch, longest) * self.update_every).astype(jnp.int32)
        return DriftState(
            left=jnp.where(due, period, state.left) - 1,
            stretch=stretch,
            recent=jnp.where(steady[..., None], -float(_RECENT), recent),
        )


def _none_yet(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """No mean over one of these is positive: five overlaps have to come in first."""
    return jnp.full(shape, -float(_RECENT), dtype)


def phases(costs: list[float]) -> list[np.float32]:
    """The phases of leaves of these costs: midpoints of their shares of all cost."""
    cost = np.array(costs, np.float64)
    total = max(cost.sum(), 1.0)
    return list(((np.cumsum(cost) - cost / 2) / total).astype(np.float32))
