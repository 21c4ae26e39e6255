"""MLorc's algorithms on one matrix."""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from lowrank_optax._src.kernels.dispatch import active
from lowrank_optax._src.leaves import saving
from lowrank_optax._src.linalg.products import by_columns
from lowrank_optax._src.linalg.thin import as_parts, each, each_of_several
from lowrank_optax._src.parts.best_codes import best_codes
from lowrank_optax._src.parts.bounds import cut_off, most_of_square, scale_down
from lowrank_optax._src.parts.factors import (
    LowRankCode,
    clamp_negative,
    low_rank_product,
    mean_entry,
    negative_mean,
    whole_codes,
)
from lowrank_optax._src.parts.low_rank import (
    Average,
    LowRank,
    first_product,
    first_sketch,
    lifted_each,
    sketches,
    weighted_square,
    with_kept,
)


class MLorcAdamState(NamedTuple):
    """Both moments of one matrix, as `optax.ScaleByAdamState` names them."""

    mu: LowRankCode
    nu: LowRankCode


class MLorcLionState(NamedTuple):
    """The momentum of one matrix, as `optax.ScaleByLionState` names it."""

    mu: LowRankCode


class Given(NamedTuple):
    """What is known of a matrix before its gradient.

    Attributes:
      omegas: Omega^T of both moments, see `LowRank.draw`.
      kept: ``L R Omega`` of the first one.
      zeta: `negative_mean` of the second one.
      most: that G may add to an entry of V.
      old: the codes before, for the update, see `as_parts`.
    """

    omegas: tuple[Array | None, Array | None]
    kept: Array | None
    zeta: Array
    most: Array
    old: MLorcAdamState


class Sketched(NamedTuple):
    """Products of both moments, M and V.

    Attributes:
      ys, zs: see `Sketch`. Of kernels, which store no V, first ``ys`` are ``G Omega``
        and ``V Omega``, and ``zs`` None; `lift` makes of them what the second products
        are taken with.
      given: see there; None where all is known.
      square: the mean square of G, where ``G Omega`` does not tell it.
      small: the scale of G, which bounds M; None where it is not known.
    """

    ys: tuple[Array, ...]
    zs: tuple[Array, ...] | None = None
    given: Given | None = None
    square: Array | None = None
    small: Array | None = None


class First(NamedTuple):
    """``M Omega``, and what else is known by ``G Omega``, see `MLorcAdam.sketch`."""

    of_m: Array
    small: Array
    size_of_m: Array
    size_of_v: Array


@dataclasses.dataclass(frozen=True)
class MLorcAdam:
    """Algorithm 1 on one matrix."""

    b1: ArrayLike
    b2: ArrayLike
    eps: ArrayLike
    mu: LowRank
    nu: LowRank

    @property
    def stages(self):
        return ((self.sketch, self.lift), (self.update, self.finish))

    @property
    def state_sizes(self):
        return saving.coded((self.mu, self.nu))

    def init(self, view):
        return MLorcAdamState(self.mu.init(view), self.nu.init(view))

    def start(self, keys, states, count):
        whole = whole_codes(states)
        mus, nus = ([s[k] for s in whole] for k in (0, 1))
        omegas, kept = self.mu.prepare(keys, mus, count)
        pairs = zip(omegas, self.nu.draw(keys, nus, count), strict=True)
        # The left factors as they are kept, so that devices share the rows of V.
        factors = [(s.nu.left, nu.right) for s, nu in zip(states, nus, strict=True)]
        zeta = each(negative_mean, factors, count)
        most = each(functools.partial(self._most, count), factors, count)
        old = as_parts(whole, count)
        return whole, list(map(Given, pairs, kept, zeta, most, old))

    def dense(self, grad, given):  # V
        return not self._by_kernels(grad, given.omegas)

    def _most(self, step, left, right):
        size = left.shape[-2] * right.shape[-1]
        return most_of_square(mean_entry(left, right), size, self.b2, step)

    def sketch(self, step, grad, state, given):
        """All, while V is there; by kernels, which store no V, the first products."""
        v, omegas = self._second_moment(grad, state.nu, given), given.omegas
        if self._by_kernels(grad.array, omegas):
            found = self._pass("sketch", grad, v, state, given, omegas)
            ys = tuple(map(by_columns, found))
            told = self.mu.weights(ys[0], state.mu) is not None
            square = None if told else self.mu.mean_square(grad, None, state.mu)
            return None, Sketched(ys, given=given, square=square)
        new, of_v = map(first_sketch, (grad, v), omegas, state)
        square = self.mu.mean_square(grad, new, state.mu)
        small, *sizes = self._scale(square, given.most)
        m = Average(self.b1, state.mu, grad, given.kept, new, small)
        firsts = m.first, of_v
        found = sketches((self.mu, self.nu), firsts, (m, v), state, sizes)
        direction = self._direction(step, grad, state.mu, v, small)
        ys, zs = zip(*found, strict=True)
        return direction, Sketched(ys, zs)

    def lift(self, found, states, count):
        """The first products that wait for it, of all matrices in common."""
        waiting = [i for i, x in enumerate(found) if x.zs is None]
        problems = []
        for i in waiting:
            (new, _), given, square = found[i].ys, found[i].given, found[i].square
            if square is None:
                square = self.mu.weights(new, states[i].mu)
            problems.append((new, given.kept, given.most, square))
        firsts = [First(*x) for x in each_of_several(self._first, problems, count)]
        of_v = [found[i].ys[1] for i in waiting]
        ys = [y for x, v in zip(firsts, of_v, strict=True) for y in (x.of_m, v)]
        sizes = [size for x in firsts for size in (x.size_of_m, x.size_of_v)]
        ys = lifted_each(ys, [old for i in waiting for old in states[i]], sizes, count)
        ready = list(found)
        for k, i in enumerate(waiting):
            both = by_columns(ys[2 * k]), by_columns(ys[2 * k + 1])
            ready[i] = Sketched(both, given=found[i].given, small=firsts[k].small)
        return ready

    def _first(self, new, kept, most, told):
        """Of ``G Omega``; ``told`` is the mean square of G, or what it is told by."""
        square = weighted_square(new, told) if self.mu.oversample else told
        small, *sizes = self._scale(square, most)
        return First(self.b1 * kept + (1 - self.b1) * small * new, small, *sizes)

    def update(self, step, grad, state, found):
        given, ys, small = found.given, found.ys, found.small
        if found.zs is not None:
            return None, tuple(zip(ys, found.zs, strict=True))
        v = self._second_moment(grad, given.old.nu, given)
        of_g, of_v = self._pass("project", grad, v, state, given, ys)
        direction = self._direction(step, grad, given.old.mu, v, small)
        return direction, ((ys[0], small * of_g), (ys[1], of_v))

    def _second_moment(self, grad, old, given):
        kept = clamp_negative(low_rank_product(old, grad.turned), given.zeta)
        added = jnp.minimum((1 - self.b2) * grad.array**2, given.most)
        return grad.of(self.b2 * kept + added)

    def _direction(self, step, grad, old, v, small):
        """Adam's, by the old code of M and by V."""
        g, b1, b2 = grad.array, self.b1, self.b2
        t = step.astype(g.dtype) + 1  # which does not wrap around
        m = b1 * low_rank_product(old, grad.turned) + (1 - b1) * (small * g)
        m_hat, v_hat = m * (1 / (1 - b1**t)), v.array * (1 / (1 - b2**t))
        # A V that has lost an entry's part would let it go further.
        return grad.of(cut_off(m_hat / (jnp.sqrt(v_hat) + self.eps), b1, b2))

    def finish(self, found, states, count):
        mus, nus = ([s[k] for s in states] for k in (0, 1))
        mu, nu = zip(*found, strict=True)
        mu, nu = with_kept(mu, mus, self.b1, count), list(nu)
        leaf = list(range(len(states)))
        codes = best_codes(mu + nu, mus + nus, leaf + leaf, count)
        size = len(states)
        return list(map(MLorcAdamState, codes[:size], codes[size:]))

    def _scale(self, square, most):
        """Of G by its mean square, which has the bound of an entry's; sizes of M, V."""
        added = (1 - self.b2) * square
        size = jnp.where(jnp.isfinite(most), most, added)
        small = scale_down(jnp.asarray(added), most)
        return small, jnp.sqrt(size) / jnp.sqrt(1 - self.b2), size

    def _by_kernels(self, grad, omegas):
        if not active(grad):
            return False
        from lowrank_optax._src.kernels import mlorc

        return mlorc.suits(grad, (self.mu, self.nu), omegas)

    def _pass(self, product, grad, v, state, given, thin):
        from lowrank_optax._src.kernels import mlorc

        bounds = self.b2, given.zeta, given.most
        return mlorc.adam_pass(product, (grad, v), state.nu, bounds, thin)


@dataclasses.dataclass(frozen=True)
class MLorcLion:
    """Algorithm 2 on one matrix."""

    b1: ArrayLike
    b2: ArrayLike
    mu: LowRank

    @property
    def stages(self):
        return ((self.sketch, self.lift), (self.update, self.finish))

    @property
    def state_sizes(self):
        return saving.coded((self.mu,))

    def init(self, view):
        return MLorcLionState(self.mu.init(view))

    def start(self, keys, states, count):
        whole = whole_codes(states)
        omegas, kept = self.mu.prepare(keys, [s.mu for s in whole], count)
        return whole, list(zip(omegas, kept, as_parts(whole, count), strict=True))

    def dense(self, grad, given):
        return False

    def sketch(self, step, grad, state, given):
        omega, kept, old = given
        new = first_sketch(grad, omega, state.mu)
        m = Average(self.b2, state.mu, grad, kept, new)
        return None, (first_product(self.mu, m.first, m, state.mu), old)

    def lift(self, found, states, count):
        ys, olds = zip(*found, strict=True)
        ys = lifted_each(ys, [state.mu for state in states], None, count)
        return list(zip(ys, olds, strict=True))

    def update(self, step, grad, state, given):
        y, old = given
        kept = low_rank_product(old.mu, grad.turned)
        c = self.b1 * kept + (1 - self.b1) * grad.array
        return grad.of(jnp.sign(c)), (y, grad.project(y))

    def finish(self, found, states, count):
        old = [state.mu for state in states]
        found = with_kept(found, old, self.b2, count)
        return list(map(MLorcLionState, best_codes(found, old, range(len(old)), count)))
