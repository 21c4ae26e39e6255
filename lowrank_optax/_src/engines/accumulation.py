"""What gradient accumulation asks of an engine: the sum of what its optimizer sees."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._src.leaves.context import accumulating, averaging
from lowrank_optax._src.parts import compatible


class AccumulateState(NamedTuple):
    """In the state of `accumulate_gradients`, each projecting engine's.

    Attributes:
      count: gradients in the sum, int32.
      total: their sum, ``(*batch, r, n)`` at matrices and of the parameter's own
        shape elsewhere.
      inner_state: the engine's own, a `ProjectState`.
    """

    count: jax.Array
    total: Any
    inner_state: Any


def start(state: Any, proxies: Any) -> Any:
    """An engine's first state, with a sum beside it if gradients are accumulated."""
    if accumulating() is None:
        return state
    total = jax.tree.map(jnp.zeros_like, proxies)
    return AccumulateState(jnp.zeros([], jnp.int32), total, state)


def stepwise(engine: Any) -> Callable[..., Any]:
    """An engine's update, or the part of it that accumulation asks for.

    Args:
      engine: with ``update(updates, state, params, summed, **extra)``, and
        ``add(updates, state, first)`` for what the inner optimizer sees of a gradient.
    """

    def update(updates, state, params=None, **extra):
        phase = accumulating()
        if phase is None:
            return engine.update(updates, state, params, **extra)
        count, total, state = state
        if phase == "add":
            low, state = engine.add(updates, state, count == 0)
            total = jax.tree.map(
                lambda t, x: jnp.where(count == 0, x, t + x), total, low
            )
            return updates, AccumulateState(count + 1, total, state)
        mean = jax.tree.map(lambda t: t / jnp.maximum(count, 1), total)
        out, state = engine.update(updates, state, params, mean, **extra)
        zeros = jax.tree.map(jnp.zeros_like, total)
        return out, AccumulateState(jnp.zeros_like(count), zeros, state)

    return update


def check(recovery: Any) -> None:
    """Refuse a recovery that needs whole gradients, if those are never there."""
    need = compatible.COEFFICIENTS
    if accumulating() and need not in getattr(recovery, "provides", ()):
        raise refused(compatible.name(recovery), need)


def refused(other: str, need: str, remedy: str = "") -> ValueError:
    """The error of a wrapper around what needs more than projected gradients."""
    if (axes := averaging()) is not None:
        name = "average_gradients"
        remedy = remedy or f"Average whole gradients: jax.lax.pmean(grads, {axes})."
    else:
        name = "accumulate_gradients"
        remedy = remedy or (
            "Use optax.MultiSteps, which sums whole gradients, or average the "
            "gradients of the micro-batches before one update."
        )
    lacking = other if other.isidentifier() else "that"
    return compatible.cannot_use(name, other, name, need, lacking, remedy)
