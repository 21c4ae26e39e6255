"""The optimizers that are counted: every public method, and others to compare with."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import optax

import lowrank_optax as lro
from benchmarks.accelerators.counting import Rule

_LR = 1e-3
_HEADS = {"60m": 8}  # of all others 32
_STACKED = "7b-stacked"


@dataclass(frozen=True)
class Case:
    """An optimizer.

    Attributes:
      factory: what makes it, of a learning rate and `options`.
      options: its arguments by name, at the papers' ranks for models of these widths.
      own: whether it is one of this library's.
      rule: which conditionals are refreshes, see `counting`.
      loops: whether loops of unknown length may count once.
      flat: whether it only knows matrices, and no stacks of them.
    """

    factory: Callable[..., optax.GradientTransformation]
    options: dict[str, Any] = field(default_factory=dict)
    own: bool = True
    rule: Rule = "marked"
    loops: bool = False
    flat: bool = False

    def build(self, shapes: str) -> optax.GradientTransformation:
        """The optimizer for parameters of some shapes, see `programs`."""
        known = inspect.signature(self.factory).parameters
        options = dict(self.options)
        if "num_heads" in known:
            heads = _HEADS.get(shapes, 32)
            options["num_heads"] = (heads, heads)
        if shapes == _STACKED and "matrices" in known and self.own:
            options["matrices"] = lro.MatrixAxes()
        return self.factory(_LR, **options)

    def fits(self, shapes: str) -> bool:
        return not (self.flat and shapes == _STACKED)


def _peer(factory: Callable[..., optax.GradientTransformation], **more: Any) -> Case:
    return Case(factory, own=False, **more)


def _galore(learning_rate: float, **options: Any) -> optax.GradientTransformation:
    """GaLore with a part of another method, and Adam."""
    method = lro.project_gradients(optax.scale_by_adam(), scale=0.25, **options)
    return optax.chain(method, optax.scale_by_learning_rate(learning_rate))


def _staggered(
    learning_rate: float, rank: int, matrices: lro.MatrixAxes | None = None
) -> optax.GradientTransformation:
    parts = {"subspace": lro.TopSingular(), "refresh": lro.Staggered(200)}
    return _galore(learning_rate, rank=rank, matrices=matrices, **parts)


def _adafactor(
    learning_rate: float, matrices: lro.MatrixAxes | None = None
) -> optax.GradientTransformation:
    scale = optax.scale_by_learning_rate(learning_rate)
    return optax.chain(lro.scale_by_adafactor(matrices=matrices), scale)


_R = {"rank": 128}
_MOST = {"max_rank": 128}

CASES: dict[str, Case] = {
    "optax.adamw": _peer(optax.adamw),
    "optax.lion": _peer(optax.lion),
    "optax.contrib.galore": Case(
        optax.contrib.galore, _R, own=False, rule="all", loops=True, flat=True
    ),
    "optax.contrib.muon": _peer(optax.contrib.muon, loops=True, flat=True),
    "adam_mini": Case(lro.adam_mini),
    "adamw_8bit": Case(lro.adamw_8bit),
    "adarankgrad_adamw": Case(lro.adarankgrad_adamw, _MOST),
    "adarankgrad_adamw_8bit": Case(lro.adarankgrad_adamw_8bit, _MOST),
    "apollo_adamw": Case(lro.apollo_adamw, _R),
    "apollo_mini_adamw": Case(
        lro.apollo_adamw, {"rank": 1, "scale": 128**0.5, "per": "tensor"}
    ),
    "fira_adamw": Case(lro.fira_adamw, _R),
    "fira_i3s_adamw": Case(lro.fira_adamw, _R | {"subspace": lro.ImportanceSampled()}),
    "flora": Case(lro.flora, _R),
    "galore_adafactor": Case(lro.galore_adafactor, _R),
    "galore_adam_mini": Case(lro.galore_adam_mini, _R),
    "galore_adamw": Case(lro.galore_adamw, _R),
    "galore_adamw_8bit": Case(lro.galore_adamw_8bit, _R),
    "galore_plus_adamw": Case(lro.galore_plus_adamw, _R),
    "galore_staggered": Case(_staggered, _R),
    "golore_adamw": Case(lro.golore_adamw, _R | {"switch_step": 8000}),
    "i3s_adamw": Case(lro.i3s_adamw, _R),
    "ldadamw": Case(lro.ldadamw, _R),
    "mlorc_adamw": Case(lro.mlorc_adamw, {"rank": 4}),
    "mlorc_lion": Case(lro.mlorc_lion, {"rank": 4}),
    "q_galore_adamw_8bit": Case(lro.q_galore_adamw_8bit, _R),
    "scale_by_adafactor": Case(_adafactor),
}
