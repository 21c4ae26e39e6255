"""ReLoRA: adapters merged into the frozen weights, again and again.

Each merge leaves the function as it is and lets the next update of rank r point
elsewhere, so that their sum is of high rank (Lialin et al. 2023). All of it is an
optimizer, for a model with `LoRALinear` modules. The short full-rank training that the
paper begins with is not part of it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from examples.common.adapters import draw_a, freeze, is_adapter, merged_kernel

_WARMUP = 10  # the part of a period, one in so many steps, that the rate rises again


class RestartState(NamedTuple):
    """How many updates there were, and the state that is made anew."""

    step: jax.Array
    inner: Any


class MergeState(NamedTuple):
    """How many updates there were."""

    step: jax.Array


def relora_adamw(
    learning_rate: optax.ScalarOrSchedule,
    every: int,
    *,
    weight_decay: float = 0.0,
    dense_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformation:
    """AdamW that merges the adapters after every so many steps.

    At a merge `W0` takes up `s A B`, `A` is drawn again and `B` zero, their moments are
    forgotten, and the learning rate rises from zero again. Embeddings, norms and head
    keep their moments.

    Args:
      learning_rate: a number or a schedule; the restarts are made on top of it.
      every: steps between two merges, at least 1.
      weight_decay: decoupled, of everything trained.
      dense_learning_rate: of embeddings, norms and head; None for the same.
    """

    def descent(
        learning_rate: optax.ScalarOrSchedule,
    ) -> optax.GradientTransformation:
        return optax.chain(
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(rewarmed(learning_rate, every)),
        )

    restarted = restart(optax.scale_by_adam(), every)

    def label(params: Any) -> Any:
        return jax.tree.map(lambda x: "adapter" if x else "other", is_adapter(params))

    return optax.chain(
        freeze(
            optax.chain(
                optax.partition(
                    {"adapter": restarted, "other": optax.scale_by_adam()}, label
                ),
                lro.two_rates(descent)(
                    learning_rate, dense_learning_rate=dense_learning_rate
                ),
            )
        ),
        merge_every(every),
    )


def rewarmed(learning_rate: optax.ScalarOrSchedule, every: int) -> optax.Schedule:
    """The schedule with a linear warm-up over the first tenth of every period but the
    first, whose warm-up is the schedule's own."""
    rising = max(1, every // _WARMUP)

    def schedule(step: Any) -> Any:
        rate = learning_rate(step) if callable(learning_rate) else learning_rate
        risen = jnp.minimum(1.0, (step % every + 1) / (rising + 1))
        return rate * jnp.where(step < every, 1.0, risen)

    return schedule


def restart(
    inner: optax.GradientTransformation, every: int
) -> optax.GradientTransformation:
    """The transformation with its state made anew after every so many updates."""

    def init(params: Any) -> RestartState:
        return RestartState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None):
        updates, old = inner.update(updates, state.inner, params)
        step = state.step + 1
        kept = jax.tree.map(
            lambda new, old: jnp.where(step % every == 0, new, old),
            inner.init(params),
            old,
        )
        return updates, RestartState(step, kept)

    return optax.GradientTransformation(init, update)


def merge_every(every: int, key: int = 0) -> optax.GradientTransformation:
    """Adds a merge to every so many updates; stands last, where these are final."""

    def init(params: Any) -> MergeState:
        del params
        return MergeState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None):
        step = state.step + 1
        draw = jax.random.fold_in(jax.random.key(key), step)

        def merged(updates: Any) -> Any:
            trained = optax.apply_updates(params, updates)
            return optax.tree.sub(merge_adapters(trained, draw), params)

        updates = jax.lax.cond(step % every == 0, merged, lambda x: x, updates)
        return updates, MergeState(step)

    return optax.GradientTransformation(init, update)


def merge_adapters(params: Any, key: jax.Array) -> Any:
    """The parameters with every adapter merged, its `A` drawn again and `B` zero.

    Args:
      params: a tree of dicts, as `nnx.to_pure_dict` makes it.
      key: what `A` is drawn from.
    """
    if not isinstance(params, dict):
        return params
    if "frozen" in params:
        a, b = params["lora"]["lora_a"], params["lora"]["lora_b"]
        return params | {
            "frozen": merged_kernel(params["frozen"], a, b),
            "lora": {
                "lora_a": draw_a(key, a.shape, a.dtype),
                "lora_b": jnp.zeros_like(b),
            },
        }
    return {
        name: merge_adapters(params[name], jax.random.fold_in(key, index))
        for index, name in enumerate(sorted(params))
    }
