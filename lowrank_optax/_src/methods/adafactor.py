"""Adafactor (Shazeer & Stern 2018) on matrices, and on each matrix of a stack."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from lowrank_optax._src.engines.accept import accept_leaf, increment
from lowrank_optax._src.engines.order import Order
from lowrank_optax._src.leaves import matrix
from lowrank_optax._src.leaves.choose import view_dense, view_leaves
from lowrank_optax._src.leaves.matrix import Matrices, MatrixView, Side
from lowrank_optax._src.leaves.paths import flatten
from lowrank_optax._src.leaves.transformation import transformation
from lowrank_optax._src.methods.galore import galore_project
from lowrank_optax._src.methods.optimizer import Mask, optimizer
from lowrank_optax._src.parts.laws import Subspace, Transfer
from lowrank_optax._src.parts.subspace import TopSingular
from lowrank_optax._src.parts.transfer import Keep


class AdafactorState(NamedTuple):
    """State of `scale_by_adafactor`; trees mirror the parameters'.

    Attributes:
      step: updates made so far, int32.
      v_row: (*batch, m), mean squares of a matrix' rows; ``MaskedNode()`` elsewhere.
      v_col: (*batch, n), those of its columns; ``MaskedNode()`` elsewhere.
      v: of a vector or scalar, the mean square of each number; ``MaskedNode()`` at a
        matrix.
    """

    step: jax.Array
    v_row: Any
    v_col: Any
    v: Any


# Added to the squares, as in the paper and in Optax.
_EPS = 1e-30


def scale_by_adafactor(
    *,
    decay_rate: ArrayLike = 0.8,
    clipping_threshold: ArrayLike | None = 1.0,
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adafactor: the second moment as one number for each row and for each column.

    .. math::
      r_i &\leftarrow \beta_t r_i + (1 - \beta_t) \operatorname{mean}_j G_{ij}^2, \quad
      c_j \leftarrow \beta_t c_j + (1 - \beta_t) \operatorname{mean}_i G_{ij}^2, \quad
      \beta_t = 1 - t^{-\gamma} \\
      U_{ij} &= G_{ij} \Big/ \sqrt{r_i c_j / \operatorname{mean} r}, \quad
      \Delta = U / \max(1, \operatorname{RMS}(U) / d)

    The last two axes of a leaf are the rows and columns; each matrix of a stack is
    factored and clipped by itself. Numbers of vectors and scalars each have their own
    second moment. State of a matrix: ``m + n`` numbers.

    Args:
      decay_rate: gamma.
      clipping_threshold: d, on the root mean square of an update; None for none.
      matrices: other rows and columns, see `default_matrices`; leaves that it does not
        name keep their last two axes.
      key: nothing here is random; as in all methods.

    Returns:
      A transformation without a learning rate.

    Differs from `optax.adafactor` in: that takes the two largest axes of a leaf, which
    in a stack may be the layers, factors none below 128, and clips a leaf as a whole;
    no step is scaled by the weights' size here. On matrices of two axes it is
    ``optax.scale_by_factored_rms`` with ``optax.clip_by_block_rms``.

    References:
      Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost,
      ICML 2018.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.scale_by_adafactor()
    >>> state = tx.init({"w": jnp.ones((3, 4, 6)), "b": jnp.ones(6)})
    >>> state.v_row["w"].shape, state.v_col["w"].shape, state.v["b"].shape
    ((3, 4), (3, 6), (6,))
    """

    def init(params):
        views = _views(params, matrices, creating=True)
        _, leaves, treedef = flatten(params)

        def tree(at_matrix, elsewhere):
            each = zip(views, leaves, strict=True)
            return treedef.unflatten(
                [at_matrix(v) if _factored(v) else elsewhere(x) for v, x in each]
            )

        def absent(_):
            return optax.MaskedNode()

        return AdafactorState(
            step=jnp.zeros([], jnp.int32),
            v_row=tree(lambda v: v.zeros("m"), absent),
            v_col=tree(lambda v: v.zeros("n"), absent),
            v=tree(absent, matrix.zeros_like),
        )

    def update(updates, state, params=None, **extra):
        views = _views(updates, matrices)
        grads, treedef = jax.tree.flatten(updates)
        moments = [
            treedef.flatten_up_to(x) for x in (state.v_row, state.v_col, state.v)
        ]
        t = increment(state.step)
        b2 = 1 - jnp.asarray(t, jnp.float32) ** jnp.negative(decay_rate)
        out, order = [], Order()
        for i, (view, *old) in enumerate(zip(views, *moments, strict=True)):
            g = view.matrix(order.start(grads[i]))
            u, new = _scaled(view, g, old, b2)
            if clipping_threshold is not None:
                u = _clip(u, clipping_threshold)
            out.append(view.leaf(u))
            kept = accept_leaf(new, old, out[i])
            for field, x in zip(moments, kept, strict=True):
                field[i] = x
            order.end((out[i], kept))
        state = AdafactorState(t, *(treedef.unflatten(x) for x in moments))
        return treedef.unflatten(out), state

    return transformation(init, update)


def clip_by_matrix_rms(
    threshold: ArrayLike, matrices: Matrices = None
) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_block_rms`, by the root mean square of each matrix of a stack."""

    def update(updates, state, params=None, **extra):
        leaves, treedef = jax.tree.flatten(updates)
        each = zip(_views(updates, matrices), leaves, strict=True)
        out = [view.leaf(_clip(view.matrix(u), threshold)) for view, u in each]
        return treedef.unflatten(out), state

    return transformation(lambda params: optax.EmptyState(), update)


def _scaled(
    view: MatrixView, g: jax.Array, old: list[Any], b2: jax.Array
) -> tuple[jax.Array, list[Any]]:
    """A gradient over the root of its second moments, and these: rows, columns, all."""
    if not jnp.iscomplexobj(g):  # of what is larger, the square is no float
        g = jnp.clip(g, -1e19, 1e19)
    square = _squares(g) + _EPS
    if not _factored(view):
        v = b2 * view.matrix(old[2]) + (1 - b2) * square
        return g * v**-0.5, [*old[:2], view.leaf(v, old[2].dtype)]
    row = b2 * old[0] + (1 - b2) * _mean(square, -1)
    col = b2 * old[1] + (1 - b2) * _mean(square, -2)
    # In pairs that keep in range: a quotient of squares would not.
    root = _mean(row, -1)[..., None] ** 0.5
    u = g * row[..., None] ** -0.5
    return u * (root * col**-0.5)[..., None, :], [row, col, old[2]]


def _clip(u: jax.Array, threshold: ArrayLike) -> jax.Array:
    # In units in which squares of 1e30 are floats. Those of what is 1e-4 of the
    # threshold are none, and count for nothing beside it.
    unit = threshold * 2.0**50
    square = jnp.mean(_squares(u / unit), axis=(-2, -1), keepdims=True)
    return u / jnp.maximum(1.0, jnp.sqrt(square) * 2.0**50)


def _mean(x: jax.Array, axis: int) -> jax.Array:
    """Of what is in range, though its sum may not be."""
    return jnp.sum(x / x.shape[axis], axis=axis)


def _squares(x: jax.Array) -> jax.Array:
    """Of magnitudes, where numbers are complex."""
    return (x * x.conj()).real


def _views(tree: Any, matrices: Matrices, creating: bool = False) -> list[MatrixView]:
    """Every leaf by the rows and columns it is given, or by its own last two axes."""
    if matrices is None:
        seen = view_dense(tree, creating)
    else:
        seen = view_leaves(tree, matrices, "left", creating)
    leaves = flatten(tree)[1]
    return [
        v if isinstance(v, MatrixView) else matrix.last_axes_view(v.path, x)
        for v, x in zip(seen, leaves, strict=True)
    ]


def _factored(view: MatrixView) -> bool:
    return bool(view.left)


def galore_adafactor(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    decay_rate: ArrayLike = 0.8,
    clipping_threshold: ArrayLike | None = 1.0,
    momentum: ArrayLike | None = None,
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
    """Adafactor in GaLore's subspace, its second moment factored there too.

    State of a matrix: ``s r + (l + r)`` numbers, and ``l r`` more with momentum.

    Args:
      learning_rate: a float or a schedule; updates are not scaled by the weights' size.
      rank, update_every, scale: r, T and alpha.
      decay_rate: of the second moment, ``1 - t^-decay_rate``.
      clipping_threshold: on the root mean square of the low-rank update of each matrix;
        None for none.
      momentum: decay of a first moment after the scaling; None for none.
      weight_decay, mask: decoupled, on the full weights.
      subspace, transfer, side, matrices, key: see `galore_project`.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.galore_adafactor(1e-2, rank=2)
    >>> params = {"w": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    inner = scale_by_adafactor(
        decay_rate=decay_rate, clipping_threshold=clipping_threshold
    )
    if momentum is not None:
        inner = optax.chain(inner, optax.ema(momentum, debias=False))
    method = galore_project(
        inner,
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
