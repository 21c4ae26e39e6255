"""Flora (Hao et al. 2024): momentum kept in a random subspace that changes."""

import jax
import optax
from jax.typing import ArrayLike

from lowrank_optax._src.engines.project import project_gradients
from lowrank_optax._src.leaves.matrix import Matrices, Side
from lowrank_optax._src.methods.adafactor import clip_by_matrix_rms, scale_by_adafactor
from lowrank_optax._src.methods.optimizer import Mask, optimizer
from lowrank_optax._src.parts.laws import Transfer
from lowrank_optax._src.parts.refresh import Every
from lowrank_optax._src.parts.subspace import RandomGaussian
from lowrank_optax._src.parts.transfer import RotateFirst


def flora_project(
    inner: optax.GradientTransformation,
    *,
    rank: int,
    update_every: ArrayLike = 1000,
    transfer: Transfer = RotateFirst(),
    scale: ArrayLike = 1.0,
    side: Side = "short",
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Flora: momentum in a random subspace, carried over when that is drawn anew.

    .. math::
      P_{ij} \sim \mathcal N(0, 1/r),\quad
      M \leftarrow P^\top P_{\mathrm{old}} M \text{ every } T \text{ steps},\quad
      \Delta = s\, P\, \rho(P^\top G)

    As ``P P^T`` is the identity in expectation, a decoded momentum is the true one on
    average, and what one projection leaves out the next ones see. State of a matrix:
    ``l r`` numbers a moment, l its longer side, and the step of the last drawing: the
    projection is drawn again from the seed at every step.

    Args:
      inner: an optimizer with momentum, such as ``optax.ema(0.9, debias=False)``.
      rank: r, the number of columns of a basis.
      update_every: T; the first update always draws. Each drawing adds noise of
        ``m / r`` times the momentum's square, m the projected side: it should be far
        longer than the momentum remembers.
      transfer: the paper carries the momentum to the new projection.
      scale: s; the paper has none.
      side, matrices, key: see `project_gradients`.

    Returns:
      A transformation without a learning rate.

    Differs from the reference codes in: the momentum really is carried to the new
    projection, which the JAX code encodes with the old one; the update is the decoded
    momentum, to which that code adds the present gradient again.

    References:
      Hao, Cao and Mou, Flora: Low-Rank Adapters Are Secretly Gradient Compressors,
      ICML 2024.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = optax.chain(
    ...     lro.flora_project(optax.trace(0.9), rank=2),
    ...     optax.scale_by_learning_rate(1e-2),
    ... )
    >>> params = {"w": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    return project_gradients(
        inner,
        rank=rank,
        subspace=RandomGaussian(),
        refresh=Every(update_every),
        transfer=transfer,
        scale=scale,
        side=side,
        matrices=matrices,
        key=key,
    )


def flora(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 256,
    *,
    b1: ArrayLike = 0.9,
    decay_rate: ArrayLike = 0.8,
    clipping_threshold: ArrayLike | None = 1.0,
    update_every: ArrayLike = 1000,
    scale: ArrayLike = 1.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    side: Side = "short",
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Adafactor at full size, its momentum by Flora, see `flora_project`.

    State of a matrix: ``l r + (m + n)`` numbers.

    Args:
      learning_rate: a float or a schedule; updates are not scaled by the weights' size.
      rank, update_every: r and T, the paper's kappa.
      scale: multiplies the decoded momentum, before the clip; the paper has none.
      b1: decay of the momentum, an average of Adafactor's updates.
      decay_rate: of the second moment, ``1 - t^-decay_rate``.
      clipping_threshold: on the root mean square of each matrix' update; None for none.
      weight_decay: decoupled, on the full weights, times the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      side, matrices, key: see `project_gradients`.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.flora(1e-2, rank=2)
    >>> params = {"w": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    momentum = flora_project(
        optax.ema(b1, debias=False),
        rank=rank,
        update_every=update_every,
        scale=scale,
        side=side,
        matrices=matrices,
        key=key,
    )
    adafactor = scale_by_adafactor(
        decay_rate=decay_rate, clipping_threshold=None, matrices=matrices
    )
    parts = [adafactor, momentum]
    if clipping_threshold is not None:
        parts.append(clip_by_matrix_rms(clipping_threshold, matrices))
    return optimizer(optax.chain(*parts), learning_rate, weight_decay, mask)
