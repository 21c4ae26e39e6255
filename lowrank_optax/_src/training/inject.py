"""Hyperparameters as state, with everything that decides shapes left static."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import optax

from lowrank_optax._src.leaves.box import transformation

# Arguments of this library's factories that decide shapes or choose parts.
_STATIC = frozenset(
    "rank max_rank min_rank leading num_heads bits block every oversample power_iters "
    "warm_start compress fields side matrices key mask subspace transfer recovery "
    "refresh inner codecs dense rule error_feedback reference "
    "density".split()
)


def inject_hyperparams(
    factory: Callable[..., optax.GradientTransformation],
    static_args: str | Iterable[str] = (),
) -> Callable[..., optax.GradientTransformation]:
    """`optax.inject_hyperparams` that knows which of our arguments must stay static.

    Ranks, sides, parts (`TopSingular`, ...) and keys decide shapes or structure;
    numbers such as ``learning_rate``, ``scale`` or ``update_every`` become part of the
    state and may be schedules.

    Args:
      factory: such as ``lro.galore_adamw``.
      static_args: names of further arguments to keep out of the state.

    Returns:
      A factory with the same arguments, whose state has ``hyperparams``, a dictionary.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.inject_hyperparams(lro.galore_adamw)(learning_rate=1e-2, rank=2)
    >>> state = tx.init({"w": jnp.ones((4, 6))})
    >>> float(state.hyperparams["learning_rate"])
    0.009999999776482582
    """
    own = {static_args} if isinstance(static_args, str) else set(static_args)
    names = inspect.signature(factory).parameters
    static = own | {n for n, p in names.items() if n in _STATIC or _is_part(p.default)}
    injected = optax.inject_hyperparams(factory, static_args=tuple(sorted(static)))

    @functools.wraps(factory)
    def make(*args, **kwargs):
        # On a mesh of explicit axes, hyperparameters must come in from outside too.
        tx = injected(*args, **kwargs)
        return transformation(tx.init, tx.update)

    return make


def _is_part(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)
