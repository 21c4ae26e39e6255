"""AdaRankGrad (Refael et al. 2024): the rank follows the gradient's."""

import jax
import optax
from jax.typing import ArrayLike

from lowrank_optax._src.engines.project import project_gradients
from lowrank_optax._src.leaves.matrix import Matrices, Side
from lowrank_optax._src.methods.optimizer import Mask, optimizer
from lowrank_optax._src.parts.checks import check_rank
from lowrank_optax._src.parts.laws import Recovery, Transfer
from lowrank_optax._src.parts.recovery import Drop
from lowrank_optax._src.parts.refresh import Measure, OnConvergence
from lowrank_optax._src.parts.subspace import EnergyRank
from lowrank_optax._src.parts.transfer import Rotate


def adaptive_rank(
    inner: optax.GradientTransformation,
    *,
    max_rank: int,
    min_rank: int = 1,
    max_residual_energy: ArrayLike = 0.1,
    max_interval: ArrayLike = 200,
    min_interval: ArrayLike = 20,
    measure: Measure = "share",
    transfer: Transfer = Rotate(),
    recovery: Recovery = Drop(),
    scale: ArrayLike = 1.0,
    side: Side = "long",
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaRankGrad: a subspace as large as the gradient needs, kept until it converges.

    .. math::
      r \leftarrow \min \Bigl\{ k : \frac{\lVert G - Q_{:k} Q_{:k}^\top G \rVert_F^2}
        {\lVert G \rVert_F^2} \le \eta \Bigr\},\quad
      C = Q^\top Q_{\mathrm{old}},\quad M \leftarrow C M,\quad
      V \leftarrow (C \circ C)\, V,\quad \Delta = s\, Q\, \rho(Q^\top G)

    (equation 2, Algorithms 1 to 3). A matrix is refreshed once its basis has lost half
    of what it had of the first gradients after its last refresh, within the bounds:
    see `OnConvergence`. Each matrix of a stack has its own rank and refreshes. State of
    a matrix with an Adam inner: ``l r + 2 s r + 3`` numbers, r the maximal rank and l
    the longer side; columns beyond the present rank are zero, and
    `lowrank_optax.rank.shrink` frees their memory (AR-19). `diagnostics.state_metrics`
    tells the present ranks.

    Args:
      inner: such as ``optax.scale_by_adam()``.
      max_rank: the largest rank, and that of the memory; the paper's initial rank
        (AR-13).
      min_rank: the least rank.
      max_residual_energy: eta, the share of the squared gradient that may be left out.
        0.1 trains as well as GaLore with less state (4.157 beside 4.153, 610 of
        996 KiB, in benchmarks/records/comparison.md). The paper's 0.48 is the share of
        its Algorithm 2, of norms: 0.23 of the squares. With that, ranks are the paper's
        (6.9 of 8, there 5.3 to 7.8, in ranks.md), the state is a third of GaLore's, and
        the loss larger by 0.023 (ablations.md).
      max_interval: the most steps between two refreshes.
      min_interval: the fewest; over so many the first gradients are averaged.
      measure: "norm" for the paper's criterion, which gradients of small batches meet
        at ``min_interval``: ``||Q^T G||_F`` of at most ``sqrt(1 - eta) ||G||_F`` of the
        last refresh, in the average.
      transfer: the moments move with the basis.
      recovery: `FiraResidual` adds what the projection leaves out.
      scale: s (AR-15).
      side: "long" as in the paper's Table 1 (AR-14), see `project_gradients`.
      matrices, key: see `project_gradients`.

    Returns:
      A transformation without a learning rate.

    Raises:
      TypeError, ValueError: for ranks that are not ints of at least 1, a minimum above
        the maximum, a share outside [0, 1], or an interval below 1.

    Differs from the paper in: the rank comes from the squared residual in closed form,
    where the search as printed does not end (AR-1 to AR-4); second moments are
    transformed with the squares of the coefficients and stay non-negative (AR-7);
    convergence is judged by an average, between two bounds (AR-9 to AR-12), and by
    default by a share of the gradient beside that of noise; training is never stopped
    (AR-22).

    References:
      Refael et al., AdaRankGrad: Adaptive Gradient-Rank and Moments for
      Memory-Efficient LLMs Training and Fine-Tuning, 2024.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = optax.chain(
    ...     lro.adaptive_rank(optax.scale_by_adam(), max_rank=3),
    ...     optax.scale_by_learning_rate(1e-2),
    ... )
    >>> params = {"w": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> float(lro.diagnostics.state_metrics(state)["rank/w"])  # ones are of rank 1
    1.0
    """
    if check_rank(min_rank, "min_rank") > check_rank(max_rank, "max_rank"):
        raise ValueError(
            f"`min_rank` must be at most `max_rank` = {max_rank}, got {min_rank}."
        )
    subspace = EnergyRank(min_rank, max_residual_energy)
    threshold = 0.5 if measure == "share" else (1 - max_residual_energy) ** 0.5
    refresh = OnConvergence(threshold, max_interval, min_interval, measure)
    return project_gradients(
        inner,
        rank=max_rank,
        subspace=subspace,
        refresh=refresh,
        transfer=transfer,
        recovery=recovery,
        scale=scale,
        side=side,
        matrices=matrices,
        key=key,
    )


def adarankgrad_adamw(
    learning_rate: optax.ScalarOrSchedule,
    max_rank: int = 128,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    min_rank: int = 1,
    max_residual_energy: ArrayLike = 0.1,
    max_interval: ArrayLike = 200,
    min_interval: ArrayLike = 20,
    measure: Measure = "share",
    transfer: Transfer = Rotate(),
    recovery: Recovery = Drop(),
    scale: ArrayLike = 0.25,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    side: Side = "long",
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdaRankGrad with AdamW, see `adaptive_rank`.

    Args:
      learning_rate: a float or a schedule.
      max_rank: the largest rank, and that of the memory.
      scale: of projected matrices, as in `galore_adamw`.
      b1, b2, eps: of Adam.
      weight_decay: decoupled, on the full weights, times the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      min_rank, max_residual_energy, max_interval, min_interval, measure: see
        `adaptive_rank`.
      transfer, recovery, side, matrices, key: see `adaptive_rank`.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.adarankgrad_adamw(1e-2, max_rank=2)
    >>> params = {"w": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    method = adaptive_rank(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        max_rank=max_rank,
        min_rank=min_rank,
        max_residual_energy=max_residual_energy,
        max_interval=max_interval,
        min_interval=min_interval,
        measure=measure,
        transfer=transfer,
        recovery=recovery,
        scale=scale,
        side=side,
        matrices=matrices,
        key=key,
    )
    return optimizer(method, learning_rate, weight_decay, mask)
