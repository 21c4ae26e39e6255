"""8-bit optimizer states (Dettmers et al. 2022): any optimizer, moments in bytes."""

import jax
import optax
from jax.typing import ArrayLike

from lowrank_optax._src.engines.compress import compress_fields
from lowrank_optax._src.engines.moments import Fields, by_moment
from lowrank_optax._src.kernels.adam import Adam
from lowrank_optax._src.leaves.matrix import Matrices, Side
from lowrank_optax._src.methods.adarankgrad import adaptive_rank
from lowrank_optax._src.methods.galore import galore_project
from lowrank_optax._src.methods.optimizer import Mask, optimizer
from lowrank_optax._src.parts.codec import BlockInt8
from lowrank_optax._src.parts.laws import Recovery, Subspace, Transfer
from lowrank_optax._src.parts.recovery import Drop
from lowrank_optax._src.parts.refresh import Measure
from lowrank_optax._src.parts.subspace import TopSingular
from lowrank_optax._src.parts.transfer import Keep, Rotate


def quantize_state(
    inner: optax.GradientTransformation,
    *,
    bits: int = 8,
    block: int = 256,
    fields: Fields = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Store an optimizer's moments in bytes, by block-wise dynamic quantization.

    .. math::
      q = \mathrm{nearest}(x / \max_{\text{block}} |x|), \quad
      \Delta, x' = \rho(G, q \max_{\text{block}} |x|)

    Every floating-point moment of 4,096 numbers or more takes ``N + 4 ceil(N / block)``
    bytes instead of ``4 N``, embeddings included; smaller ones stay as they are.
    Around `galore_project` and its like, the moments in the subspace are quantized and
    the basis is not.

    Args:
      inner: any Optax transformation, such as ``optax.scale_by_adam()``.
      bits: 8.
      block: numbers that share one float32 scale, see `BlockInt8`.
      fields: names of the state fields to store in bytes; by default all those known
        as first (``mu``, ``trace``, ...) or second moments (``nu``, ...), the latter
        without a sign; a warning names what is of unknown role in a state of other
        libraries. Or ``{name: role}``, the roles "first" for what has signs and
        "second" for what is never negative.
      key: nothing here is random; as in all methods.

    Returns:
      A transformation without a learning rate, if ``inner`` is one.

    Raises:
      TypeError, ValueError: for other bits, a block below 1, or an inner optimizer
        without the fields.

    Differs from bitsandbytes in: what is too small for the map becomes its smallest
    number of that sign, where bitsandbytes rounds second moments to zero; epsilon is
    the inner optimizer's.

    References:
      Dettmers et al., 8-bit Optimizers via Block-wise Quantization, ICLR 2022.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = lro.quantize_state(optax.scale_by_lion())
    >>> params = {"w": jnp.ones((64, 256))}
    >>> code = tx.init(params).inner_state.mu["w"]
    >>> code.index.dtype, code.largest.shape
    (dtype('uint8'), (64, 1))
    """
    return _in_bytes(inner, bits, block, fields, key)


def _in_bytes(
    inner: optax.GradientTransformation,
    bits: int,
    block: int,
    fields: Fields,
    key: int | jax.Array,
    adam: Adam | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`quantize_state`; ``adam`` as of `compress_fields`."""
    if bits != 8:
        raise ValueError(f"`bits` must be 8, the only width there is; got {bits!r}.")
    choose = by_moment(BlockInt8(True, block), BlockInt8(False, block), fields)
    return compress_fields(inner, choose, matrices=None, key=key, adam=adam)


def adamw_8bit(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    block: int = 256,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with both moments in bytes, see `quantize_state`.

    Args:
      learning_rate: a float or a schedule.
      b1, b2, eps: of Adam.
      weight_decay: decoupled, times the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      block, key: see `quantize_state`.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.adamw_8bit(1e-3)
    >>> params = {"w": jnp.ones((64, 64))}
    >>> lro.state_bytes(tx, params)  # 2 (N + N / 64) and two counters
    8328
    """
    inner = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    method = _in_bytes(inner, 8, block, None, key, adam=Adam(b1, b2, eps, 0.0))
    return optimizer(method, learning_rate, weight_decay, mask)


def galore_adamw_8bit(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    block: int = 256,
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
    """GaLore with the moments of its Adam in bytes, see `galore_project`.

    Args:
      learning_rate: a float or a schedule.
      rank, update_every, scale: r, T and alpha, as in `galore_adamw`.
      b1, b2, eps: of Adam.
      weight_decay: decoupled, on the full weights, times the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      subspace, transfer, side, matrices, key: see `galore_project`.
      block: see `quantize_state`.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.galore_adamw_8bit(1e-2, rank=32)
    >>> state = tx.init({"w": jnp.ones((64, 128))})
    >>> state[0].inner_state.inner_state.nu["w"].index.shape
    (32, 128)
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
    method = quantize_state(method, block=block, key=key)
    return optimizer(method, learning_rate, weight_decay, mask)


def adarankgrad_adamw_8bit(
    learning_rate: optax.ScalarOrSchedule,
    max_rank: int = 128,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    min_rank: int = 1,
    max_residual_energy: ArrayLike = 0.1,
    block: int = 256,
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
    """AdaRankGrad with the moments of its Adam in bytes, see `adaptive_rank`.

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
      block: see `quantize_state`.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.adarankgrad_adamw_8bit(1e-2, max_rank=64)
    >>> state = tx.init({"w": jnp.ones((64, 256))})
    >>> state[0].inner_state.inner_state.nu["w"].index.shape
    (64, 64)
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
    method = quantize_state(method, block=block, key=key)
    return optimizer(method, learning_rate, weight_decay, mask)
