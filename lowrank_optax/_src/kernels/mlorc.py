"""MLorc's update in passes over the gradient: it is read twice, no moment is formed.

The first pass makes the update and the sketches ``G Omega`` and ``V Omega``, the second
``Y^T G`` and ``Y^T V`` from the sketches Y; both make V from its factors and G, tile by
tile.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._src import linalg
from lowrank_optax._src.engines import batching
from lowrank_optax._src.engines.accept import tree_where
from lowrank_optax._src.kernels.tiles import Pass, dot, product
from lowrank_optax._src.parts.low_rank import Average, LowRank, Whole, clamp_negative

Array = jax.Array


def suits(grad: Array, *sketches: tuple[LowRank, Array | None]) -> bool:
    """Whether the passes apply: one product with each moment, then one with its sketch.

    Args:
      grad: (*batch, m, n).
      sketches: the codec and what it drew, of each moment.
    """
    return jnp.promote_types(grad.dtype, jnp.float32) == jnp.float32 and all(
        codec.power_iters == 0
        and omega is not None
        and omega.shape[-1] < min(grad.shape[-2:])
        for codec, omega in sketches
    )


def adam(
    rule: Any, step: Array, grad: Array, state: Any, zeta: Array, *omegas: Array
) -> batching.Steps:
    """`MLorcAdam.update` from where its sketches are drawn."""
    t, (mu, nu) = step + 1, state
    b1, b2, eps = rule.b1, rule.b2, rule.eps
    source = grad, nu.left, nu.right, zeta, b2
    wide = [omega.mT for omega in omegas]  # whose rows are short on TPU otherwise
    rest = *mu, *wide, b1, eps, 1 - b1**t, 1 - b2**t
    update, g_omega, v_omega = ADAM(*source, *rest, turned=rule.turned)
    average = Average(b1, mu, grad)
    mu_y, _ = average.sketch(omegas[0], g_omega)
    nu_y, _ = linalg.near_one(v_omega)
    mu_z, nu_z = ADAM_SKETCHES(*source, mu_y, nu_y, turned=rule.turned)
    (mu, mu_finite), (nu, nu_finite) = yield from batching.together(
        batching.ask(Average.best_code, mu_y, mu.right, *average.project(mu_y, mu_z)),
        batching.ask(Whole.best_code, nu_y, nu.right, nu_z),
    )
    finite = jnp.all(mu_finite & nu_finite)
    return update, tree_where(finite, type(state)(mu, nu), state)


def mlorc_adam(g, nu_left, nu_right, zeta, b2, left, right, *rest):
    """A tile of the update, and its part of ``G Omega`` and ``V Omega``."""
    mu_omega, nu_omega, b1, eps, c1, c2 = rest
    g32 = g.astype(jnp.float32)
    v = _second_moment(g32, nu_left, nu_right, zeta, b2)
    m = b1 * product(left, right) + (1 - b1) * g32
    update = (m / c1) / (jnp.sqrt(v / c2) + eps)
    return update.astype(g.dtype), dot(g32, mu_omega, (1, 1)), dot(v, nu_omega, (1, 1))


def mlorc_adam_sketches(g, nu_left, nu_right, zeta, b2, mu_y, nu_y):
    """A tile's part of ``Y^T G`` and ``Y^T V``."""
    g32 = g.astype(jnp.float32)
    v = _second_moment(g32, nu_left, nu_right, zeta, b2)
    return dot(mu_y, g32, (0, 0)), dot(nu_y, v, (0, 0))


def _second_moment(g, left, right, zeta, b2):
    return b2 * clamp_negative(product(left, right), zeta) + (1 - b2) * g * g


def lion(rule: Any, grad: Array, state: Any, omega: Array) -> batching.Steps:
    """`MLorcLion.update` from where its sketch is drawn."""
    (mu,) = state
    source = grad, *mu, omega.mT, rule.b1
    update, g_omega = LION(*source, turned=rule.turned)
    average = Average(rule.b2, mu, grad)
    y, _ = average.sketch(omega, g_omega)
    (z,) = LION_SKETCH(grad, y, turned=rule.turned)
    parts = average.project(y, z)
    mu, finite = yield from batching.ask(Average.best_code, y, mu.right, *parts)
    return update, tree_where(jnp.all(finite), type(state)(mu), state)


def mlorc_lion(g, left, right, omega, b1):
    """A tile of the update, and its part of ``G Omega``."""
    g32 = g.astype(jnp.float32)
    c = b1 * product(left, right) + (1 - b1) * g32
    # Not `jnp.sign`, whose lowering for TPU asks the device at hand what it is.
    sign = jnp.where(c > 0, 1.0, jnp.where(c < 0, -1.0, c))
    return sign.astype(g.dtype), dot(g32, omega, (1, 1))


def mlorc_lion_sketch(g, y):
    """A tile's part of ``Y^T G``."""
    return (dot(y, g.astype(jnp.float32), (0, 0)),)


_V = ("mn", "mr", "rn", "11", "11")
ADAM = Pass(
    mlorc_adam,
    ins=(*_V, "mr", "rn", "ln", "ln", *["11"] * 4),
    outs=("mn", "ml", "ml"),
    over="n",
)
ADAM_SKETCHES = Pass(
    mlorc_adam_sketches, ins=(*_V, "ml", "ml"), outs=("ln", "ln"), over="m"
)
LION = Pass(mlorc_lion, ins=("mn", "mr", "rn", "ln", "11"), outs=("mn", "ml"), over="n")
LION_SKETCH = Pass(mlorc_lion_sketch, ins=("mn", "ml"), outs=("ln",), over="m")
