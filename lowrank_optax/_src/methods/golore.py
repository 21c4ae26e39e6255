"""GoLore (He et al. 2024): GaLore that ends in random subspaces."""

import jax
import optax
from jax.typing import ArrayLike

from lowrank_optax._src.engines.project import project_gradients
from lowrank_optax._src.leaves.matrix import Matrices, Side
from lowrank_optax._src.methods.optimizer import Mask, optimizer
from lowrank_optax._src.parts.laws import Subspace, Transfer
from lowrank_optax._src.parts.refresh import Every
from lowrank_optax._src.parts.subspace import RandomOrthonormal, Switch, TopSingular
from lowrank_optax._src.parts.transfer import Rotate


def golore_project(
    inner: optax.GradientTransformation,
    *,
    rank: int,
    switch_step: ArrayLike,
    update_every: ArrayLike = 200,
    subspace: Subspace = TopSingular(),
    transfer: Transfer = Rotate(),
    scale: ArrayLike = 1.0,
    side: Side = "short",
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""GoLore: GaLore's subspace at first, uniformly random ones in the end.

    .. math::
      P \leftarrow \begin{cases}
        \text{top-}r\text{ left singular vectors of } G & k < k_0 \\
        \text{uniform on the Stiefel manifold} & k \ge k_0
      \end{cases},\quad
      M \leftarrow P^\top P_{\mathrm{old}} M,\quad \Delta = s\, P\, \rho(P^\top G)

    at steps k = 0, T, 2T, ... Near a minimum the leading singular vectors of a noisy
    gradient are those of the noise, and GaLore need not converge; random subspaces see
    every direction. State as `galore_project`.

    Args:
      inner: such as ``optax.scale_by_adam()``, ``optax.trace(0.9)``.
      rank: r, the number of columns of a basis.
      switch_step: k0, such as 80% of the training steps; it acts from the next
        refresh on.
      update_every: T; the first update always refreshes.
      subspace: the one before the switch.
      transfer: the paper projects the momentum to the new basis.
      scale: s, a factor of the updates of matrices.
      side, matrices, key: see `project_gradients`.

    Returns:
      A transformation without a learning rate.

    Differs from the reference code in: the rotated momentum is really used, which the
    code computes and drops together with the gradient of that step; second moments are
    transformed with the squares of the coefficients, where the code keeps them.

    References:
      He et al., Subspace Optimization for Large Language Models with Convergence
      Guarantees, 2024.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = optax.chain(
    ...     lro.golore_project(optax.scale_by_adam(), rank=2, switch_step=800),
    ...     optax.scale_by_learning_rate(1e-2),
    ... )
    >>> params = {"w": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    return project_gradients(
        inner,
        rank=rank,
        subspace=Switch(switch_step, subspace, RandomOrthonormal()),
        refresh=Every(update_every),
        transfer=transfer,
        scale=scale,
        side=side,
        matrices=matrices,
        key=key,
    )


def golore_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    switch_step: ArrayLike,
    update_every: ArrayLike = 200,
    subspace: Subspace = TopSingular(),
    transfer: Transfer = Rotate(),
    scale: ArrayLike = 1.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    side: Side = "short",
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW in GoLore's subspaces, see `golore_project`.

    Args:
      learning_rate: a float or a schedule.
      rank, update_every, scale: r, T and alpha.
      b1, b2, eps: of Adam.
      switch_step: the subspaces are random from this step on; the paper chooses 80% of
        the training steps.
      subspace, transfer: see `golore_project`.
      weight_decay: decoupled, on the full weights, times the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      side, matrices, key: see `project_gradients`.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.golore_adamw(1e-2, rank=2, switch_step=800)
    >>> params = {"w": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    method = golore_project(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        rank=rank,
        switch_step=switch_step,
        update_every=update_every,
        subspace=subspace,
        transfer=transfer,
        scale=scale,
        side=side,
        matrices=matrices,
        key=key,
    )
    return optimizer(method, learning_rate, weight_decay, mask)
