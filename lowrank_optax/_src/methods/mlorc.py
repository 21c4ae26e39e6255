"""MLorc (Shen et al. 2025): optimizers whose momentum is stored at low rank."""

import dataclasses

import jax
import optax
from jax.typing import ArrayLike

from lowrank_optax._src.engines.compress import compress_fields
from lowrank_optax._src.engines.moments import Fields, by_moment
from lowrank_optax._src.engines.rules import leafwise
from lowrank_optax._src.leaves.matrix import Matrices
from lowrank_optax._src.methods.mlorc_rules import MLorcAdam, MLorcLion
from lowrank_optax._src.methods.optimizer import Mask, optimizer
from lowrank_optax._src.parts.bounds import bounded
from lowrank_optax._src.parts.low_rank import LowRank


def mlorc_compress(
    inner: optax.GradientTransformation,
    *,
    rank: int = 4,
    fields: Fields = None,
    oversample: int = 4,
    power_iters: int = 0,
    warm_start: bool = True,
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """MLorc around any optimizer that has momentum.

    Its moments are stored as rank-r factors, reconstructed for the update, and
    compressed again afterwards; the update itself uses the exact new moments. Nothing
    bounds it: after an outlier, a second moment that was compressed divides by far too
    little where it lost what it was. `mlorc_scale_by_adam` cuts such updates off.

    Args:
      inner: such as ``optax.trace(0.9)``, ``optax.scale_by_lion()``.
      rank: r, the width of the thin arrays.
      fields: names of the state fields to compress; by default all those known as
        first (``mu``, ``trace``, ...) or second moments (``nu``, ...), the latter
        non-negative; a warning names what is of unknown role in a state of other
        libraries. Or ``{name: role}``, the roles "first" for what has signs and
        "second" for what is never negative.
      oversample, power_iters, warm_start: the sketch, see `LowRank`.
      matrices, key: see `project_gradients`.

    Returns:
      A transformation without a learning rate, if ``inner`` is one.

    Raises:
      ValueError: if the inner optimizer has no momentum field.

    References:
      Shen et al., MLorc: Momentum Low-rank Compression for Memory Efficient Large
      Language Model Adaptation, 2025.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = lro.mlorc_compress(optax.trace(decay=0.9), rank=2)
    >>> state = tx.init({"w": jnp.ones((8, 6))})
    >>> state.inner_state.trace["w"].right.shape
    (2, 8)
    """
    first = LowRank(rank, False, oversample, power_iters, warm_start)
    second = dataclasses.replace(first, nonnegative=True)
    choose = by_moment(first, second, fields)
    return compress_fields(inner, choose, matrices=matrices, key=key)


def mlorc_scale_by_adam(
    rank: int = 4,
    *,
    b1: ArrayLike = 0.8,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    oversample: int = 4,
    power_iters: int = 0,
    warm_start: bool = True,
    compress: tuple[str, ...] = ("mu", "nu"),
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with both moments at low rank: MLorc-AdamW, Algorithm 1.

    .. math::
      M &= \beta_1 \tilde M + (1 - \beta_1) G, \quad
      V = \beta_2 \left(\tilde V_+ + \zeta\,[\tilde V < 0]\right)
          + (1 - \beta_2)\, G \circ G \\
      \Delta &= \hat M / (\sqrt{\hat V} + \epsilon), \quad
      (\tilde M, \tilde V) \leftarrow (\mathrm{lowrank}_r(M), \mathrm{lowrank}_r(V))

    with zeta the mean magnitude of the negative entries (equation 2). The update uses
    the exact M and V of the step. State: ``2 r (m + n)`` numbers a matrix. The sketch
    of M is made from its factors and G; neither M nor its predecessor is formed for it.
    Leaves that are not matrices get Adam.

    Args:
      rank: r, the width of the thin arrays.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added outside of the root, after the bias correction.
      oversample, power_iters, warm_start: the sketch, see `LowRank`. The default was
        chosen by its error on real gradients; the paper's code has 0, 1, False.
      compress: ``("mu",)`` or ``("nu",)`` are the ablations MLorc_m and MLorc_v.
      matrices, key: see `project_gradients`.

    Returns:
      A transformation without a learning rate.

    Differs from the reference code in: ``b1`` is the paper's, that code has 0.9 (ML-7);
    leaves that are not matrices are trained, where it skips them (ML-8); epsilon is
    added to the corrected root, there to the uncorrected one and in the paper inside of
    it (ML-2), for which there is ``mlorc_compress(optax.scale_by_adam(eps_root=...))``;
    arithmetic is in float32 at least, there in the parameters' dtype. With both moments
    compressed, what a gradient adds to an entry of V, and its mean square in M, have a
    bound that ordinary ones keep, also at full rank: a tenth of ``sqrt(m n)`` times the
    mean of V, of a hundred gradients at least. Beside an outlier, the factors of V
    would lose all else. Entries of an update are cut off at the most that Adam's
    moments allow, 10.5 by default.

    References:
      Shen et al., MLorc: Momentum Low-rank Compression for Memory Efficient Large
      Language Model Adaptation, 2025.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = optax.chain(
    ...     lro.mlorc_scale_by_adam(rank=2), optax.scale_by_learning_rate(1e-2)
    ... )
    >>> params = {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    if not compress or not set(compress) <= {"mu", "nu"}:
        raise ValueError(
            f"`compress` must name 'mu', 'nu' or both, got {compress!r}; with neither, "
            "use optax.scale_by_adam."
        )
    if set(compress) == {"mu", "nu"}:
        mu = LowRank(rank, False, oversample, power_iters, warm_start)
        nu = dataclasses.replace(mu, nonnegative=True)
        rule = MLorcAdam(b1, b2, eps, mu, nu)
        return leafwise(rule, dense=adam, side="short_left", matrices=matrices, key=key)
    return mlorc_compress(
        bounded(adam, b1, b2),
        rank=rank,
        fields=tuple(compress),
        oversample=oversample,
        power_iters=power_iters,
        warm_start=warm_start,
        matrices=matrices,
        key=key,
    )


def mlorc_scale_by_lion(
    rank: int = 4,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    oversample: int = 4,
    power_iters: int = 0,
    warm_start: bool = True,
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Lion with its momentum at low rank: MLorc-Lion, Algorithm 2.

    .. math::
      \Delta = \mathrm{sign}(\beta_1 \tilde M + (1 - \beta_1) G), \quad
      \tilde M \leftarrow \mathrm{lowrank}_r(\beta_2 \tilde M + (1 - \beta_2) G)

    State: ``r (m + n)`` numbers a matrix; no momentum is ever formed at full size.
    Leaves that are not matrices get Lion.

    Args:
      rank: r, the width of the thin arrays.
      b1, b2: the two decays.
      oversample, power_iters, warm_start: the sketch, see `LowRank`. The paper's code
        has 0, 0, False here.
      matrices, key: see `project_gradients`.

    Returns:
      A transformation without a learning rate.

    Differs from the reference code in: leaves that are not matrices are trained, where
    that code skips them (ML-8); its decays are 0.95 and 0.98, the defaults here those
    of Lion.

    References:
      Shen et al., MLorc: Momentum Low-rank Compression for Memory Efficient Large
      Language Model Adaptation, 2025.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = lro.mlorc_scale_by_lion(rank=2)
    >>> params = {"w": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    mu = LowRank(rank, False, oversample, power_iters, warm_start)
    lion = optax.scale_by_lion(b1=b1, b2=b2)
    rule = MLorcLion(b1, b2, mu)
    return leafwise(rule, dense=lion, side="short_left", matrices=matrices, key=key)


def mlorc_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 4,
    *,
    b1: ArrayLike = 0.8,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    oversample: int = 4,
    power_iters: int = 0,
    warm_start: bool = True,
    compress: tuple[str, ...] = ("mu", "nu"),
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """MLorc-AdamW, see `mlorc_scale_by_adam`.

    Args:
      learning_rate: a float or a schedule.
      rank, b1, b2, eps, oversample, power_iters, warm_start, compress: see
        `mlorc_scale_by_adam`.
      weight_decay: decoupled, on the full weights, times the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      matrices, key: see `project_gradients`.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.mlorc_adamw(1e-3, rank=2)
    >>> params = {"w": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    method = mlorc_scale_by_adam(
        rank,
        b1=b1,
        b2=b2,
        eps=eps,
        oversample=oversample,
        power_iters=power_iters,
        warm_start=warm_start,
        compress=compress,
        matrices=matrices,
        key=key,
    )
    return optimizer(method, learning_rate, weight_decay, mask)


def mlorc_lion(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 4,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    oversample: int = 4,
    power_iters: int = 0,
    warm_start: bool = True,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """MLorc-Lion, see `mlorc_scale_by_lion`.

    Args:
      learning_rate: a float or a schedule.
      rank, b1, b2, oversample, power_iters, warm_start: see `mlorc_scale_by_lion`.
      weight_decay: decoupled, on the full weights, times the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      matrices, key: see `project_gradients`.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.mlorc_lion(1e-4, rank=2)
    >>> params = {"w": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    method = mlorc_scale_by_lion(
        rank,
        b1=b1,
        b2=b2,
        oversample=oversample,
        power_iters=power_iters,
        warm_start=warm_start,
        matrices=matrices,
        key=key,
    )
    return optimizer(method, learning_rate, weight_decay, mask)
