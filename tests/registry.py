"""Every public transformation, with arguments fit for matrices of a few rows.

The tests of `test_common.py` run over `METHODS`; `test_public_api.py` fails where a
public factory is not in it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from running import random_like

import lowrank_optax as lro

RANK = 2
PERIOD = 3  # between refreshes, so that a few steps see more than one


@dataclasses.dataclass(frozen=True)
class Method:
    """A public factory with arguments.

    Attributes:
      name: unique; the factory's public name, and what tells it from its siblings.
      factory: the public function.
      kwargs: all of its arguments, by name.
      moments: names of the state fields that have an entry for each parameter.
      dense: the optimizer that a leaf which is not a matrix must get.
      elementwise: whether matrices get it too, as long as they are small.
    """

    name: str
    factory: Callable[..., optax.GradientTransformation]
    kwargs: dict[str, Any]
    moments: tuple[str, ...]
    dense: optax.GradientTransformation
    elementwise: bool = False

    def make(self, **changes) -> optax.GradientTransformationExtraArgs:
        return self.factory(**self.kwargs | changes)

    @functools.cached_property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        """One instance for all tests, so that they share its compiled bodies."""
        return self.make()

    @property
    def is_optimizer(self) -> bool:
        """Whether it ends in a learning rate: its updates are for adding."""
        return "learning_rate" in self.kwargs

    @property
    def is_alias(self) -> bool:
        """Whether it is a chain of a transformation that is tried by itself."""
        return self.is_optimizer and self.name != "two_rates"

    @property
    def public(self) -> Callable[..., Any]:
        """The public function of its name: the factory, or what made it."""
        return getattr(lro, self.name.partition("-")[0])

    def descend(self, updates: Any, size: float = 1.0) -> Any:
        """Its updates as what is added to parameters."""
        return (
            updates if self.is_optimizer else jax.tree.map(lambda u: -size * u, updates)
        )


class Momentum(NamedTuple):
    trace: jax.Array


@dataclasses.dataclass(frozen=True)
class SignOfMomentum:
    """A rule that needs no more than `leafwise` promises."""

    decay: float = 0.9

    def init(self, view):
        return Momentum(view.zeros("m", "n"))

    def update(self, key, step, grad, state):
        trace = self.decay * state.trace + grad
        return jnp.sign(trace), Momentum(trace)


# Optax factors a matrix only from 128 on.
_FACTORED = optax.scale_by_factored_rms(min_dim_size_to_factor=1)
_ADAFACTOR = optax.chain(_FACTORED, optax.clip_by_block_rms(1.0))


def _flora(learning_rate, b1):
    """Leaves that are not matrices keep the momentum as it is."""
    return optax.chain(
        _FACTORED,
        optax.ema(b1, debias=False),
        optax.scale_by_learning_rate(learning_rate),
    )


_ADAM = optax.scale_by_adam()
_MLORC_ADAM = optax.scale_by_adam(b1=0.8)
_GALORE = dict(rank=RANK, update_every=PERIOD)
# Inside of others; and the same for matrices at which it saves nothing.
GALORE = lro.galore_project(_ADAM, **_GALORE)
GALORE_OF_ALL = lro.galore_project(_ADAM, matrices=lro.MatrixAxes(), **_GALORE)

METHODS = [
    Method(
        "project_gradients",
        lro.project_gradients,
        dict(
            inner=_ADAM,
            rank=RANK,
            subspace=lro.TopSingular("gram_eigh"),
            refresh=lro.Staggered(PERIOD),
            transfer=lro.Rotate(),
            side="long",
        ),
        ("mu", "nu"),
        _ADAM,
    ),
    Method(
        "compress_state",
        lro.compress_state,
        dict(inner=_ADAM, codecs={"mu": lro.LowRank(RANK)}),
        ("mu", "nu"),
        _ADAM,
    ),
    Method(
        "leafwise",
        lro.leafwise,
        dict(rule=SignOfMomentum(), dense=optax.trace(0.9)),
        ("trace",),
        optax.trace(0.9),
    ),
    Method(
        "galore_project",
        lro.galore_project,
        dict(inner=_ADAM, **_GALORE),
        ("mu", "nu"),
        _ADAM,
    ),
    Method(
        "galore_project-trace",
        lro.galore_project,
        dict(inner=optax.trace(0.9), transfer=lro.Reset(), **_GALORE),
        ("trace",),
        optax.trace(0.9),
    ),
    Method(
        "mlorc_scale_by_adam",
        lro.mlorc_scale_by_adam,
        dict(rank=RANK),
        ("mu", "nu"),
        _MLORC_ADAM,
    ),
    Method(
        "mlorc_scale_by_adam-mu",
        lro.mlorc_scale_by_adam,
        dict(rank=RANK, compress=("mu",)),
        ("mu", "nu"),
        _MLORC_ADAM,
    ),
    Method(
        "mlorc_scale_by_adam-nu",
        lro.mlorc_scale_by_adam,
        dict(rank=RANK, compress=("nu",)),
        ("mu", "nu"),
        _MLORC_ADAM,
    ),
    Method(
        "mlorc_scale_by_lion",
        lro.mlorc_scale_by_lion,
        dict(rank=RANK),
        ("mu",),
        optax.scale_by_lion(),
    ),
    Method(
        "mlorc_compress",
        lro.mlorc_compress,
        dict(inner=optax.trace(0.9), rank=RANK),
        ("trace",),
        optax.trace(0.9),
    ),
    Method(
        "galore_adamw",
        lro.galore_adamw,
        dict(learning_rate=0.02, scale=1.0, **_GALORE),
        ("mu", "nu"),
        optax.adam(0.02),
    ),
    Method(
        "galore_adafactor",
        lro.galore_adafactor,
        dict(learning_rate=0.02, scale=1.0, **_GALORE),
        ("v_row", "v_col", "v"),
        optax.chain(_ADAFACTOR, optax.scale_by_learning_rate(0.02)),
    ),
    Method(
        "mlorc_adamw",
        lro.mlorc_adamw,
        dict(learning_rate=0.02, rank=RANK),
        ("mu", "nu"),
        optax.adam(0.02, b1=0.8),
    ),
    Method(
        "mlorc_lion",
        lro.mlorc_lion,
        dict(learning_rate=0.02, rank=RANK),
        ("mu",),
        optax.chain(optax.scale_by_lion(), optax.scale_by_learning_rate(0.02)),
    ),
    Method(
        "fira_project",
        lro.fira_project,
        dict(inner=_ADAM, **_GALORE),
        ("mu", "nu"),
        _ADAM,
    ),
    Method(
        "fira_project-reference",
        lro.fira_project,
        dict(inner=_ADAM, reference=(0.9, 0.999), scale=0.5, **_GALORE),
        ("mu", "nu"),
        _ADAM,
    ),
    Method(
        "fira_adamw",
        lro.fira_adamw,
        dict(learning_rate=0.02, scale=1.0, **_GALORE),
        ("mu", "nu"),
        optax.adam(0.02),
    ),
    Method(
        "i3s_subspace",
        lro.i3s_subspace,
        dict(inner=_ADAM, **_GALORE),
        ("mu", "nu"),
        _ADAM,
    ),
    Method(
        "i3s_subspace-fira",
        lro.i3s_subspace,
        dict(inner=_ADAM, recovery=lro.FiraResidual(None), **_GALORE),
        ("mu", "nu"),
        _ADAM,
    ),
    Method(
        "hybrid_subspace",
        lro.hybrid_subspace,
        dict(inner=optax.trace(0.9), leading=1, **_GALORE),
        ("trace",),
        optax.trace(0.9),
    ),
    Method(
        "i3s_adamw",
        lro.i3s_adamw,
        dict(learning_rate=0.02, scale=1.0, **_GALORE),
        ("mu", "nu"),
        optax.adam(0.02),
    ),
    Method(
        "golore_project",
        lro.golore_project,
        dict(inner=_ADAM, switch_step=4, **_GALORE),
        ("mu", "nu"),
        _ADAM,
    ),
    Method(
        "golore_adamw",
        lro.golore_adamw,
        dict(learning_rate=0.02, switch_step=4, **_GALORE),
        ("mu", "nu"),
        optax.adam(0.02),
    ),
    Method(
        "scale_by_ldadam",
        lro.scale_by_ldadam,
        dict(rank=RANK),
        ("mu", "nu", "basis", "error"),
        optax.scale_by_adam(b1=0.908, b2=0.99),
    ),
    Method(
        "scale_by_ldadam-without-error",
        lro.scale_by_ldadam,
        dict(rank=RANK, error_feedback=False),
        ("mu", "nu", "basis"),
        optax.scale_by_adam(b1=0.908, b2=0.99),
    ),
    Method(
        "ldadamw",
        lro.ldadamw,
        dict(learning_rate=0.02, rank=RANK),
        ("mu", "nu"),
        optax.adam(0.02, b1=0.908, b2=0.99),
    ),
    Method(
        "quantize_state",
        lro.quantize_state,
        dict(inner=GALORE),
        ("mu", "nu"),
        _ADAM,
    ),
    Method(
        "galore_adamw_8bit",
        lro.galore_adamw_8bit,
        dict(learning_rate=0.02, scale=1.0, **_GALORE),
        ("mu", "nu"),
        optax.adam(0.02),
    ),
    Method(
        "adamw_8bit",
        lro.adamw_8bit,
        dict(learning_rate=0.02),
        ("mu", "nu"),
        optax.adam(0.02),
        elementwise=True,
    ),
    Method(
        "adaptive_rank",
        lro.adaptive_rank,
        dict(inner=_ADAM, max_rank=RANK, max_interval=PERIOD),
        ("mu", "nu"),
        _ADAM,
    ),
    Method(
        "adarankgrad_adamw",
        lro.adarankgrad_adamw,
        dict(learning_rate=0.02, max_rank=RANK, scale=1.0, max_interval=PERIOD),
        ("mu", "nu"),
        optax.adam(0.02),
    ),
    Method(
        "adarankgrad_adamw_8bit",
        lro.adarankgrad_adamw_8bit,
        dict(learning_rate=0.02, max_rank=RANK, scale=1.0, max_interval=PERIOD),
        ("mu", "nu"),
        optax.adam(0.02),
    ),
    Method(
        "apollo_scale",
        lro.apollo_scale,
        # Factors from one or two random numbers jump at each refresh, and a limit of 1%
        # a step would hold the largest back for the rest of a short test.
        dict(inner=_ADAM, limiter=None, **_GALORE),
        ("mu", "nu"),
        _ADAM,
    ),
    Method(
        "apollo_adamw",
        lro.apollo_adamw,
        dict(learning_rate=0.02, **_GALORE),
        ("mu", "nu"),
        optax.adam(0.02),
    ),
    Method(
        "apollo_adamw-mini",
        lro.apollo_adamw,
        dict(learning_rate=0.02, rank=1, update_every=PERIOD, scale=2.0, per="tensor"),
        ("mu", "nu"),
        optax.adam(0.02),
    ),
    # A short momentum: with a period of a few steps, a long one drowns in the noise of
    # the projections.
    Method(
        "flora_project",
        lro.flora_project,
        dict(inner=optax.trace(0.5), **_GALORE),
        ("trace",),
        optax.trace(0.5),
    ),
    Method(
        "flora",
        lro.flora,
        # Unclipped, as a clip is not linear in the scale.
        dict(learning_rate=0.02, b1=0.5, clipping_threshold=None, **_GALORE),
        ("v_row", "v_col", "v", "ema"),
        _flora(0.02, 0.5),
    ),
    Method(
        "galore_plus_project",
        lro.galore_plus_project,
        dict(inner=_ADAM, num_heads=2, warmup=2, **_GALORE),
        ("mu", "nu"),
        _ADAM,
    ),
    Method(
        "galore_plus_adamw",
        lro.galore_plus_adamw,
        dict(learning_rate=0.02, scale=1.0, num_heads=2, **_GALORE),
        ("mu", "nu"),
        optax.adam(0.02),
    ),
    Method(
        "q_galore_project",
        lro.q_galore_project,
        dict(inner=_ADAM, threshold=2.0, **_GALORE),
        ("mu", "nu"),
        _ADAM,
    ),
    Method(
        "q_galore_adamw_8bit",
        lro.q_galore_adamw_8bit,
        dict(learning_rate=0.02, scale=1.0, **_GALORE),
        ("mu", "nu"),
        optax.adam(0.02),
    ),
    # A window of one gradient: longer ones are looked at in test_accumulate.py.
    Method(
        "accumulate_gradients",
        lro.accumulate_gradients,
        dict(tx=GALORE, every=1),
        ("mu", "nu", "total"),
        _ADAM,
    ),
    # Over no axis: over the devices of a mesh, see test_average.py.
    Method(
        "average_gradients",
        lro.average_gradients,
        dict(tx=GALORE, axis_name=()),
        ("mu", "nu"),
        _ADAM,
    ),
    Method(
        "scale_by_adafactor",
        lro.scale_by_adafactor,
        dict(decay_rate=0.8),
        ("v_row", "v_col", "v"),
        _ADAFACTOR,
        elementwise=True,
    ),
    # Every leaf is treated alike here: what embeddings and vectors get is compared with
    # formulas in test_adam_mini.py.
    Method(
        "scale_by_adam_mini",
        lro.scale_by_adam_mini,
        dict(b1=0.9),
        ("mu", "nu"),
        lro.scale_by_adam_mini(),
        elementwise=True,
    ),
    Method(
        "adam_mini",
        lro.adam_mini,
        dict(learning_rate=0.02),
        ("mu", "nu"),
        lro.adam_mini(0.02),
        elementwise=True,
    ),
    Method(
        "galore_adam_mini",
        lro.galore_adam_mini,
        dict(learning_rate=0.02, scale=1.0, **_GALORE),
        ("mu", "nu"),
        lro.adam_mini(0.02),
    ),
    Method(
        "two_rates",
        lro.two_rates(lro.galore_adamw),
        dict(learning_rate=0.02, dense_learning_rate=0.03, scale=1.0, **_GALORE),
        ("mu", "nu"),
        optax.adam(0.03),
    ),
]


def example_params(dtype: Any = jnp.float32) -> Any:
    """A tall and a wide matrix, a vector and an embedding."""
    shapes = {
        "up": {"kernel": (4, 6), "bias": (6,)},
        "down": {"kernel": (6, 4)},
        "embed": {"table": (5, 4)},
    }
    return random_like(shapes, seed=0, dtype=dtype)


def one_of_each() -> Any:
    """A matrix, a vector and an embedding: where it is the wrapper that is tried."""
    params = example_params()
    return {"up": params["up"], "embed": params["embed"]}
