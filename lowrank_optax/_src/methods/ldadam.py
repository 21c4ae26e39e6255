"""LDAdam (Robert et al. 2024): Adam in a subspace that turns at every step."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from lowrank_optax._src import linalg
from lowrank_optax._src.engines.accept import accept_together
from lowrank_optax._src.engines.rules import leafwise
from lowrank_optax._src.leaves.matrix import Matrices
from lowrank_optax._src.leaves.saving import projected
from lowrank_optax._src.linalg import matmul
from lowrank_optax._src.linalg.products import Lying
from lowrank_optax._src.methods.optimizer import Mask, optimizer
from lowrank_optax._src.parts.checks import check_rank


def scale_by_ldadam(
    rank: int = 16,
    *,
    b1: ArrayLike = 0.908,
    b2: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    rho: ArrayLike = 0.908,
    error_feedback: bool = True,
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""LDAdam: Adam in a subspace renewed at every step, what it misses fed back.

    With A = G + E the gradient and the error kept from the step before, hats for bias
    correction, primes for the new basis and the moments carried to it:

    .. math::
      B &= \rho\, P \hat M + (1 - \rho) A, \quad
      P' = \mathrm{orth}(B B^\top P), \quad C = P'^\top P, \quad R = P'^\top A \\
      M' &= C M, \quad V' = \left| (C \circ C) V + (1 - \beta_2^{t-1})
          \left( (C \hat M)^{\circ 2} - (C \circ C) \hat M^{\circ 2} \right) \right| \\
      E &\leftarrow A - P' R + \tfrac{\beta_1}{1 - \beta_1} (P M - P' M') \\
      M &\leftarrow \beta_1 M' + (1 - \beta_1) R, \quad
      V \leftarrow \beta_2 V' + (1 - \beta_2) R \circ R, \quad
      \Delta = P' \hat M / (\sqrt{\hat V} + \epsilon)

    The first basis is that of the leading singular vectors of the gradient. A matrix
    is seen with its shorter side in front, a square one by its rows. Leaves that are
    not matrices get Adam.

    State of a matrix: ``s r + 2 l r`` numbers, s and l its shorter and longer side,
    and ``m n`` more for the error. To keep the error at a width of its own, wrap:
    ``compress_state(scale_by_ldadam(), {"error": Cast(jnp.bfloat16)})``.

    Args:
      rank: r; the effective rank of a leaf is ``min(rank, m, n)``.
      b1, b2: decays of the moments; also of Adam on the other leaves.
      eps: added outside of the root, after the bias correction.
      rho: weight of the old momentum in the choice of the subspace.
      error_feedback: keep what the subspace misses and add it to the next gradient. A
        clip of gradients chained before this does not see the error.
      matrices: see `project_gradients`.
      key: nothing here is random; as in all methods.

    Returns:
      A transformation without a learning rate.

    Raises:
      TypeError, ValueError: for a rank below 1 or not an int.

    Differs from the reference code in: the error is part of the state, where that code
    keeps it in the gradient's buffer and loses it with a checkpoint; a rank above the
    shorter side is reduced to it.

    References:
      Robert et al., LDAdam: Adaptive Optimization from Low-Dimensional Gradient
      Statistics, ICLR 2025.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.scale_by_ldadam(rank=2)
    >>> params = {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> state.own["basis"]["w"].shape, state.inner_state.mu["w"].shape
    ((4, 2), (2, 6))
    """
    rule = LDAdam(check_rank(rank), b1, b2, rho, eps, error_feedback)
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    return leafwise(rule, dense=adam, side="short_left", matrices=matrices, key=key)


class LDAdamState(NamedTuple):
    """State of one matrix; moments as `optax.ScaleByAdamState` names them.

    Attributes:
      basis: (*batch, m, r).
      error: (*batch, m, n), or (*batch, n, m) where the leaf lies so in memory, or
        ``MaskedNode()`` without error feedback.
      mu, nu: (*batch, r, n).
    """

    basis: jax.Array
    error: Any
    mu: jax.Array
    nu: jax.Array


@dataclasses.dataclass(frozen=True)
class LDAdam:
    """The algorithm on one matrix."""

    rank: int
    b1: Any
    b2: Any
    rho: Any
    eps: Any
    error_feedback: bool

    def state_sizes(self, view):
        # Without the error, which the paper keeps in the gradient.
        return projected(view, self.rank, stored=True)

    def init(self, view):
        r = view.rank(self.rank)
        lying = ("n", "m") if view.turned else ("m", "n")
        return LDAdamState(
            basis=view.zeros("m", r),
            error=view.zeros(*lying) if self.error_feedback else optax.MaskedNode(),
            mu=view.zeros(r, "n"),
            nu=view.zeros(r, "n"),
        )

    @property
    def stages(self):
        return ((self.sketch, self.turn), (self.update, self.finish))

    def start(self, keys, states, count):
        return states, [None] * len(states)

    def dense(self, grad, given):
        return False

    def sketch(self, step, grad, state, given):
        """``A B^T P``: one block power step from the old basis, with B = B(A, M)."""
        mu_hat = state.mu / self._correction(step, grad.array.dtype)
        a, old = self._terms(grad, state), state.basis
        # B^T P and B (B^T P) by their products; B is not formed. P^T P = 1 and, as
        # `update` leaves it, P^T E = 0; or near it where P is stored in bytes, but here
        # the range is what matters.
        z = self.rho * mu_hat + (1 - self.rho) * grad.project(old)
        z = linalg.near_one(z)
        y = self.rho * matmul(old, matmul(mu_hat, z.mT))
        return None, y + (1 - self.rho) * sum(x.sketch(z) for x in a)

    def turn(self, found, states, count):
        """The next bases."""
        return linalg.orthonormalize_each(found, count)

    def update(self, step, grad, state, basis):
        step = step.astype(grad.array.dtype)  # of wide integers, powers would be wider
        b1, b2, t = self.b1, self.b2, step + 1
        old, error, mu, nu = state
        a = self._terms(grad, state)
        correction = self._correction(step, grad.array.dtype)
        mu_hat = mu / correction
        r, c = sum(x.project(basis) for x in a), matmul(basis.mT, old)
        carried = matmul(c, mu)
        if self.error_feedback:
            # A - P' R + ratio (P M - P' M'), all that has a basis in one product.
            ratio = b1 / (1 - b1)
            bases = jnp.concatenate([old, basis], axis=-1)
            kept = jnp.concatenate([ratio * mu, -(r + ratio * carried)], axis=-2)
            error = grad.order(matmul(bases, kept))
            for x in a:  # one after the other, or XLA's GPU backend stores the product
                error = error + x.array

        # (C o C) V and the correction by (C o C) M^2 in one product too.
        seen = 1 - b2**step
        mean = carried / correction
        nu = jnp.abs(matmul(c * c, nu - seen * mu_hat**2) + seen * mean**2)
        mu = b1 * carried + (1 - b1) * r
        nu = b2 * nu + (1 - b2) * r**2
        direction = mu / (1 - b1**t) / (jnp.sqrt(nu / (1 - b2**t)) + self.eps)
        update = grad.of(grad.order(matmul(basis, direction)))
        # All belongs together. What would spoil a number of the basis is seen in a row
        # of R, and one of the error in a column, and a size that would overflow in the
        # square of that.
        new, told_by = LDAdamState(basis, error, mu, nu), (mu, nu)
        return update, accept_together(new, state, update.array, told_by)

    def finish(self, found, states, count):
        return found

    def _terms(self, grad, state):
        """The gradient and the error that was made before: A is their sum.

        A product of each reads less than their sum would, which had to be stored.
        """
        if not self.error_feedback:
            return [grad]
        return [grad, Lying(state.error, grad.turned)]

    def _correction(self, step, dtype):
        """Of the first moment; it starts at zero, where that would be 0 / 0."""
        step = step.astype(dtype)
        return jnp.where(step > 0, 1 - self.b1**step, 1.0)

    def begin(self, grad, state):
        """The first basis: singular vectors of the gradient."""
        return {"basis": linalg.gram_eigh(grad, state.basis.shape[-1])[0]}

    def unset(self, state):
        """Whether there is none yet; a gradient that is not finite leaves none."""
        return jnp.all(state.basis[..., 0] == 0)


def ldadamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 16,
    *,
    b1: ArrayLike = 0.908,
    b2: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    rho: ArrayLike = 0.908,
    error_feedback: bool = True,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask = None,
    matrices: Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """LDAdamW, see `scale_by_ldadam`.

    Args:
      learning_rate: a float or a schedule.
      rank, b1, b2, eps, rho, error_feedback: see `scale_by_ldadam`.
      weight_decay: decoupled, on the full weights, times the learning rate.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      matrices, key: see there.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.ldadamw(1e-3, rank=2)
    >>> params = {"w": jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    """
    method = scale_by_ldadam(
        rank,
        b1=b1,
        b2=b2,
        eps=eps,
        rho=rho,
        error_feedback=error_feedback,
        matrices=matrices,
        key=key,
    )
    return optimizer(method, learning_rate, weight_decay, mask)
