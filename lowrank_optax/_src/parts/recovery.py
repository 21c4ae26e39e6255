"""What is done with what the projection leaves out."""

import dataclasses
import math
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._src.linalg import matmul
from lowrank_optax._src.linalg.meshes import gathered, whole_product
from lowrank_optax._src.parts import compatible
from lowrank_optax._src.parts.bounds import cut_off
from lowrank_optax._src.parts.checks import check_choice, check_range

Per = Literal["channel", "tensor"]


@dataclasses.dataclass(frozen=True)
class Drop:
    """Nothing: the update is ``scale * P N``, as in GaLore."""

    provides: ClassVar[tuple[str, ...]] = (compatible.COEFFICIENTS,)

    def init(self, view):
        return optax.MaskedNode()

    def prepare(self, grad, state):
        return grad

    def recover(self, grad, coeff, direction, basis, scale, state):
        return matmul(basis, scale * direction), state


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
    A column of the residual below 1.4e-3 of the gradient's counts as so long, since
    rounding may leave nothing of its norm, or too much. It needs a basis with
    orthonormal columns.

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
    requires: ClassVar[tuple[str, ...]] = (compatible.ORTHONORMAL,)

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
            whole = grad.column_norms() ** 2
            outside = whole - (2 - share) * share * inside**2
            outside = jnp.maximum(outside, 16 * jnp.finfo(inside.dtype).eps * whole)
            size = jnp.sqrt(jnp.sum(phi**2 * outside, (-2, -1)))
            factor, state = self._limit(size, state)
            phi = phi * factor[..., None, None]
        # With phi as the last factor, XLA adds the gradient where it makes the product.
        unit = jnp.where(phi > 0, direction / jnp.where(phi > 0, phi, 1.0), 0.0)
        within = matmul(basis, scale * unit - share * coeff)
        return grad.of((grad.array + grad.order(within)) * grad.order(phi)), state

    def _limit(self, size, state):
        """What a residual of this norm is multiplied with, and the next state."""
        age = state.age
        if self.reference is not None:
            b1, b2 = self.reference
            age = jnp.asarray(optax.safe_increment(age))
            t = age.astype(size.dtype)  # of wide integers, powers would be wider
            size = size * (1 - b1**t) / jnp.sqrt(1 - b2**t)
        factor, norm = _limit_growth(self.limiter, size, state.norm)
        return factor, FiraState(norm, age)


def _check_limiter(limiter) -> None:
    why = ": it is the factor by which the norm may grow a step. None is for no limit"
    check_range(limiter, "limiter", 1, because=why)


def _limit_growth(limiter, size, before):
    """What something of this norm is multiplied with, and the norm it then has.

    It may be ``limiter`` times that of before, or anything where that was zero.
    """
    allowed = jnp.where(before < 1e-8, jnp.inf, limiter * before)
    above = size > allowed
    # The quotient only of what is limited: that of infinity has no derivative.
    factor = jnp.where(above, allowed, 1.0) / jnp.where(above, size, 1.0)
    return factor, jnp.where(above, allowed, size)


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
    # Only norms of the direction are used, which have no signs.
    provides: ClassVar[tuple[str, ...]] = (compatible.ALIGNED,)

    def __post_init__(self):
        check_choice(self.per, "per", Per)
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
        if not _unlimited(self.limiter):
            size = jnp.linalg.norm(ratio * grad.column_norms(), axis=(-2, -1))
            factor, norm = _limit_growth(self.limiter, size, state.norm)
            ratio, state = factor[..., None, None] * ratio, ScaleState(norm)
        return grad.of(grad.order(scale * ratio) * grad.array), state


class SparseState(NamedTuple):
    """State of `SparseResidual`: 12 bytes a kept entry.

    Attributes:
      index: (*batch, kept), int32, place of each entry in its matrix, row by row.
      mean: (*batch, kept), first moment of the residual there.
      square: (*batch, kept), second moment of the whole gradient there.
      age: updates made, int32, one number a matrix.
    """

    index: jax.Array
    mean: jax.Array
    square: jax.Array
    age: jax.Array


@dataclasses.dataclass(frozen=True)
class SparseResidual:
    """Adam on a few entries of the residual: GaLore+'s sparsely coded residual.

    After a warm-up, the largest entries of ``|P M|``, M the inner optimizer's first
    moment, are chosen once for all (GP-10), and to their updates is added

      dG = G - P P^T G,  dM <- b1 dM + (1 - b1) dG,  V <- b2 V + (1 - b2) G^2,
      delta = dM / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps)

    with t the updates since then (GP-8). As dM and V are moments of different
    gradients, delta is cut off at what Adam can reach, 7.3 with 0.9 and 0.999: an
    outlier elsewhere in a column would be unbounded here.

    V is the second moment of the gradient itself (GP-2), which the paper puts together
    from ``P V'``, no second moment (GP-1), and a residual that can be negative. Values
    stay over refreshes (GP-9). No m x n array is formed but the update (GP-16).

    Args:
      density: share of the entries that is kept; a Python float, as it decides shapes.
      warmup: updates before the choice, at least 1; the moments must have formed.
      b1, b2, eps: of Adam.
      residual_scale: multiplies delta; None for the engine's scale (GP-5).

    >>> import optax, lowrank_optax as lro
    >>> tx = lro.project_gradients(
    ...     optax.scale_by_adam(), rank=4, recovery=lro.SparseResidual(warmup=100)
    ... )
    """

    density: float = 0.012
    warmup: Any = 200
    b1: Any = 0.9
    b2: Any = 0.999
    eps: Any = 1e-8
    residual_scale: Any = None
    requires: ClassVar[tuple[str, ...]] = (compatible.ORTHONORMAL,)

    def __post_init__(self):
        if not isinstance(self.density, (int, float)):
            raise TypeError(
                "`density` must be a Python float, as it decides shapes; got "
                f"{self.density!r}. To inject hyperparameters, use "
                "lowrank_optax.inject_hyperparams, which keeps it static."
            )
        check_range(self.density, "density", 0, 1, above=True)
        check_range(self.warmup, "warmup", 1)

    def init(self, view):
        if view.m * view.n >= 2**31:
            raise ValueError(
                f"Cannot keep single entries of parameter '{view.path}' of shape "
                f"{view.shape}: an int32 does not count its {view.m * view.n} entries."
            )
        kept = max(1, round(self.density * view.m * view.n))
        return SparseState(
            index=view.zeros(kept, dtype=jnp.int32),
            mean=view.zeros(kept),
            square=view.zeros(kept),
            age=view.zeros(dtype=jnp.int32),
        )

    def prepare(self, grad, state):
        return grad

    def recover(self, grad, coeff, direction, basis, scale, state):
        update, grad = matmul(basis, scale * direction), grad.matrix
        *batch, m, n = grad.shape
        row, col = state.index // n, state.index % n
        stack = jnp.arange(math.prod(batch)).reshape(*batch, 1)
        # Which matrix of the stack, row and column of each entry.
        place = (stack, row, col)
        entry = grad.reshape(-1, m, n)[place]
        inside = _entries_of_product(basis, coeff, row, col)

        age = jnp.asarray(optax.safe_increment(state.age))
        t = jnp.maximum(age - self.warmup, 0)[..., None]
        mean = self.b1 * state.mean + (1 - self.b1) * (entry - inside)
        square = self.b2 * state.square + (1 - self.b2) * entry**2
        mean, square = jnp.where(t > 0, mean, 0.0), jnp.where(t > 0, square, 0.0)
        t = jnp.maximum(t, 1).astype(mean.dtype)  # as in `FiraResidual`
        root = jnp.sqrt(square / (1 - self.b2**t))
        delta = mean / (1 - self.b1**t) / (root + self.eps)
        delta = cut_off(delta, self.b1, self.b2)
        if self.residual_scale is not None:
            scale = self.residual_scale
        update = update.reshape(-1, m, n).at[place].add(scale * delta)
        return update.reshape(grad.shape), SparseState(state.index, mean, square, age)

    def ready(self, state):
        """Whether the warm-up has just ended."""
        return jnp.all(state.age == self.warmup)

    def observe(self, basis, moments, known, state):
        first = [
            x
            for name, x in moments.items()
            if known[name] == "first" and x.shape[-2:-1] == basis.shape[-1:]
        ]
        if not first:
            raise ValueError(
                "Cannot use SparseResidual with an inner optimizer without momentum: "
                "it requires a first moment, and the state has the fields "
                f"{', '.join(moments) or 'none'}. Use optax.scale_by_adam()."
            )
        kept = state.index.shape[-1]
        return state._replace(index=_largest_entries(basis, first[0], kept))


def _entries_of_product(left, right, row, col):
    """``(left @ right)[row, col]``, so many at a time that m n / 8 numbers suffice."""
    *batch, count = row.shape
    (m, r), n = left.shape[-2:], right.shape[-1]
    # Of factors that are split, each block would be a sum over the devices.
    left, right = gathered(left), whole_product(right)
    blocks = -(-8 * r * count // (m * n))
    size = -(-count // blocks)

    def cut(x):
        x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, blocks * size - count)])
        return jnp.moveaxis(x.reshape(*batch, blocks, size), -2, 0)

    def entries(_, place):
        row, col = (x[..., None] for x in place)
        start = jnp.take_along_axis(left, row, axis=-2)
        return _, jnp.sum(start * jnp.take_along_axis(right.mT, col, axis=-2), axis=-1)

    found = jax.lax.scan(entries, None, (cut(row), cut(col)))[1]
    return jnp.moveaxis(found, 0, -2).reshape(*batch, -1)[..., :count]


def _largest_entries(basis, moment, count):
    """Where ``|basis @ moment|`` is largest, some of its rows at a time.

    They have m n / 8 numbers, of all matrices of a stack together, or as many as are
    kept.
    """
    *batch, m, _ = basis.shape
    n = moment.shape[-1]
    rows = max(-(-m // (8 * math.prod(batch))), -(-count // n))
    blocks = -(-m // rows)
    pad = [(0, 0)] * len(batch) + [(0, blocks * rows - m), (0, 0)]
    padded = jnp.pad(basis, pad)

    def merge(best, block):
        start = block * rows
        part = jax.lax.dynamic_slice_in_dim(padded, start, rows, axis=-2)
        places = jnp.arange(rows * n, dtype=jnp.int32)
        place = jnp.broadcast_to(start * n + places, (*batch, rows * n))
        size = jnp.abs(matmul(part, moment)).reshape(place.shape)
        size = jnp.where(place < m * n, size, -1.0)
        place = jnp.concatenate([best[1], place], axis=-1)
        size, chosen = jax.lax.top_k(jnp.concatenate([best[0], size], -1), count)
        return (size, jnp.take_along_axis(place, chosen, -1)), None

    nothing = jnp.full((*batch, count), -1.0, moment.dtype)
    start = (nothing, jnp.zeros(nothing.shape, jnp.int32))
    return jax.lax.scan(merge, start, jnp.arange(blocks, dtype=jnp.int32))[0][1]
