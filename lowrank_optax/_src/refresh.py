"""When a basis is renewed."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax


def _check_period(update_every: Any) -> None:
    if isinstance(update_every, int) and update_every < 1:
        raise ValueError(f"`update_every` must be at least 1, got {update_every}.")


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

    def init(self, view):
        return optax.MaskedNode()

    def due(self, state, step, phase, size):
        return step % self.update_every == 0

    def after(self, state, due, size, overlap):
        return state


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

    def init(self, view):
        return optax.MaskedNode()

    def due(self, state, step, phase, size):
        offset = jnp.floor(phase * self.update_every).astype(step.dtype)
        return (step + offset) % self.update_every == 0

    def after(self, state, due, size, overlap):
        return state
