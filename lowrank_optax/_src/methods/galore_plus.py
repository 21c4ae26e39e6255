"""GaLore+ (Liao et al. 2024): one head's subspace for all, and a sparse residual."""

from typing import Any

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from lowrank_optax._src.engines.project import project_gradients
from lowrank_optax._src.leaves.matrix import Matrices, MatrixView, Side
from lowrank_optax._src.leaves.paths import words
from lowrank_optax._src.methods.optimizer import Mask, Static, optimizer
from lowrank_optax._src.parts.checks import check_range, check_rank
from lowrank_optax._src.parts.laws import Recovery, Subspace, Transfer
from lowrank_optax._src.parts.recovery import Drop, SparseResidual
from lowrank_optax._src.parts.refresh import Every
from lowrank_optax._src.parts.subspace import CrossHead, TopSingular
from lowrank_optax._src.parts.transfer import Keep

_QUERY = frozenset("q query queries wq".split())
_KEY = frozenset("k key keys wk".split())


def galore_plus_project(
    inner: optax.GradientTransformation,
    *,
    rank: int,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    num_heads: int | tuple[int, int] | None = None,
    density: Static[float] = 0.012,
    warmup: ArrayLike | None = None,
    residual_scale: ArrayLike | None = None,
    update_every: ArrayLike = 200,
    subspace: Subspace = TopSingular("subspace_iteration"),
    transfer: Transfer = Keep(),
    scale: ArrayLike = 1.0,
    side: Side = "short",
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""GaLore+: GaLore, with cheap subspaces and a residual for queries and keys.

    .. math::
      P \leftarrow \text{top-}r\text{ left singular vectors of } G_i,\ i
      \text{ a random head},\quad
      \Delta = s\, \bigl( P\, \rho(P^\top G) + \delta \bigr)

    at query and key kernels (equations 5 and 6), with ``delta`` the sparse residual of
    `SparseResidual` (Algorithm 2); other matrices get GaLore's update. All singular
    vectors come from randomized subspace iteration. Queries and keys are told by a word
    of their path: q, query, wq; k, key, wk. Their rows must be the input, as in
    kernels (d, heads * width) and, by ``MatrixAxes(rows=0, cols=(1, 2))``, (d, heads,
    width); for (heads * width, d) give ``MatrixAxes(rows=1, cols=0)`` (GP-12).

    State of a (d, h w) query kernel with an Adam inner: ``d r + 2 r h w`` numbers, and
    12 bytes for each of ``density d h w`` kept entries; of others as `galore_project`.

    Args:
      inner: such as ``optax.scale_by_adam()``; it must have a first moment.
      rank: r, the number of columns of a basis.
      b1, b2, eps: of the residual's Adam, best those of the inner optimizer.
      num_heads: heads of kernels of two axes, or a pair for queries and keys; others
        have an axis that counts them. None counts such a kernel as one head.
      density: share of the entries that the residual keeps (GP-7); 0 for no residual.
      warmup: updates before these are chosen; None for ``update_every`` (GP-6), 0 for
        no residual.
      residual_scale: see `SparseResidual`.
      update_every: T; the first update always refreshes.
      subspace: how singular vectors are found; ``EnergyRank()`` adapts the rank.
      transfer: the paper keeps the moments.
      scale: s, the paper's alpha; it multiplies the residual too (GP-5).
      side: of all other matrices.
      matrices, key: see `project_gradients`.

    Returns:
      A transformation without a learning rate.

    Raises:
      TypeError, ValueError: for a density that is no Python float in [0, 1], a warm-up
        below 0, or heads that do not divide a kernel.

    Differs from the paper in: the residual's second moment is the gradient's own, as
    that of the paper is not one (GP-1, GP-2); where the rank exceeds the width of a
    head, several are drawn (GP-4); the residual's bias is corrected from its own start
    (GP-8). Not offered: choosing the residual's entries anew (GP-10), as new ones would
    need ages and bias corrections of their own; and other leaves than queries and keys
    (GP-17), which the paper's argument is about: `project_gradients` with functions of
    the leaf takes any.

    References:
      Liao et al., GaLore+: Boosting Low-Rank Adaptation for LLMs with Cross-Head
      Projection, 2024.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = optax.chain(
    ...     lro.galore_plus_project(optax.scale_by_adam(), rank=2, num_heads=2),
    ...     optax.scale_by_learning_rate(1e-2),
    ... )
    >>> params = {"q_proj": jnp.ones((6, 4)), "v_proj": jnp.ones((6, 4))}
    >>> state = tx.init(params)
    >>> state[0].basis["q_proj"].shape, state[0].basis["v_proj"].shape
    ((6, 2), (4, 2))
    >>> updates, state = tx.update(params, state, params)
    """
    heads = num_heads if isinstance(num_heads, tuple) else (num_heads, num_heads)
    for count in heads:
        check_rank(1 if count is None else count, "num_heads")
    warmup = update_every if warmup is None else warmup
    residual: Recovery = Drop()
    if _positive("density", density) and _positive("warmup", warmup):
        residual = SparseResidual(density, warmup, b1, b2, eps, residual_scale)

    def subspace_of(view: MatrixView) -> Subspace:
        which = _attends(view.path)
        if which is None:
            return subspace
        own = view.shape[view.right[0]] if len(view.right) > 1 else heads[which]
        if own is None or own == 1:
            return subspace
        return CrossHead(own, subspace)

    return project_gradients(
        inner,
        rank=rank,
        subspace=subspace_of,
        refresh=Every(update_every),
        transfer=transfer,
        recovery=lambda v: Drop() if _attends(v.path) is None else residual,
        scale=scale,
        side=lambda path: side if _attends(path) is None else "left",
        matrices=matrices,
        key=key,
    )


def _attends(path: str) -> int | None:
    """0 for a query kernel, 1 for a key kernel, None for any other."""
    found = set(words(path))
    query, key = bool(found & _QUERY), bool(found & _KEY)
    return None if query == key else int(key)


def _positive(name: str, value: Any) -> bool:
    """Whether a number is above zero; one that is traced is taken to be."""
    check_range(value, name, 0)
    return not isinstance(value, (int, float, np.number)) or bool(value > 0)


def galore_plus_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    num_heads: int | tuple[int, int] | None = None,
    density: Static[float] = 0.012,
    warmup: ArrayLike | None = None,
    residual_scale: ArrayLike | None = None,
    update_every: ArrayLike = 200,
    subspace: Subspace = TopSingular("subspace_iteration"),
    transfer: Transfer = Keep(),
    scale: ArrayLike = 0.25,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    side: Side = "short",
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """GaLore+ with AdamW, see `galore_plus_project`.

    Args:
      learning_rate: a float or a schedule.
      rank, update_every, scale: r, T and alpha, as in `galore_adamw`; the paper
        fine-tunes with a rate of 1e-6 and alpha from 16 to 128.
      b1, b2, eps: of Adam, that of the residual included.
      num_heads, density, warmup, residual_scale: see `galore_plus_project`.
      subspace, transfer: see `galore_plus_project`.
      weight_decay: decoupled, on the full weights, times the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      side, matrices, key: see `project_gradients`.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.galore_plus_adamw(1e-2, rank=2, num_heads=2)
    >>> params = {"query": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    method = galore_plus_project(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        rank=rank,
        num_heads=num_heads,
        density=density,
        warmup=warmup,
        update_every=update_every,
        b1=b1,
        b2=b2,
        eps=eps,
        residual_scale=residual_scale,
        subspace=subspace,
        transfer=transfer,
        scale=scale,
        side=side,
        matrices=matrices,
        key=key,
    )
    return optimizer(method, learning_rate, weight_decay, mask)
