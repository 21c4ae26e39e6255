"""Fira (Chen et al. 2024): GaLore that keeps what the projection leaves out."""

import jax
import optax
from jax.typing import ArrayLike

from lowrank_optax._src.engines.project import project_gradients
from lowrank_optax._src.leaves.matrix import Matrices, Side
from lowrank_optax._src.methods.optimizer import Mask, optimizer
from lowrank_optax._src.parts.laws import Subspace, Transfer
from lowrank_optax._src.parts.recovery import FiraResidual
from lowrank_optax._src.parts.refresh import Every
from lowrank_optax._src.parts.subspace import TopSingular
from lowrank_optax._src.parts.transfer import Keep


def fira_project(
    inner: optax.GradientTransformation,
    *,
    rank: int,
    limiter: ArrayLike | None = 1.01,
    reference: tuple[ArrayLike, ArrayLike] | None = None,
    update_every: ArrayLike = 200,
    subspace: Subspace = TopSingular(),
    transfer: Transfer = Keep(),
    scale: ArrayLike = 1.0,
    side: Side = "short",
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Fira: GaLore's update, and the residual scaled as the inner optimizer scales.

    .. math::
      R = P^\top G,\quad N = \rho(R),\quad S = (I - P P^\top)\, G,\quad
      \phi_j = \frac{\lVert N_{:j} \rVert}{\lVert R_{:j} \rVert},\quad
      \Delta = s\, P N + \mathrm{limit}(S\, \mathrm{diag}(\phi))

    (Section 2.2 of the I3S paper.) The limiter lets the norm of the scaled residual
    grow by at most a factor from one step to the next. State of a matrix with an Adam
    inner: ``s r + 2 l r + 1`` numbers, one less without the limiter.

    Args:
      inner: such as ``optax.scale_by_adam()``.
      rank: r, the number of columns of a basis.
      limiter, reference: see `FiraResidual`.
      update_every: T; the first update always refreshes.
      subspace: which subspace; ``ImportanceSampled()`` makes this Fira-I3S.
      transfer: the papers keep the moments.
      scale: s, the papers' alpha; it does not scale the residual.
      side, matrices, key: see `project_gradients`.

    Returns:
      A transformation without a learning rate.

    Raises:
      ValueError: for a limiter below 1.

    Differs from the reference code in: the residual is that of the paper, which the
    code computes with alpha (``reference=(b1, b2)`` does so too); a zero gradient does
    not lock the limiter, to which a residual counts as 1.4e-3 of its gradient at least,
    see `FiraResidual`; what differs for `galore_project`.

    References:
      Chen et al., Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
      Constraint?, 2024.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = optax.chain(
    ...     lro.fira_project(optax.scale_by_adam(), rank=2, scale=0.25),
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
        transfer=transfer,
        recovery=FiraResidual(limiter, reference),
        scale=scale,
        side=side,
        matrices=matrices,
        key=key,
    )


def fira_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    limiter: ArrayLike | None = 1.01,
    reference: tuple[ArrayLike, ArrayLike] | None = None,
    update_every: ArrayLike = 200,
    subspace: Subspace = TopSingular(),
    transfer: Transfer = Keep(),
    scale: ArrayLike = 0.25,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    side: Side = "short",
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Fira with AdamW, see `fira_project`.

    Args:
      learning_rate: a float or a schedule.
      rank, update_every, scale: r, T and alpha; the papers pre-train LLaMA at rate 0.01
        with alpha 0.25 up to 350M parameters, 0.0625 beyond.
      b1, b2, eps: of Adam.
      limiter, reference, subspace, transfer: see `fira_project`.
      weight_decay: decoupled, on the full weights, times the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      side, matrices, key: see `project_gradients`.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.fira_adamw(1e-2, rank=2)
    >>> params = {"w": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    method = fira_project(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        rank=rank,
        update_every=update_every,
        limiter=limiter,
        reference=reference,
        subspace=subspace,
        transfer=transfer,
        scale=scale,
        side=side,
        matrices=matrices,
        key=key,
    )
    return optimizer(method, learning_rate, weight_decay, mask)
