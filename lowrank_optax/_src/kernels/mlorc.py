"""MLorc's sketches of both moments in two passes over the gradient.

The first pass makes ``G Omega`` and ``V Omega``, the second ``Y^T G`` and ``Y^T V``
from the sketches Y; both make the second moment V from its factors and G, tile by tile,
so that it is never stored. The update is left to XLA, which adds it to the weights in
the pass that makes it.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from lowrank_optax._src.kernels.dispatch import by_platform
from lowrank_optax._src.kernels.tiles import Pass, dot, product
from lowrank_optax._src.linalg import Lying
from lowrank_optax._src.linalg.products import OUTER_MAX_RANK, wide
from lowrank_optax._src.parts.factors import LowRankCode, clamp_negative
from lowrank_optax._src.parts.low_rank import LowRank


def suits(
    grad: Array, codecs: Sequence[LowRank], omegas: Sequence[Array | None]
) -> bool:
    """Whether the passes apply: one product with each moment, then one with its sketch.

    Args:
      grad: of which they are, in any order.
      codecs, omegas: of each moment, and what they drew.
    """
    return wide(grad.dtype) == jnp.float32 and all(
        codec.rank <= OUTER_MAX_RANK and codec.power_iters == 0 and omega is not None
        for codec, omega in zip(codecs, omegas, strict=True)
    )


def adam_pass(
    product: str,
    both: tuple[Lying, Lying],
    second: LowRankCode,
    given: tuple[ArrayLike, Array, Array],
    thin: Sequence[Array],
) -> list[Array]:
    """Products of G and V with a thin matrix each, in a pass over G.

    Args:
      product: "sketch" or "project", see `Lying`.
      both: G and V; the latter for what is compiled without kernels.
      second: the old code of V.
      given: b2, `negative_mean` and the most that G may add to an entry of V.
      thin: what they are multiplied with.
    """
    (grad, _), (b2, zeta, most) = both, given
    over = {"sketch": SKETCHES, "project": PROJECTIONS}[product]
    # Back in the leaf's dtype: XLA cancels both casts, and moves what the leaf holds.
    # 1 - 0.999 has four digits in float32, if 0.999 is rounded to it before.
    source = grad.matrix.astype(grad.dtype), *second, zeta, b2, 1 - b2, most

    def run(*on):
        return over(*on, *source, *thin, turned=grad.turned)

    def plain():
        return [getattr(x, product)(y) for x, y in zip(both, thin, strict=True)]

    return by_platform(run, plain)


def mlorc_sketches(g, left, right, zeta, b2, fresh, most, mu_omega, nu_omega):
    """A tile's part of ``G Omega`` and ``V Omega``."""
    g = g.astype(jnp.float32)
    v = _second_moment(g, left, right, zeta, b2, fresh, most)
    return dot(g, mu_omega, (1, 1)), dot(v, nu_omega, (1, 1))


def mlorc_projections(g, left, right, zeta, b2, fresh, most, mu_y, nu_y):
    """A tile's part of ``Y^T G`` and ``Y^T V``."""
    g = g.astype(jnp.float32)
    v = _second_moment(g, left, right, zeta, b2, fresh, most)
    return dot(mu_y, g, (0, 0)), dot(nu_y, v, (0, 0))


def _second_moment(g, left, right, zeta, b2, fresh, most):
    added = jnp.minimum(fresh * g * g, most)
    return b2 * clamp_negative(product(left, right), zeta) + added


_V = ("mn", "mr", "rn", "11", "11", "11", "11")
SKETCHES = Pass(mlorc_sketches, ins=(*_V, "ln", "ln"), outs=("ml", "ml"), over="n")
PROJECTIONS = Pass(
    mlorc_projections, ins=(*_V, "ml", "ml"), outs=("ln", "ln"), over="m"
)
