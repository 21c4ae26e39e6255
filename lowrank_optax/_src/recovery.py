"""What is done with what the projection leaves out."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._src.linalg import matmul

Per = Literal["channel", "tensor"]


@dataclasses.dataclass(frozen=True)
class Drop:
    """Nothing: the update is ``scale * P N``, as in GaLore."""

    def init(self, view):
        return optax.MaskedNode()

    def prepare(self, grad, state):
        return grad

    def recover(self, grad, coeff, direction, basis, scale, state):
        return scale * matmul(basis, direction), state


class FiraState(NamedTuple):
    """State of `FiraResidual` with a limiter.

    Attributes:
      norm: of the scaled residual last added, one number a matrix.
      age: updates made, int32, in the reference form only.
    """

    norm: jax.Array
    age: Any


@dataclasses.dataclass(frozen=True)
class FiraResidual:
    """The residual is added, its columns scaled as the inner optimizer scaled theirs.

    ``scale P N + limit((G - P R) diag(phi))`` with ``phi_j = |N_j| / |R_j|``: Fira. The
    limiter lets the norm of the second term grow by at most a factor a step. A norm of
    zero, as a zero gradient leaves behind, counts as a first call: nothing is limited.
    It needs a basis with orthonormal columns.

    Args:
      limiter: the factor; None or infinity for none.
      reference: None for the paper's form. ``(b1, b2)`` of an Adam inner for that of
        Fira's code: the residual is ``G - scale P R``, and the limiter sees it before
        Adam's bias correction.

    >>> import optax, lowrank_optax as lro
    >>> tx = lro.project_gradients(
    ...     optax.scale_by_adam(), rank=4, recovery=lro.FiraResidual(limiter=None)
    ... )
    """

    limiter: Any = 1.01
    reference: tuple[Any, Any] | None = None

    def __post_init__(self):
        _check_limiter(self.limiter)

    def init(self, view):
        if _unlimited(self.limiter):
            return optax.MaskedNode()
        counted = self.reference is not None
        age = view.zeros(dtype=jnp.int32) if counted else optax.MaskedNode()
        return FiraState(view.zeros(), age)

    def prepare(self, grad, state):
        return grad

    def recover(self, grad, coeff, direction, basis, scale, state):
        share = 1.0 if self.reference is None else scale
        inside = _column_norms(coeff)
        phi = _column_norms(direction) / (inside + 1e-8)
        if not _unlimited(self.limiter):
            # By Pythagoras, so that the residual need not be formed for its norm.
            outside = _column_norms(grad) ** 2 - (2 - share) * share * inside**2
            size = jnp.sqrt(jnp.sum(phi**2 * jnp.maximum(outside, 0.0), (-2, -1)))
            factor, state = self._limit(size, state)
            phi = phi * factor[..., None, None]
        within = scale * direction - share * phi * coeff
        return phi * grad + matmul(basis, within), state

    def _limit(self, size, state):
        """What a residual of this norm is multiplied with, and the next state."""
        age = state.age
        if self.reference is not None:
            b1, b2 = self.reference
            age = age + 1
            size = size * (1 - b1**age) / jnp.sqrt(1 - b2**age)
        factor, norm = _limit_growth(self.limiter, size, state.norm)
        return factor, FiraState(norm, age)


def _check_limiter(limiter) -> None:
    if isinstance(limiter, (int, float)) and not limiter >= 1:
        raise ValueError(
            f"`limiter` must be at least 1, got {limiter}: it is the factor by which "
            "the norm may grow a step. Give None for no limit."
        )


def _limit_growth(limiter, size, before):
    """What something of this norm is multiplied with, and the norm it then has.

    It may be ``limiter`` times that of before, or anything where that was zero.
    """
    allowed = jnp.where(before < 1e-8, jnp.inf, limiter * before)
    factor = jnp.where(size > allowed, allowed / size, 1.0)
    return factor, jnp.minimum(size, allowed)


def _unlimited(limiter) -> bool:
    return limiter is None or (isinstance(limiter, float) and math.isinf(limiter))


def _column_norms(x):
    return jnp.linalg.norm(x, axis=-2, keepdims=True)


class ScaleState(NamedTuple):
    """State of `ScaleGradient` with a limiter.

    Attributes:
      norm: of the scaled gradient last used, one number a matrix.
    """

    norm: jax.Array


@dataclasses.dataclass(frozen=True)
class ScaleGradient:
    """The gradient itself, scaled as the inner optimizer scaled its projection: APOLLO.

    ``scale limit(G diag(phi))`` with ``phi_j = |N_j| / |R_j|``, for each column or for
    the whole matrix. The subspace only serves to measure phi. The limiter lets the norm
    grow by at most a factor a step; a norm of zero, as a zero gradient leaves behind,
    counts as a first call.

    Args:
      per: one phi for each "channel" (column), or for the "tensor" (matrix).
      limiter: the factor; None or infinity for none.

    >>> import optax, lowrank_optax as lro
    >>> tx = lro.project_gradients(
    ...     optax.scale_by_adam(), rank=1, recovery=lro.ScaleGradient(per="tensor")
    ... )
    """

    per: Per = "channel"
    limiter: Any = 1.01

    def __post_init__(self):
        if self.per not in get_args(Per):
            raise ValueError(
                f"Unknown granularity {self.per!r}: `per` must be one of "
                f"{', '.join(get_args(Per))}."
            )
        _check_limiter(self.limiter)

    def init(self, view):
        if _unlimited(self.limiter):
            return optax.MaskedNode()
        return ScaleState(view.zeros())

    def prepare(self, grad, state):
        return grad

    def recover(self, grad, coeff, direction, basis, scale, state):
        axis = -2 if self.per == "channel" else (-2, -1)
        ratio = jnp.linalg.norm(direction, axis=axis, keepdims=True)
        ratio /= jnp.linalg.norm(coeff, axis=axis, keepdims=True) + 1e-8
        scaled = ratio * grad
        if not _unlimited(self.limiter):
            size = jnp.linalg.norm(scaled, axis=(-2, -1))
            factor, norm = _limit_growth(self.limiter, size, state.norm)
            scaled, state = factor[..., None, None] * scaled, ScaleState(norm)
        return scale * scaled, state
