"""MLorc's algorithms on one matrix."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike

from lowrank_optax._src.kernels.dispatch import active
from lowrank_optax._src.leaves import saving
from lowrank_optax._src.linalg.thin import each
from lowrank_optax._src.parts.bounds import cut_off
from lowrank_optax._src.parts.factors import (
    LowRankCode,
    clamp_negative,
    low_rank_product,
    negative_mean,
)
from lowrank_optax._src.parts.low_rank import (
    Average,
    LowRank,
    best_codes,
    sketches,
    with_kept,
)


class MLorcAdamState(NamedTuple):
    """Both moments of one matrix, as `optax.ScaleByAdamState` names them."""

    mu: LowRankCode
    nu: LowRankCode


class MLorcLionState(NamedTuple):
    """The momentum of one matrix, as `optax.ScaleByLionState` names it."""

    mu: LowRankCode


@dataclasses.dataclass(frozen=True)
class MLorcAdam:
    """Algorithm 1 on one matrix."""

    b1: ArrayLike
    b2: ArrayLike
    eps: ArrayLike
    mu: LowRank
    nu: LowRank
    dense: ClassVar[bool] = True  # V

    @property
    def stages(self):
        return ((self.update, self.finish),)

    @property
    def state_sizes(self):
        return saving.coded((self.mu, self.nu))

    def init(self, view):
        return MLorcAdamState(self.mu.init(view), self.nu.init(view))

    def start(self, keys, states, count):
        mus, nus = ([s[k] for s in states] for k in (0, 1))
        omegas, kept = self.mu.prepare(keys, mus, count)
        pairs = zip(omegas, self.nu.draw(keys, nus, count), strict=True)
        zeta = each(negative_mean, nus, count)
        return list(zip(pairs, kept, zeta, strict=True))

    def update(self, step, grad, state, given):
        omegas, kept, zeta = given
        g, t, b1, b2 = grad.array, step + 1, self.b1, self.b2
        m = b1 * low_rank_product(state.mu, grad.turned) + (1 - b1) * g
        v_old = low_rank_product(state.nu, grad.turned)
        v = b2 * clamp_negative(v_old, zeta) + (1 - b2) * g**2
        m_hat, v_hat = m * (1 / (1 - b1**t)), v * (1 / (1 - b2**t))
        moments = Average(b1, state.mu, grad, kept), grad.of(v)
        found = self._sketches(grad, moments, state, given)
        # A V that has lost an entry's part would let it go further.
        update = cut_off(m_hat / (jnp.sqrt(v_hat) + self.eps), b1, b2)
        return grad.of(update), found

    def _sketches(self, grad, moments, state, given):
        """The sketches of both; by kernels where those are wanted, which store no V."""
        codecs, omegas = (self.mu, self.nu), given[0]

        def plain():
            return sketches(codecs, omegas, moments, state)

        if not active(grad.array):
            return plain()
        from lowrank_optax._src.kernels import mlorc

        if not mlorc.suits(grad, codecs, omegas):
            return plain()
        return mlorc.adam_sketches((self.b1, self.b2), grad, state, given, plain)

    def finish(self, found, states, count):
        mus, nus = ([s[k] for s in states] for k in (0, 1))
        mu, nu = ([x[k] for x in found] for k in (0, 1))
        mu, leaf = with_kept(mu, mus, self.b1, count), list(range(len(states)))
        codes = best_codes(mu + nu, mus + nus, leaf + leaf, count)
        size = len(states)
        return list(map(MLorcAdamState, codes[:size], codes[size:]))


@dataclasses.dataclass(frozen=True)
class MLorcLion:
    """Algorithm 2 on one matrix."""

    b1: ArrayLike
    b2: ArrayLike
    mu: LowRank
    dense: ClassVar[bool] = False

    @property
    def stages(self):
        return ((self.update, self.finish),)

    @property
    def state_sizes(self):
        return saving.coded((self.mu,))

    def init(self, view):
        return MLorcLionState(self.mu.init(view))

    def start(self, keys, states, count):
        prepared = self.mu.prepare(keys, [s.mu for s in states], count)
        return list(zip(*prepared, strict=True))

    def update(self, step, grad, state, given):
        kept = low_rank_product(state.mu, grad.turned)
        c = self.b1 * kept + (1 - self.b1) * grad.array
        omega, sketched = given
        average = Average(self.b2, state.mu, grad, sketched)
        found = sketches([self.mu], [omega], [average], state)
        return grad.of(jnp.sign(c)), found

    def finish(self, found, states, count):
        old = [state.mu for state in states]
        found = with_kept([sketch for (sketch,) in found], old, self.b2, count)
        return list(map(MLorcLionState, best_codes(found, old, range(len(old)), count)))
