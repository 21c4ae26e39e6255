"""GaLore (Zhao et al. 2024): an optimizer on the leading singular subspace."""

from typing import Any

import jax
import optax

from lowrank_optax._src.matrix import Matrices, Side
from lowrank_optax._src.project import project_gradients
from lowrank_optax._src.refresh import Every
from lowrank_optax._src.subspace import TopSingular
from lowrank_optax._src.transfer import Keep
from lowrank_optax._src.typing import Subspace, Transfer


def galore_project(
    inner: optax.GradientTransformation,
    *,
    rank: int,
    update_every: Any = 200,
    subspace: Subspace = TopSingular(),
    transfer: Transfer = Keep(),
    scale: Any = 1.0,
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
      rank: r.
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
