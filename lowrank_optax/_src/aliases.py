"""Whole optimizers: a method, decoupled weight decay in full space, a learning rate."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from lowrank_optax._src.matrix import Matrices, Side
from lowrank_optax._src.methods.adafactor import scale_by_adafactor
from lowrank_optax._src.methods.galore import galore_project
from lowrank_optax._src.methods.mlorc import mlorc_scale_by_adam, mlorc_scale_by_lion
from lowrank_optax._src.subspace import TopSingular
from lowrank_optax._src.transfer import Keep
from lowrank_optax._src.typing import Subspace, Transfer

LearningRate = float | jax.Array | Callable[[Any], Any]


def optimizer(
    method: optax.GradientTransformation,
    learning_rate: LearningRate,
    weight_decay: Any,
    mask: Any,
) -> optax.GradientTransformationExtraArgs:
    """A method, decoupled weight decay (``mask`` as in optax), and a learning rate."""
    return optax.chain(
        method,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def galore_adamw(
    learning_rate: LearningRate,
    rank: int = 128,
    update_every: Any = 200,
    scale: Any = 0.25,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    mask: Any = None,
    subspace: Subspace = TopSingular(),
    transfer: Transfer = Keep(),
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
      weight_decay: decoupled, on the full weights, times the learning rate.
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


def galore_adafactor(
    learning_rate: LearningRate,
    rank: int = 128,
    update_every: Any = 200,
    scale: Any = 0.25,
    *,
    decay_rate: Any = 0.8,
    clipping_threshold: Any = 1.0,
    momentum: Any = None,
    weight_decay: Any = 0.0,
    mask: Any = None,
    subspace: Subspace = TopSingular(),
    transfer: Transfer = Keep(),
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
    inner = scale_by_adafactor(decay_rate, clipping_threshold)
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


def mlorc_adamw(
    learning_rate: LearningRate,
    rank: int = 4,
    *,
    b1: Any = 0.8,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    mask: Any = None,
    oversample: int = 4,
    power_iters: int = 0,
    warm_start: bool = True,
    compress: tuple[str, ...] = ("mu", "nu"),
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """MLorc-AdamW, see `mlorc_scale_by_adam`.

    Args:
      learning_rate: a float or a schedule.
      rank, b1, b2, eps: of the method.
      weight_decay, mask: decoupled, on the full weights, times the learning rate.
      oversample, power_iters, warm_start, compress: see `mlorc_scale_by_adam`.
      matrices, key: see `project_gradients`.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.mlorc_adamw(1e-3, rank=2)
    >>> params = {"w": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    method = mlorc_scale_by_adam(
        rank,
        b1,
        b2,
        eps,
        oversample=oversample,
        power_iters=power_iters,
        warm_start=warm_start,
        compress=compress,
        matrices=matrices,
        key=key,
    )
    return optimizer(method, learning_rate, weight_decay, mask)


def mlorc_lion(
    learning_rate: LearningRate,
    rank: int = 4,
    *,
    b1: Any = 0.9,
    b2: Any = 0.99,
    weight_decay: Any = 0.0,
    mask: Any = None,
    oversample: int = 4,
    power_iters: int = 0,
    warm_start: bool = True,
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """MLorc-Lion, see `mlorc_scale_by_lion`.

    Args:
      learning_rate: a float or a schedule.
      rank, b1, b2: of the method.
      weight_decay, mask: decoupled, on the full weights, times the learning rate.
      oversample, power_iters, warm_start: see `mlorc_scale_by_lion`.
      matrices, key: see `project_gradients`.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.mlorc_lion(1e-4, rank=2)
    >>> params = {"w": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    method = mlorc_scale_by_lion(
        rank,
        b1,
        b2,
        oversample=oversample,
        power_iters=power_iters,
        warm_start=warm_start,
        matrices=matrices,
        key=key,
    )
    return optimizer(method, learning_rate, weight_decay, mask)
