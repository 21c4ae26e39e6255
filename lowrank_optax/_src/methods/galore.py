"""GaLore (Zhao et al. 2024): an optimizer on the leading singular subspace."""

import jax
import optax
from jax.typing import ArrayLike

from lowrank_optax._src.engines.project import project_gradients
from lowrank_optax._src.leaves.matrix import Matrices, Side
from lowrank_optax._src.methods.optimizer import Mask, optimizer
from lowrank_optax._src.parts.laws import Subspace, Transfer
from lowrank_optax._src.parts.refresh import Every
from lowrank_optax._src.parts.subspace import TopSingular
from lowrank_optax._src.parts.transfer import Keep


def galore_project(
    inner: optax.GradientTransformation,
    *,
    rank: int,
    update_every: ArrayLike = 200,
    subspace: Subspace = TopSingular(),
    transfer: Transfer = Keep(),
    scale: ArrayLike = 1.0,
    side: Side = "short",
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""GaLore: the inner optimizer sees ``P^T G``, its answer is projected back.

    .. math::
      P \leftarrow \text{top-}r\text{ left singular vectors of } G
      \text{ every } T \text{ steps},\quad \Delta = s\, P\, \rho(P^\top G)

    State of a matrix with an Adam inner: ``s r + 2 l r`` numbers, s and l its shorter
    and longer side (``l r + 2 s r`` with ``side="long"``).

    Args:
      inner: such as ``optax.scale_by_adam()``.
      rank: r, the number of columns of a basis.
      update_every: T; the first update always refreshes.
      subspace: how the singular vectors are found.
      transfer: the papers keep the moments; `Rotate` carries them to the new basis.
      scale: s, the papers' alpha: a second learning rate for projected matrices.
      side, matrices, key: see `project_gradients`.

    Returns:
      A transformation without a learning rate.

    Differs from the reference code in: epsilon is Optax's; new basis vectors take the
    sign of those they replace; moments are float32 whatever the parameters' dtype.

    References:
      Zhao et al., GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
      Projection, ICML 2024.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = optax.chain(
    ...     lro.galore_project(optax.scale_by_adam(), rank=2, scale=0.25),
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
        scale=scale,
        side=side,
        matrices=matrices,
        key=key,
    )


def galore_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
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
    """AdamW in GaLore's subspace, see `galore_project`.

    Args:
      learning_rate: a float or a schedule.
      rank, update_every, scale: r, T and alpha. The learning rate of a projected
        matrix is effectively ``scale * learning_rate``; the papers pre-train with 0.01.
      b1, b2, eps: of Adam.
      weight_decay: a float or a schedule; decoupled, on the full weights, times the
        learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      subspace, transfer, side, matrices, key: see `galore_project`.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.galore_adamw(1e-2, rank=2)
    >>> params = {"w": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    method = galore_project(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        rank=rank,
        update_every=update_every,
        subspace=subspace,
        transfer=transfer,
        scale=scale,
        side=side,
        matrices=matrices,
        key=key,
    )
    return optimizer(method, learning_rate, weight_decay, mask)
