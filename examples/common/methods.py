"""The methods an example can be asked for by name: how it trains, and what."""

import inspect
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
        between two choices of the subspace and a weight decay; and by name with
        `heads`, those of queries and of keys, `steps` of the whole run, and `dense`,
        another rate for embeddings, head, biases and norms, or None. It ignores what
        the method has no use for.
      learning_rate: the peak rate where none is given, of the matrices.
      dense_learning_rate: that of all other leaves.
      rank: the rank where none is given; None for methods that have no rank.
      linear: what takes the place of the layers' linear maps, at the rank; None where
        the model is trained as it is.
      adapters_only: whether fine-tuning leaves all but these as it is.
    """

    build: Callable[..., optax.GradientTransformation]
    learning_rate: float
    dense_learning_rate: float
    rank: int | None = None
    linear: Callable[..., LowRankLinear] | None = None
    adapters_only: bool = False

    def rank_of(self, asked: int | None) -> int | None:
        """The rank that is asked for, or its own; None if it has none."""
        return self.rank if self.rank is None or asked is None else asked


def optimizer(
    factory: Callable[..., optax.GradientTransformation], **fixed: Any
) -> Callable[..., optax.GradientTransformation]:
    """`Method.build` of a whole optimizer of this library, or of Optax.

    Args:
      factory: such as `lro.galore_adamw`.
      fixed: arguments that are always the same.
    """

    def build(
        learning_rate: optax.ScalarOrSchedule,
        rank: int | None,
        every: int,
        decay: float,
        dense: optax.ScalarOrSchedule | None = None,
        heads: Any = None,
        steps: int | None = None,
    ) -> optax.GradientTransformation:
        made, rates = factory, {"learning_rate": learning_rate}
        if dense is not None:
            made, rates = lro.two_rates(factory), rates | {"dense_learning_rate": dense}
        known = {
            **dict.fromkeys(("rank", "max_rank"), rank),
            **dict.fromkeys(("update_every", "max_interval"), every),
            "weight_decay": decay,
            "matrices": matrices,
        }
        taken = inspect.signature(made).parameters
        return made(**rates, **{k: x for k, x in known.items() if k in taken}, **fixed)

    return build


def _golore(*given: Any, steps: int, **more: Any) -> optax.GradientTransformation:
    switch = int(0.8 * steps)  # the paper's
    return optimizer(lro.golore_adamw, switch_step=switch, scale=0.25)(*given, **more)


def _galore_plus(*given: Any, heads: Any, **more: Any) -> optax.GradientTransformation:
    return optimizer(lro.galore_plus_adamw, num_heads=heads)(*given, **more)


def galore_plus_adamw_8bit(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    num_heads: int | tuple[int, int] | None,
    density: float,
    update_every: int,
    weight_decay: optax.ScalarOrSchedule,
    matrices: Any,
) -> optax.GradientTransformation:
    """GaLore+ with the moments of its Adam in bytes, as the paper trains."""
    method = lro.galore_plus_project(
        optax.scale_by_adam(),
        rank=rank,
        num_heads=num_heads,
        density=density,
        update_every=update_every,
        scale=0.25,
        matrices=matrices,
    )
    return optax.chain(
        lro.quantize_state(method),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _galore_plus_8bit(density: float) -> Callable[..., optax.GradientTransformation]:
    """With so large a share of the entries in the residual."""

    def build(*given: Any, heads: Any, **more: Any) -> optax.GradientTransformation:
        fixed = {"num_heads": heads, "density": density}
        return optimizer(galore_plus_adamw_8bit, **fixed)(*given, **more)

    return build


def _hybrid(
    rate: optax.ScalarOrSchedule, rank: int, *given: Any, **more: Any
) -> optax.GradientTransformation:
    """Half of the basis leads, the paper naming no r0 for its runs."""
    fixed = {"subspace": lro.Hybrid(rank // 2), "transfer": lro.Rotate()}
    return optimizer(lro.galore_adamw, **fixed)(rate, rank, *given, **more)


def _fixed_interval(
    rate: optax.ScalarOrSchedule, rank: int, every: int, *given: Any, **more: Any
) -> optax.GradientTransformation:
    build = optimizer(lro.adarankgrad_adamw, min_interval=every)
    return build(rate, rank, every, *given, **more)


def _fixed_rank(
    rate: optax.ScalarOrSchedule, rank: int, *given: Any, **more: Any
) -> optax.GradientTransformation:
    build = optimizer(lro.adarankgrad_adamw, min_rank=rank)
    return build(rate, rank, *given, **more)


def _adam_mini(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float
) -> optax.GradientTransformation:
    """Without `matrices`, by which Adam-mini would choose other blocks."""
    return lro.adam_mini(learning_rate, weight_decay=weight_decay)


def _adapters(
    factory: Callable[..., optax.GradientTransformation],
) -> Callable[..., optax.GradientTransformation]:
    """`Method.build` of an optimizer that leaves frozen kernels as they are."""

    def build(*given: Any, **more: Any) -> optax.GradientTransformation:
        return freeze(optimizer(factory)(*given, **more))

    return build


def _relora(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None,
    every: int,
    decay: float,
    dense: optax.ScalarOrSchedule | None = None,
    heads: Any = None,
    steps: int | None = None,
) -> optax.GradientTransformation:
    return relora_adamw(
        learning_rate, every, weight_decay=decay, dense_learning_rate=dense
    )


# As tuned in benchmarks/records/comparison.md, on a model of a million parameters at
# rank 32; of variants those of the method, and of adapters by coarse searches.
_DENSE, _DENSE_OF_SIGNS = 6e-2, 8e-3
# Of what is projected: a quarter of it is the step.
_LOW = 1.6e-2

METHODS = {
    "adamw": Method(optimizer(optax.adamw), 2e-3, _DENSE),
    "lion": Method(optimizer(optax.lion), 1e-3, _DENSE_OF_SIGNS),
    "galore_adamw": Method(optimizer(lro.galore_adamw), _LOW, _DENSE, 32),
    "galore_adafactor": Method(optimizer(lro.galore_adafactor), _LOW, _DENSE, 32),
    "mlorc_adamw": Method(optimizer(lro.mlorc_adamw), 2e-3, _DENSE, 4),
    "mlorc_lion": Method(optimizer(lro.mlorc_lion), 1e-3, _DENSE_OF_SIGNS, 4),
    "fira_adamw": Method(optimizer(lro.fira_adamw), _LOW, _DENSE, 32),
    "i3s_adamw": Method(optimizer(lro.i3s_adamw), _LOW, _DENSE, 32),
    "fira_i3s_adamw": Method(
        optimizer(lro.fira_adamw, subspace=lro.ImportanceSampled()),
        _LOW,
        _DENSE,
        32,
    ),
    "golore_adamw": Method(_golore, _LOW, _DENSE, 32),
    "ldadamw": Method(optimizer(lro.ldadamw), 4e-3, _DENSE, 32),
    "adamw_8bit": Method(optimizer(lro.adamw_8bit), 2e-3, _DENSE),
    "galore_adamw_8bit": Method(optimizer(lro.galore_adamw_8bit), _LOW, _DENSE, 32),
    "adarankgrad_adamw": Method(optimizer(lro.adarankgrad_adamw), _LOW, _DENSE, 32),
    "adarankgrad_adamw_8bit": Method(
        optimizer(lro.adarankgrad_adamw_8bit), _LOW, _DENSE, 32
    ),
    "apollo_adamw": Method(optimizer(lro.apollo_adamw), _LOW, _DENSE, 32),
    "apollo_mini_adamw": Method(
        optimizer(lro.apollo_adamw, scale=128**0.5, per="tensor"), 8e-3, _DENSE, 1
    ),
    "flora": Method(optimizer(lro.flora), 5e-4, _DENSE, 32),
    "galore_plus_adamw": Method(_galore_plus, _LOW, _DENSE, 32),
    "q_galore_adamw_8bit": Method(optimizer(lro.q_galore_adamw_8bit), _LOW, _DENSE, 32),
    "adam_mini": Method(optimizer(_adam_mini), 2e-3, _DENSE),
    "galore_adam_mini": Method(optimizer(lro.galore_adam_mini), _LOW, _DENSE, 32),
    "lora": Method(_adapters(optax.adamw), 3e-3, _DENSE, 32, LoRALinear, True),
    "lora_lion": Method(
        _adapters(optax.lion), 1e-3, _DENSE_OF_SIGNS, 32, LoRALinear, True
    ),
    "dora": Method(_adapters(optax.adamw), 3e-3, _DENSE, 32, DoRALinear, True),
    "relora": Method(_relora, 3e-3, _DENSE, 32, linear=LoRALinear),
    "factorized": Method(
        optimizer(optax.adamw), 3e-3, _DENSE, 32, linear=FactorizedLinear
    ),
    # What the papers take a method apart by. MLorc, Table 7: one moment is compressed.
    "mlorc_m": Method(optimizer(lro.mlorc_adamw, compress=("mu",)), 2e-3, _DENSE, 4),
    "mlorc_v": Method(optimizer(lro.mlorc_adamw, compress=("nu",)), 2e-3, _DENSE, 4),
    # I3S, Table 1: around other optimizers than Adam.
    "i3s_adafactor": Method(
        optimizer(lro.galore_adafactor, subspace=lro.ImportanceSampled()),
        _LOW,
        _DENSE,
        32,
    ),
    "i3s_adam_mini": Method(
        optimizer(lro.galore_adam_mini, subspace=lro.ImportanceSampled()),
        _LOW,
        _DENSE,
        32,
    ),
    "i3s_adamw_8bit": Method(
        optimizer(lro.galore_adamw_8bit, subspace=lro.ImportanceSampled()),
        _LOW,
        _DENSE,
        32,
    ),
    # I3S, Algorithm 3 and Figures 5 and 6: other draws of the subspace.
    "hybrid_adamw": Method(_hybrid, _LOW, _DENSE, 32),
    "uniform_adamw": Method(
        optimizer(lro.galore_adamw, subspace=lro.UniformSampled()),
        _LOW,
        _DENSE,
        32,
    ),
    "random_adamw": Method(
        optimizer(lro.golore_adamw, switch_step=0, scale=0.25), _LOW, _DENSE, 32
    ),
    # MLorc as its code has it, whose sketch is new at every step.
    "mlorc_as_published": Method(
        optimizer(lro.mlorc_adamw, oversample=0, power_iters=1, warm_start=False),
        2e-3,
        _DENSE,
        32,
    ),
    # GaLore+, Tables 1 to 8: in 8 bits, and the share of entries in the residual.
    "galore_plus_adamw_8bit": Method(_galore_plus_8bit(0.012), _LOW, _DENSE, 32),
    "galore_plus_8bit_0.0": Method(_galore_plus_8bit(0.0), _LOW, _DENSE, 32),
    "galore_plus_8bit_0.6": Method(_galore_plus_8bit(0.006), _LOW, _DENSE, 32),
    "galore_plus_8bit_1.8": Method(_galore_plus_8bit(0.018), _LOW, _DENSE, 32),
    # AdaRankGrad with less of the gradient than by default: the paper's threshold, read
    # as one of norms. Its Tables 5 and 6, where only the rank adapts, or the interval.
    "adarankgrad_0.23": Method(
        optimizer(lro.adarankgrad_adamw, max_residual_energy=0.23), 3.2e-2, _DENSE, 32
    ),
    "adarankgrad_fixed_interval": Method(_fixed_interval, _LOW, _DENSE, 32),
    "adarankgrad_fixed_rank": Method(_fixed_rank, _LOW, _DENSE, 32),
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


def check_rates(learning_rate: float | None, dense_learning_rate: float | None) -> None:
    """Raises ValueError for a rate that is not above 0, by name."""
    rates = {"learning_rate": learning_rate, "dense_learning_rate": dense_learning_rate}
    for name, rate in rates.items():
        if rate is not None and not rate > 0:
            raise ValueError(f"{name} must be above 0, not {rate}")


def matrix_state_bytes(tx: optax.GradientTransformation, params: Any) -> int:
    """The part of the optimizer's state that belongs to the matrices.

    Args:
      tx: the optimizer.
      params: the parameters, or their shapes.
    """

    def keep(leaf: Any, view: Any) -> Any:
        return None if view is None else leaf

    return lro.state_bytes(tx, jax.tree.map(keep, params, matrices(params)))
