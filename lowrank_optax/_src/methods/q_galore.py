"""Q-GaLore (Zhang et al. 2024): GaLore whose basis is coarse and seldom renewed."""

import jax
import optax
from jax.typing import ArrayLike

from lowrank_optax._src.engines.compress import compress_state
from lowrank_optax._src.engines.project import project_gradients
from lowrank_optax._src.leaves.matrix import Matrices, Side
from lowrank_optax._src.methods.optimizer import Mask, optimizer
from lowrank_optax._src.methods.quantize import quantize_state
from lowrank_optax._src.parts.codec import BlockInt8, PackedInt4
from lowrank_optax._src.parts.laws import Subspace, Transfer
from lowrank_optax._src.parts.refresh import WhenDrifted
from lowrank_optax._src.parts.subspace import TopSingular
from lowrank_optax._src.parts.transfer import Keep


def q_galore_project(
    inner: optax.GradientTransformation,
    *,
    rank: int,
    bits: int = 4,
    update_every: ArrayLike = 200,
    threshold: ArrayLike = 0.4,
    max_stretch: ArrayLike = 16,
    subspace: Subspace = TopSingular(),
    transfer: Transfer = Keep(),
    scale: ArrayLike = 1.0,
    side: Side = "short",
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Q-GaLore: GaLore, its basis in half bytes and renewed when it has turned.

    .. math::
      P \leftarrow \mathrm{int4}(\text{top-}r\text{ left singular vectors of } G)
      \text{ when due},\quad \Delta = s\, P\, \rho(P^\top G)

    A matrix whose subspace hardly turns from one renewal to the next is renewed half as
    often from then on. The basis is stored as integers and not made orthonormal again:
    at 4 bits ``P^T P`` differs from the identity by about a tenth. At a renewal that
    step still uses the basis as it was chosen. Bases below 4,096 numbers stay float32.

    State of a matrix with an Adam inner: ``s r / 2 + 4 ceil(s / 256) r`` bytes for the
    basis at 4 bits, and ``2 l r + 7`` numbers; s and l are its shorter and longer side.

    Args:
      inner: such as ``optax.scale_by_adam()``.
      rank: r, the number of columns of a basis.
      bits: of the basis, 4 (see `PackedInt4`) or 8 (see `BlockInt8`).
      update_every: T, the period at the start; the first update always refreshes.
      threshold, max_stretch: of the lazy renewal, see `WhenDrifted`.
      subspace, transfer, scale, side: see `galore_project`.
      matrices, key: see `project_gradients`.

    Returns:
      A transformation without a learning rate.

    Raises:
      ValueError: for other bits.

    Differs from the reference code in: two numbers really share a byte, where that
    code takes one each; the levels are symmetric; the overlap of whole subspaces
    decides on the renewal, not the cosine of two first vectors, whose sign is
    arbitrary; periods stop growing at ``max_stretch``, and each doubling awaits five
    new renewals. The weights stay as they are: that code has them in 8 bits.

    References:
      Zhang et al., Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive
      Low-Rank Gradients, 2024.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = lro.q_galore_project(optax.scale_by_adam(), rank=32)
    >>> code = tx.init({"w": jnp.ones((256, 300))}).inner_state.basis["w"]
    >>> code.pairs.shape, code.largest.shape
    ((256, 16), (1, 32))
    """
    codecs = {4: PackedInt4(), 8: BlockInt8(signed=True)}
    if bits not in codecs:
        raise ValueError(f"`bits` must be 4 or 8, got {bits!r}.")
    method = project_gradients(
        inner,
        rank=rank,
        subspace=subspace,
        refresh=WhenDrifted(update_every, threshold, max_stretch),
        transfer=transfer,
        scale=scale,
        side=side,
        matrices=matrices,
        key=key,
    )
    return compress_state(method, {"basis": codecs[bits]}, key=key)


def q_galore_adamw_8bit(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    bits: int = 4,
    block: int = 256,
    update_every: ArrayLike = 200,
    threshold: ArrayLike = 0.4,
    max_stretch: ArrayLike = 16,
    subspace: Subspace = TopSingular(),
    transfer: Transfer = Keep(),
    scale: ArrayLike = 0.25,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    side: Side = "short",
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Q-GaLore with the moments of its Adam in bytes, see `q_galore_project`.

    Args:
      learning_rate: a float or a schedule.
      rank, update_every, scale: r, T and alpha, as in `galore_adamw`.
      b1, b2, eps: of Adam; the paper's script has b2 = 0.95.
      bits, threshold, max_stretch, subspace, transfer: see `q_galore_project`.
      block: of the moments, see `quantize_state`.
      weight_decay: decoupled, on the full weights, times the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      side, matrices, key: see `project_gradients`.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.q_galore_adamw_8bit(1e-2, rank=2)
    >>> params = {"w": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    method = q_galore_project(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        rank=rank,
        update_every=update_every,
        bits=bits,
        threshold=threshold,
        max_stretch=max_stretch,
        subspace=subspace,
        transfer=transfer,
        scale=scale,
        side=side,
        matrices=matrices,
        key=key,
    )
    method = quantize_state(method, block=block, key=key)
    return optimizer(method, learning_rate, weight_decay, mask)
