"""I3S (Zhang et al. 2025): importance sampling of the subspace."""

import jax
import optax
from jax.typing import ArrayLike

from lowrank_optax._src.engines.project import project_gradients
from lowrank_optax._src.leaves.matrix import Matrices, Side
from lowrank_optax._src.methods.optimizer import Mask, optimizer
from lowrank_optax._src.parts.checks import check_rank
from lowrank_optax._src.parts.laws import Recovery, Transfer
from lowrank_optax._src.parts.recovery import Drop
from lowrank_optax._src.parts.refresh import Every
from lowrank_optax._src.parts.subspace import Hybrid, ImportanceSampled
from lowrank_optax._src.parts.transfer import Keep, Rotate


def i3s_subspace(
    inner: optax.GradientTransformation,
    *,
    rank: int,
    update_every: ArrayLike = 200,
    transfer: Transfer = Keep(),
    recovery: Recovery = Drop(),
    scale: ArrayLike = 1.0,
    side: Side = "short",
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""GaLore in a subspace that is sampled, Algorithms 1 and 2 of I3S.

    .. math::
      U \Sigma V^\top = G,\quad
      \Pr(i_1, \dots, i_r) = \prod_{k=1}^{r}
        \frac{\omega_{i_k}}{1 - \omega_{i_1} - \dots - \omega_{i_{k-1}}},\quad
      \omega_i = \frac{\sigma_i}{\sum_j \sigma_j},\quad
      P \leftarrow U_{:,\mathrm{sort}(i)}

    every T steps; between, and with P, as `galore_project` (equation 1) or, with
    ``recovery=FiraResidual()``, as `fira_project`. The same state as these.

    Args:
      inner: such as ``optax.scale_by_adam()``, ``lro.scale_by_adafactor()``.
      rank: r, the number of columns of a basis.
      update_every: T; the first update always refreshes (I3-1).
      transfer: the paper keeps the moments (I3-2); `Rotate` carries them to the new
        basis, which differs from the old one far more than GaLore's does.
      recovery: `FiraResidual` makes this Fira-I3S.
      scale: s, the papers' alpha.
      side, matrices, key: see `project_gradients`.

    Returns:
      A transformation without a learning rate.

    Differs from the paper in: the singular vectors come from the smaller Gram matrix,
    among all min(m, n) of them (I3-3); Adam corrects its bias (I3-13). Cheaper, and
    approximate: ``ImportanceSampled(pool=...)`` in `project_gradients`.

    References:
      Zhang et al., I3S: Importance Sampling Subspace Selection for Low-Rank
      Optimization in LLM Pretraining, 2025.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = optax.chain(
    ...     lro.i3s_subspace(optax.scale_by_adam(), rank=2, scale=0.25),
    ...     optax.scale_by_learning_rate(1e-2),
    ... )
    >>> params = {"w": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    return project_gradients(
        inner,
        rank=rank,
        subspace=ImportanceSampled(),
        refresh=Every(update_every),
        transfer=transfer,
        recovery=recovery,
        scale=scale,
        side=side,
        matrices=matrices,
        key=key,
    )


def hybrid_subspace(
    inner: optax.GradientTransformation,
    *,
    rank: int,
    leading: int,
    update_every: ArrayLike = 200,
    transfer: Transfer = Rotate(),
    scale: ArrayLike = 1.0,
    side: Side = "short",
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Leading singular vectors and uniformly drawn ones, Algorithm 3 of I3S.

    .. math::
      P_{:,:r_0} \leftarrow U_{:,:r_0},\quad
      P_{:,r_0:} \leftarrow \mathrm{Unif}(U_{:,r_0:},\, r - r_0),\quad
      M \leftarrow P^\top P_{\mathrm{old}} M

    every T steps. Around ``optax.ema(b1, debias=False)`` it is the low-rank momentum
    SGD of Algorithm 4, which the paper's theorem is about. With 0 leading vectors it is
    uniform sampling, whose loss spikes (Figure 5); with r, GaLore.

    Args:
      inner: such as ``optax.ema(0.9, debias=False)``.
      rank: r, the number of columns of a basis.
      leading: r0, at most r.
      update_every: T; the first update always refreshes (I3-1).
      transfer: the paper projects the momentum (line 6).
      scale: s, a factor of the updates of matrices.
      side, matrices, key: see `project_gradients`.

    Returns:
      A transformation without a learning rate.

    Raises:
      ValueError: for ``leading`` below 0 or above the rank.

    Differs from the paper in: ``b1`` weighs the old momentum, as in Algorithm 4; the
    theorem has it at the new gradient (I3-7). Second moments, which the paper has none
    of, are transformed with the squares of the coefficients.

    References:
      Zhang et al., I3S: Importance Sampling Subspace Selection for Low-Rank
      Optimization in LLM Pretraining, 2025.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = lro.hybrid_subspace(optax.ema(0.9, debias=False), rank=3, leading=1)
    >>> params = {"w": jnp.ones((6, 8))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    if leading > check_rank(rank):
        raise ValueError(f"`leading` must be at most the rank {rank}, got {leading}.")
    return project_gradients(
        inner,
        rank=rank,
        subspace=Hybrid(leading),
        refresh=Every(update_every),
        transfer=transfer,
        scale=scale,
        side=side,
        matrices=matrices,
        key=key,
    )


def i3s_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    update_every: ArrayLike = 200,
    transfer: Transfer = Keep(),
    recovery: Recovery = Drop(),
    scale: ArrayLike = 0.25,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    side: Side = "short",
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW in a sampled subspace, see `i3s_subspace`.

    Args:
      learning_rate: a float or a schedule.
      rank, update_every, scale: r, T and alpha, as in `galore_adamw`.
      b1, b2, eps: of Adam.
      weight_decay: decoupled, on the full weights, times the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      transfer, recovery: see `i3s_subspace`.
      side, matrices, key: see `project_gradients`.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.i3s_adamw(1e-2, rank=2, recovery=lro.FiraResidual())
    >>> params = {"w": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    method = i3s_subspace(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        rank=rank,
        update_every=update_every,
        transfer=transfer,
        recovery=recovery,
        scale=scale,
        side=side,
        matrices=matrices,
        key=key,
    )
    return optimizer(method, learning_rate, weight_decay, mask)
