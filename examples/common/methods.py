"""The methods an example can be asked for by name: how it trains, and what."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import optax

import lowrank_optax as lro
from examples.common.adapters import (
    DoRALinear,
    FactorizedLinear,
    LoRALinear,
    LowRankLinear,
    freeze,
)
from examples.common.relora import relora_adamw


def matrices(params: Any) -> Any:
    """Which parameters are matrices: those of the library's rule, and stacks of them.

    Where all layers are held as one, each kernel has a leading axis, and what has two
    axes are vectors.
    """

    def axes(path: Any, by_rule: Any) -> Any:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if not any(a == "layers" and not b.isdigit() for a, b in pairwise(names)):
            return by_rule
        return lro.MatrixAxes() if names[-1] == "kernel" else None

    def is_spec(x: Any) -> bool:
        return x is None or isinstance(x, lro.MatrixAxes)

    rule = lro.default_matrices(params)
    return jax.tree_util.tree_map_with_path(axes, rule, is_leaf=is_spec)


@dataclass(frozen=True)
class Method:
    """How to build one optimizer, with defaults that suit a model of a few million.

    Attributes:
      build: called with a learning rate (float or schedule), a rank, the steps
        between two choices of the subspace and a weight decay; the ones a method has
        no use for it ignores.
      learning_rate: the peak rate where none is given.
      rank: the rank where none is given; None for methods that have no rank.
      needs: what else `build` is given, by name: `heads`, those of queries and of keys;
        `steps`, of the whole run.
      linear: what takes the place of the layers' linear maps, at the rank; None where
        the model is trained as it is.
    """

    build: Callable[..., optax.GradientTransformation]
    learning_rate: float
    rank: int | None = None
    needs: tuple[str, ...] = ()
    linear: Callable[..., LowRankLinear] | None = None


METHODS = {
    "adamw": Method(
        lambda lr, rank, every, decay: optax.adamw(lr, weight_decay=decay), 3e-3
    ),
    "galore_adamw": Method(
        lambda lr, rank, every, decay: lro.galore_adamw(
            lr, rank=rank, update_every=every, weight_decay=decay, matrices=matrices
        ),
        1e-2,
        rank=32,
    ),
    "galore_adafactor": Method(
        lambda lr, rank, every, decay: lro.galore_adafactor(
            lr, rank=rank, update_every=every, weight_decay=decay, matrices=matrices
        ),
        1e-2,
        rank=32,
    ),
    "mlorc_adamw": Method(
        lambda lr, rank, every, decay: lro.mlorc_adamw(
            lr, rank=rank, weight_decay=decay, matrices=matrices
        ),
        3e-3,
        rank=4,
    ),
    "mlorc_lion": Method(
        lambda lr, rank, every, decay: lro.mlorc_lion(
            lr, rank=rank, weight_decay=decay, matrices=matrices
        ),
        1e-3,
        rank=4,
    ),
    "fira_adamw": Method(
        lambda lr, rank, every, decay: lro.fira_adamw(
            lr, rank=rank, update_every=every, weight_decay=decay, matrices=matrices
        ),
        1e-2,
        rank=32,
    ),
    "i3s_adamw": Method(
        lambda lr, rank, every, decay: lro.i3s_adamw(
            lr, rank=rank, update_every=every, weight_decay=decay, matrices=matrices
        ),
        1e-2,
        rank=32,
    ),
    "fira_i3s_adamw": Method(
        lambda lr, rank, every, decay: lro.fira_adamw(
            lr,
            rank=rank,
            update_every=every,
            weight_decay=decay,
            subspace=lro.ImportanceSampled(),
            matrices=matrices,
        ),
        1e-2,
        rank=32,
    ),
    "golore_adamw": Method(
        lambda lr, rank, every, decay, steps: lro.golore_adamw(
            lr,
            switch_step=int(0.8 * steps),  # the paper's
            rank=rank,
            update_every=every,
            scale=0.25,
            weight_decay=decay,
            matrices=matrices,
        ),
        1e-2,
        rank=32,
        needs=("steps",),
    ),
    "ldadamw": Method(
        lambda lr, rank, every, decay: lro.ldadamw(
            lr, rank=rank, weight_decay=decay, matrices=matrices
        ),
        3e-3,
        rank=32,
    ),
    "adamw_8bit": Method(
        lambda lr, rank, every, decay: lro.adamw_8bit(lr, weight_decay=decay), 3e-3
    ),
    "galore_adamw_8bit": Method(
        lambda lr, rank, every, decay: lro.galore_adamw_8bit(
            lr, rank=rank, update_every=every, weight_decay=decay, matrices=matrices
        ),
        1e-2,
        rank=32,
    ),
    "adarankgrad_adamw": Method(
        lambda lr, rank, every, decay: lro.adarankgrad_adamw(
            lr, max_rank=rank, max_interval=every, weight_decay=decay, matrices=matrices
        ),
        1e-2,
        rank=32,
    ),
    "adarankgrad_adamw_8bit": Method(
        lambda lr, rank, every, decay: lro.adarankgrad_adamw_8bit(
            lr, max_rank=rank, max_interval=every, weight_decay=decay
        ),
        1e-2,
        rank=32,
    ),
    "apollo_adamw": Method(
        lambda lr, rank, every, decay: lro.apollo_adamw(
            lr, rank=rank, update_every=every, weight_decay=decay, matrices=matrices
        ),
        1e-2,
        rank=32,
    ),
    "apollo_mini_adamw": Method(
        lambda lr, rank, every, decay: lro.apollo_adamw(
            lr,
            rank=rank,
            update_every=every,
            scale=128**0.5,
            weight_decay=decay,
            per="tensor",
            matrices=matrices,
        ),
        1e-2,
        rank=1,
    ),
    "flora": Method(
        lambda lr, rank, every, decay: lro.flora(
            lr, rank=rank, update_every=every, weight_decay=decay, matrices=matrices
        ),
        1e-2,
        rank=32,
    ),
    "galore_plus_adamw": Method(
        lambda lr, rank, every, decay, heads: lro.galore_plus_adamw(
            lr,
            rank=rank,
            update_every=every,
            weight_decay=decay,
            num_heads=heads,
            matrices=matrices,
        ),
        1e-2,
        rank=32,
        needs=("heads",),
    ),
    "q_galore_adamw_8bit": Method(
        lambda lr, rank, every, decay: lro.q_galore_adamw_8bit(
            lr, rank=rank, update_every=every, weight_decay=decay, matrices=matrices
        ),
        1e-2,
        rank=32,
    ),
    "adam_mini": Method(
        lambda lr, rank, every, decay: lro.adam_mini(lr, weight_decay=decay), 3e-3
    ),
    "galore_adam_mini": Method(
        lambda lr, rank, every, decay: lro.galore_adam_mini(
            lr, rank=rank, update_every=every, weight_decay=decay, matrices=matrices
        ),
        1e-2,
        rank=32,
    ),
    "lora": Method(
        lambda lr, rank, every, decay: freeze(optax.adamw(lr, weight_decay=decay)),
        3e-3,
        rank=32,
        linear=LoRALinear,
    ),
    "dora": Method(
        lambda lr, rank, every, decay: freeze(optax.adamw(lr, weight_decay=decay)),
        3e-3,
        rank=32,
        linear=DoRALinear,
    ),
    "relora": Method(
        lambda lr, rank, every, decay: relora_adamw(lr, every, weight_decay=decay),
        3e-3,
        rank=32,
        linear=LoRALinear,
    ),
    "factorized": Method(
        lambda lr, rank, every, decay: optax.adamw(lr, weight_decay=decay),
        3e-3,
        rank=32,
        linear=FactorizedLinear,
    ),
}


def check_methods(
    names: tuple[str, ...], rank: int | None, layerwise: bool = False
) -> None:
    """Refuses what cannot be built, before anything is.

    Raises:
      ValueError: no name, an unknown or repeated one, a rank below 1; for per-layer
        updates, one that puts adapters into the model.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ValueError(
            f"Unknown method {', '.join(map(repr, unknown))}: choose from"
            f" {', '.join(METHODS)}."
        )
    if not names or len(set(names)) < len(names):
        raise ValueError("Name at least one method, and each at most once.")
    if rank is not None and rank < 1:
        raise ValueError(f"Cannot train at rank {rank}: the rank must be at least 1.")
    adapted = [name for name in names if METHODS[name].linear]
    if layerwise and adapted:
        raise ValueError(
            f"Cannot train {adapted[0]} layerwise: its layers are not the model's."
            " Choose optimizers as methods, or leave --layerwise out."
        )


def matrix_state_bytes(tx: optax.GradientTransformation, params: Any) -> int:
    """The part of the optimizer's state that belongs to the matrices.

    Args:
      tx: the optimizer.
      params: the parameters, or their shapes.
    """

    def keep(leaf: Any, view: Any) -> Any:
        return None if view is None else leaf

    return lro.state_bytes(tx, jax.tree.map(keep, params, matrices(params)))
