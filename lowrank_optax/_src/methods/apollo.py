"""APOLLO (Zhu et al. 2025): gradients scaled by what Adam does in a random subspace."""

import jax
import optax
from jax.typing import ArrayLike

from lowrank_optax._src.engines.project import project_gradients
from lowrank_optax._src.leaves.matrix import Matrices, Side
from lowrank_optax._src.methods.optimizer import Mask, optimizer
from lowrank_optax._src.parts.laws import Subspace
from lowrank_optax._src.parts.recovery import Per, ScaleGradient
from lowrank_optax._src.parts.refresh import Every
from lowrank_optax._src.parts.subspace import RandomGaussian


def apollo_scale(
    inner: optax.GradientTransformation,
    *,
    rank: int,
    per: Per = "channel",
    limiter: ArrayLike | None = 1.01,
    update_every: ArrayLike = 200,
    subspace: Subspace = RandomGaussian(),
    scale: ArrayLike = 1.0,
    side: Side = "short",
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""APOLLO: the full gradient, each channel scaled as its projection is.

    .. math::
      P_{ij} \sim \mathcal N(0, 1/r) \text{ every } T \text{ steps},\quad
      R = P^\top G,\quad N = \rho(R),\quad
      \phi_j = \frac{\lVert N_{:j} \rVert}{\lVert R_{:j} \rVert},\quad
      \Delta = s\, \mathrm{limit}(G\, \mathrm{diag}(\phi))

    The update has full rank; the subspace serves only to estimate the factors, so a
    small rank does. With ``per="tensor"`` there is one factor a matrix, the ratio of
    the Frobenius norms: APOLLO-Mini at rank 1. The moments are kept when the projection
    is drawn anew: as its columns are not orthonormal, a rotation would inflate them.

    State of a matrix with an Adam inner: ``2 l r + 1`` numbers, one less without the
    limiter, l its longer side, and the step of the last drawing: the projection itself
    is drawn again from the seed at every step.

    Args:
      inner: such as ``optax.scale_by_adam()``.
      rank: r, the number of columns of a basis.
      per: a factor for each "channel" (index of the side that is not projected), or for
        the "tensor".
      limiter: the factor by which the norm of the scaled gradient may grow from one
        step to the next; None for none.
      update_every: T; the first update always draws.
      subspace: the projection; ``TopSingular()`` is the paper's variant with SVD.
      scale: s, of the updates. Their factors are about ``sqrt(r / m)`` of those of
        full-rank Adam, m the projected side, so ``sqrt(m / r)`` makes up for it. The
        paper's alpha stands under a root: s = 1 for APOLLO, ``128 ** 0.5`` for
        APOLLO-Mini.
      side, matrices, key: see `project_gradients`.

    Returns:
      A transformation without a learning rate.

    Raises:
      ValueError: for a limiter below 1 or an unknown ``per``.

    Differs from the reference code in: only the seed is kept of the projection, as the
    paper says; the limiter acts after Adam's bias correction, and a zero gradient does
    not lock it; epsilon is Optax's.

    References:
      Zhu et al., APOLLO: SGD-like Memory, AdamW-level Performance, MLSys 2025.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = optax.chain(
    ...     lro.apollo_scale(optax.scale_by_adam(), rank=2),
    ...     optax.scale_by_learning_rate(1e-2),
    ... )
    >>> params = {"w": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    return project_gradients(
        inner,
        rank=rank,
        subspace=subspace,
        refresh=Every(update_every),
        recovery=ScaleGradient(per, limiter),
        scale=scale,
        side=side,
        matrices=matrices,
        key=key,
    )


def apollo_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 256,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    per: Per = "channel",
    limiter: ArrayLike | None = 1.01,
    update_every: ArrayLike = 200,
    subspace: Subspace = RandomGaussian(),
    scale: ArrayLike = 1.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    side: Side = "short",
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW scaled in APOLLO's subspace, see `apollo_scale`.

    APOLLO-Mini is ``apollo_adamw(1e-2, rank=1, scale=128**0.5, per="tensor")``.

    Args:
      learning_rate: a float or a schedule; the paper pre-trains LLaMA at 0.01.
      rank, update_every, scale: r (a quarter of the width in the paper), T and s.
      b1, b2, eps: of Adam.
      per, limiter, subspace: see `apollo_scale`.
      weight_decay: decoupled, on the full weights, times the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      side, matrices, key: see `project_gradients`.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.apollo_adamw(1e-2, rank=1, scale=128**0.5, per="tensor")
    >>> params = {"w": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    method = apollo_scale(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        rank=rank,
        update_every=update_every,
        per=per,
        limiter=limiter,
        subspace=subspace,
        scale=scale,
        side=side,
        matrices=matrices,
        key=key,
    )
    return optimizer(method, learning_rate, weight_decay, mask)
