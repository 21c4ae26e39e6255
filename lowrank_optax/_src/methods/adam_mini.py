"""Adam-mini (Zhang et al. 2024): Adam with one second moment a block."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from lowrank_optax._src.engines.accept import accept_leaf, increment
from lowrank_optax._src.engines.order import Order
from lowrank_optax._src.leaves import matrix
from lowrank_optax._src.leaves.choose import view_blocks
from lowrank_optax._src.leaves.matrix import Matrices, Side
from lowrank_optax._src.leaves.paths import flatten
from lowrank_optax._src.leaves.transformation import transformation
from lowrank_optax._src.methods.galore import galore_project
from lowrank_optax._src.methods.optimizer import Mask, optimizer
from lowrank_optax._src.parts.laws import Subspace, Transfer
from lowrank_optax._src.parts.subspace import TopSingular
from lowrank_optax._src.parts.transfer import Keep


class AdamMiniState(NamedTuple):
    """State of `scale_by_adam_mini`; trees mirror the parameters'.

    Attributes:
      step: updates made so far, int32.
      mu: shaped as the parameter.
      nu: (*batch, 1, n), one number for each block.
    """

    step: jax.Array
    mu: Any
    nu: Any


def scale_by_adam_mini(
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam-mini: the second moment is one number for each block of the weights.

    .. math::
      M \leftarrow \beta_1 M + (1 - \beta_1) G, \quad
      v_b \leftarrow \beta_2 v_b + (1 - \beta_2) \operatorname{mean}_b G \circ G, \quad
      \Delta_{ij} = \hat M_{ij} / (\sqrt{\hat v_{b(i, j)}} + \epsilon)

    By default a block of a leaf of two axes or more is an index of the longer of its
    last two axes (of the last, if they are equal): a neuron, or a token of an
    embedding; inside `project_gradients` a column of ``P^T G``. Numbers of vectors and
    scalars each have their own, as in Adam. State of a matrix: ``m n + l`` numbers, l
    its longer side.

    Args:
      b1, b2: decays of the moments.
      eps: added outside of the root, after the bias correction.
      matrices: other blocks: the indices of the columns (and batch axes), each averaged
        over the rows; a leaf of None is treated as in Adam. A block a head of a
        query kernel (embed, heads, head_dim) is ``MatrixAxes(rows=(0, 2), cols=1)``;
        a block a basis vector inside of `project_gradients`,
        ``MatrixAxes(rows=-1, cols=-2)``.
      key: nothing here is random; as in all methods.

    Returns:
      A transformation without a learning rate.

    Differs from the reference code in: that code tells layers by their names, and takes
    output neurons and heads; the side is chosen by its length here, so that no name
    decides.

    References:
      Zhang et al., Adam-mini: Use Fewer Learning Rates To Gain More, ICLR 2025.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = lro.scale_by_adam_mini()
    >>> state = tx.init({"w": jnp.ones((4, 6)), "b": jnp.ones(6)})
    >>> state.nu["w"].shape, state.nu["b"].shape
    ((1, 6), (1, 6))
    >>> galore = lro.galore_project(lro.scale_by_adam_mini(), rank=2)
    >>> galore.init({"w": jnp.ones((4, 6))}).inner_state.nu["w"].shape
    (1, 6)
    """

    def init(params):
        views = view_blocks(params, matrices, creating=True)
        _, leaves, treedef = flatten(params)
        return AdamMiniState(
            step=jnp.zeros([], jnp.int32),
            mu=treedef.unflatten([matrix.zeros_like(leaf) for leaf in leaves]),
            nu=treedef.unflatten([view.zeros(1, "n") for view in views]),
        )

    def update(updates, state, params=None, **extra):
        views = view_blocks(updates, matrices)
        grads, treedef = jax.tree.flatten(updates)
        mus, nus = (treedef.flatten_up_to(x) for x in (state.mu, state.nu))
        t = increment(state.step)
        out, order = [], Order()
        for i, view in enumerate(views):
            g, old = view.lying(order.start(grads[i])), view.lying(mus[i])
            mu = b1 * old.array + (1 - b1) * g.array
            nu = b2 * nus[i] + (1 - b2) * g.of(g.array**2).column_means()
            size = jnp.sqrt(nu / (1 - b2**t)) + eps
            out.append(view.leaf(g.order(jnp.divide(mu, 1 - b1**t)) / size))
            mu, nus[i] = accept_leaf((mu, nu), (old.array, nus[i]), out[i])
            mus[i] = view.leaf(g.order(mu), mus[i].dtype)
            order.end((out[i], mus[i], nus[i]))
        state = AdamMiniState(t, treedef.unflatten(mus), treedef.unflatten(nus))
        return treedef.unflatten(out), state

    return transformation(init, update)


def adam_mini(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Adam-mini with decoupled weight decay, see `scale_by_adam_mini`.

    Args:
      learning_rate: a float or a schedule.
      b1, b2, eps: of Adam-mini.
      weight_decay: decoupled, times the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      matrices, key: see `scale_by_adam_mini`.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.adam_mini(1e-3)
    >>> lro.state_bytes(tx, {"w": jnp.ones((64, 64))})  # m n + l floats, a counter
    16644
    """
    method = scale_by_adam_mini(b1=b1, b2=b2, eps=eps, matrices=matrices, key=key)
    return optimizer(method, learning_rate, weight_decay, mask)


def galore_adam_mini(
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
    """Adam-mini in GaLore's subspace, see `galore_project` and `scale_by_adam_mini`.

    State of a matrix: ``s r + l r + l`` numbers, s and l its shorter and longer side.

    Args:
      learning_rate: a float or a schedule.
      rank, update_every, scale: r, T and alpha, as in `galore_adamw`.
      b1, b2, eps: of Adam-mini.
      weight_decay: decoupled, on the full weights, times the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      subspace, transfer, side, matrices, key: see `galore_project`.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.galore_adam_mini(1e-2, rank=2)
    >>> params = {"w": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    method = galore_project(
        scale_by_adam_mini(b1=b1, b2=b2, eps=eps),
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
