"""MLorc's algorithms on one matrix."""

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike

from lowrank_optax._src.kernels.dispatch import active
from lowrank_optax._src.leaves import saving
from lowrank_optax._src.linalg.thin import each
from lowrank_optax._src.parts.best_codes import best_codes
from lowrank_optax._src.parts.bounds import cut_off, most_of_square, scale_down
from lowrank_optax._src.parts.factors import (
    LowRankCode,
    clamp_negative,
    low_rank_product,
    mean_entry,
    negative_mean,
)
from lowrank_optax._src.parts.low_rank import (
    Average,
    LowRank,
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
        most = each(functools.partial(self._most, count), nus, count)
        return list(zip(pairs, kept, zeta, most, strict=True))

    def _most(self, step, left, right):
        size = left.shape[-2] * right.shape[-1]
        return most_of_square(mean_entry(left, right), size, self.b2, step)

    def update(self, step, grad, state, given):
        omegas, kept, zeta, most = given
        g, b1, b2 = grad.array, self.b1, self.b2
        t = step.astype(g.dtype) + 1  # which does not wrap around
        v_old = low_rank_product(state.nu, grad.turned)
        v = b2 * clamp_negative(v_old, zeta) + jnp.minimum((1 - b2) * g**2, most)

        def scale(new):
            """Of G, so that its mean square has the bound of an entry's; of M and V."""
            added = (1 - b2) * self.mu.mean_square(grad, new, state.mu)
            size = jnp.where(jnp.isfinite(most), most, added)
            sizes = jnp.sqrt(size) / jnp.sqrt(1 - b2), size
            return scale_down(jnp.asarray(added), most), sizes

        def plain():
            new = None if omegas[0] is None else grad.sketch(omegas[0])
            small, sizes = scale(new)
            average = Average(b1, state.mu, grad, kept, new, small)
            codecs, matrices = (self.mu, self.nu), (average, grad.of(v))
            return sketches(codecs, omegas, matrices, state, sizes), small

        found, small = self._sketches(grad, state, given, scale, plain)
        m = b1 * low_rank_product(state.mu, grad.turned) + (1 - b1) * (small * g)
        m_hat, v_hat = m * (1 / (1 - b1**t)), v * (1 / (1 - b2**t))
        # A V that has lost an entry's part would let it go further.
        update = cut_off(m_hat / (jnp.sqrt(v_hat) + self.eps), b1, b2)
        return grad.of(update), found

    def _sketches(self, grad, state, given, scale, plain):
        """The sketches of both; by kernels where those are wanted, which store no V."""
        if not active(grad.array):
            return plain()
        from lowrank_optax._src.kernels import mlorc

        if not mlorc.suits(grad, (self.mu, self.nu), given[0]):
            return plain()
        decays = self.b1, self.b2
        return mlorc.adam_sketches(decays, grad, state, given, scale, plain)

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
        new = None if omega is None else grad.sketch(omega)
        average = Average(self.b2, state.mu, grad, sketched, new)
        found = sketches([self.mu], [omega], [average], state, [None])
        return grad.of(jnp.sign(c)), found

    def finish(self, found, states, count):
        old = [state.mu for state in states]
        found = with_kept([sketch for (sketch,) in found], old, self.b2, count)
        return list(map(MLorcLionState, best_codes(found, old, range(len(old)), count)))
