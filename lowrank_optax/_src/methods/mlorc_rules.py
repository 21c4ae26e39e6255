"""MLorc's algorithms on one matrix."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from lowrank_optax._src.kernels.dispatch import active
from lowrank_optax._src.leaves import saving
from lowrank_optax._src.linalg.thin import as_parts, each, each_of_some
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
    first_product,
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
      read: the old codes, for the update, see `as_parts`.
    """

    omegas: tuple[Array | None, Array | None]
    kept: Array | None
    zeta: Array
    most: Array
    read: MLorcAdamState


class Sketched(NamedTuple):
    """Products of both moments, M and V.

    Attributes:
      given: see there; None where nothing is waited for.
      ys, zs: see `Sketch`. While ``zs`` are None, ``ys`` are ``G Omega`` and
        ``V Omega``, of which `lift` makes them.
      small: the scale of G, which bounds M; before that, what tells the mean square
        of G: `LowRank.weights`, or it itself.
    """

    given: Given | None
    ys: tuple[Array, ...]
    zs: tuple[Array, ...] | None
    small: Array


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
        mus, nus = ([s[k] for s in states] for k in (0, 1))
        omegas, kept = self.mu.prepare(keys, mus, count)
        pairs = zip(omegas, self.nu.draw(keys, nus, count), strict=True)
        zeta = each(negative_mean, nus, count)
        most = each(functools.partial(self._most, count), nus, count)
        arrays, tree = jax.tree.flatten(states)
        read = jax.tree.unflatten(tree, as_parts(arrays, count))
        return list(map(Given, pairs, kept, zeta, most, read))

    def dense(self, grad, given):  # V
        return not self._by_kernels(grad, given.omegas)

    def _most(self, step, left, right):
        size = left.shape[-2] * right.shape[-1]
        return most_of_square(mean_entry(left, right), size, self.b2, step)

    def sketch(self, step, grad, state, given):
        """All, while V is there; by kernels, which store no V, the first products."""
        v, omegas = self._second_moment(grad, state.nu, given), given.omegas
        if self._by_kernels(grad, omegas):
            ys = self._pass("sketch", grad, v, state, given, omegas)
            told = self.mu.weights(ys[0], state.mu)
            if told is None:
                told = self.mu.mean_square(grad, None, state.mu)
            return None, Sketched(given, tuple(ys), None, told)
        new = None if omegas[0] is None else grad.sketch(omegas[0])
        square = self.mu.mean_square(grad, new, state.mu)
        small, *sizes = self._scale(square, given.most)
        m = Average(self.b1, state.mu, grad, given.kept, new, small)
        found = sketches((self.mu, self.nu), omegas, (m, v), state, sizes)
        ys, zs = zip(*found, strict=True)
        direction = self._direction(step, grad, state.mu, v, small)
        return direction, Sketched(None, ys, zs, small)

    def lift(self, found, states, count):
        """The first products that wait for it, of all matrices in common."""
        waiting = [i for i, x in enumerate(found) if x.zs is None]
        given = [found[i].given for i in waiting]
        news, of_v = ([found[i].ys[k] for i in waiting] for k in (0, 1))
        told = [found[i].small for i in waiting]
        problems = [
            (new, x.kept, x.most, t)
            for new, x, t in zip(news, given, told, strict=True)
        ]
        made = each_of_some(self._first, problems, count)
        ys = [y for (m, *_), v in zip(made, of_v, strict=True) for y in (m, v)]
        sizes = [size for _, _, *both in made for size in both]
        olds = [code for i in waiting for code in states[i]]
        ys = lifted_each(ys, olds, sizes, count)
        ready = {
            i: Sketched(x, (m, v), None, small)
            for i, x, m, v, (_, small, *_) in zip(
                waiting, given, ys[::2], ys[1::2], made, strict=True
            )
        }
        return [ready.get(i, x) for i, x in enumerate(found)]

    def _first(self, new, kept, most, told):
        """``M Omega``, the scale of G, and the sizes of M and V."""
        seen = told.shape[-1] == new.shape[-1]
        square = weighted_square(new, told) if seen else told
        small, *sizes = self._scale(square, most)
        return self.b1 * kept + (1 - self.b1) * small * new, small, *sizes

    def update(self, step, grad, state, found):
        given, ys, zs, small = found
        if zs is not None:
            return None, tuple(zip(ys, zs, strict=True))
        v = self._second_moment(grad, given.read.nu, given)
        of_g, of_v = self._pass("project", grad, v, state, given, ys)
        direction = self._direction(step, grad, given.read.mu, v, small)
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
        if not active(grad.array):
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
        omegas, kept = self.mu.prepare(keys, [s.mu for s in states], count)
        arrays, tree = jax.tree.flatten(states)
        read = jax.tree.unflatten(tree, as_parts(arrays, count))
        return list(zip(omegas, kept, read, strict=True))

    def dense(self, grad, given):
        return False

    def sketch(self, step, grad, state, given):
        omega, kept, read = given
        new = None if omega is None else grad.sketch(omega)
        m = Average(self.b2, state.mu, grad, kept, new)
        return None, (first_product(self.mu, omega, m, state.mu), read)

    def lift(self, found, states, count):
        ys, read = zip(*found, strict=True)
        ys = lifted_each(ys, [state.mu for state in states], None, count)
        return list(zip(ys, read, strict=True))

    def update(self, step, grad, state, given):
        y, read = given
        kept = low_rank_product(read.mu, grad.turned)
        c = self.b1 * kept + (1 - self.b1) * grad.array
        z = Average(self.b2, state.mu, grad).last(y)
        return grad.of(jnp.sign(c)), (y, z)

    def finish(self, found, states, count):
        old = [state.mu for state in states]
        found = with_kept(found, old, self.b2, count)
        return list(map(MLorcLionState, best_codes(found, old, range(len(old)), count)))
