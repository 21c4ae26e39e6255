"""Which subspace a gradient is projected to."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax._src import linalg
from lowrank_optax._src.leaves.matrix import MatrixView
from lowrank_optax._src.linalg import meshes, random, randomized
from lowrank_optax._src.parts import compatible
from lowrank_optax._src.parts.checks import check_choice, check_range, check_rank
from lowrank_optax._src.parts.joint import Joint, Phased, is_joint, select_each
from lowrank_optax._src.parts.laws import Step, Subspace

Method = Literal["svd", "gram_eigh", "rsvd", "subspace_iteration", "warm"]


@dataclasses.dataclass(frozen=True)
class TopSingular(Joint):
    """The leading left singular vectors of the gradient: GaLore's subspace.

    Args:
      method: how they are found.

        - "svd": exactly, as the GaLore paper does; slow on accelerators.
        - "gram_eigh": by two eigendecompositions of smaller Gram matrices, and
          products; exact down to 1e-5 of the largest singular value.
        - "rsvd": Gaussian sketch of rank + 8 columns with one power iteration, matmuls
          only: the default.
        - "subspace_iteration": the same with two power iterations.
        - "warm": one power iteration that starts from the old basis, with 8 Gaussian
          columns beside it.
    """

    method: Method = "rsvd"

    def __post_init__(self):
        check_choice(self.method, "method", Method)

    @property
    def together(self) -> bool:
        # Exact ones are as large as the gradient: of one matrix at a time.
        return super().together and self.method not in ("svd", "gram_eigh")

    def select_each(self, keys, grads, olds, step):
        ranks = [old.shape[-1] for old in olds]
        each = zip(grads, ranks, strict=True)
        if self.method == "svd":
            return [linalg.svd(linalg.unit_scale(g)[0])[0][..., :r] for g, r in each]
        if self.method == "gram_eigh":
            return [linalg.gram_eigh(g, r)[0] for g, r in each]
        starts = None
        if self.method == "warm":
            pairs = [random.split(key) for key in keys]
            keys = [key for _, key in pairs]
            starts = [_start(k, x) for (k, _), x in zip(pairs, olds, strict=True)]
        iters = 2 if self.method == "subspace_iteration" else 1
        found = randomized.leading_singular_each(
            keys, grads, ranks, iters, starts=starts
        )
        return [basis for basis, _ in found]


def _start(key: Array, old: Array) -> Array:
    """The old basis, or a Gaussian one: a zero column would waste its place."""
    started = jnp.any(old != 0, axis=(-2, -1), keepdims=True)
    return jnp.where(started, old, random.normal(key, old.shape, old.dtype))


# Relative to the largest: what is smaller is not precise to a percent, or only noise.
_NULL = 3e-5
# The logarithm of its weight: with fewer other vectors than the rank, the rest is drawn
# among the null ones (I3-5).
_NULL_WEIGHT = -1e4


@dataclasses.dataclass(frozen=True)
class ImportanceSampled:
    """Singular vectors drawn with their singular values as weights: I3S.

    Without replacement, one after the other among those that are left; in the order of
    the singular values. All min(m, n) vectors can be drawn, those of singular values
    below 3e-5 of the largest only where the others do not suffice.

    Args:
      pool: None draws among all singular vectors, by `gram_eigh`. A number, at least
        the rank, draws among so many leading ones of a randomized SVD instead: cheaper,
        and an approximation that leaves the tail of the spectrum out.
      weight_power: the weights are singular values to this power, at least 0: 1 is the
        paper's, 2 draws by energy (I3-4).

    >>> import optax, lowrank_optax as lro
    >>> tx = lro.project_gradients(
    ...     optax.scale_by_adam(), rank=4, subspace=lro.ImportanceSampled(pool=16)
    ... )
    """

    pool: int | None = None
    weight_power: Any = 1.0

    def __post_init__(self):
        if self.pool is not None:
            check_rank(self.pool, "pool")
        check_range(self.weight_power, "weight_power", 0)

    @property
    def largest_rank(self) -> int | None:
        return self.pool

    def select(self, key, grad, old, step):
        rank = old.shape[-1]
        sketch_key, key = random.split(key)
        if self.pool is None:
            left, turn, values = linalg.singular_factors(grad)
        else:
            size = max(self.pool, rank)
            left = randomized.range_finder(sketch_key, grad, size + 8, power_iters=1)
            turn, values = linalg.gram_eigh(linalg.matmul(left.mT, grad), size)
        # The largest k of log w + Gumbel noise are k draws without replacement.
        known = values > _NULL * values[..., :1]
        logs = self.weight_power * jnp.log(jnp.where(known, values, 1.0))
        weights = jnp.where(known, logs, _NULL_WEIGHT)
        # In float32 whatever the values are in: the same draws in every precision.
        noise = random.draw(jax.random.gumbel, key, values.shape, jnp.float32)
        return _take(left, turn, weights + noise, rank)


@dataclasses.dataclass(frozen=True)
class Hybrid:
    """The leading singular vectors, and others drawn uniformly: Algorithm 3 of I3S.

    Args:
      leading: how many are taken from the top; the remaining ones, up to the rank, are
        drawn among all others without replacement.

    >>> import optax, lowrank_optax as lro
    >>> tx = lro.project_gradients(
    ...     optax.trace(0.9), rank=4, subspace=lro.Hybrid(leading=2)
    ... )
    """

    leading: int

    def __post_init__(self):
        check_rank(self.leading, "leading", least=0)

    @property
    def least_rank(self) -> int:
        return self.leading

    def select(self, key, grad, old, step):
        left, turn, values = linalg.singular_factors(grad)
        score = random.draw(jax.random.uniform, key, values.shape, jnp.float32)
        first = jnp.arange(values.shape[-1]) < self.leading
        return _take(left, turn, jnp.where(first, 2.0, score), old.shape[-1])


@dataclasses.dataclass(frozen=True)
class UniformSampled:
    """Singular vectors drawn uniformly without replacement: `Hybrid` without leaders.

    >>> import optax, lowrank_optax as lro
    >>> tx = lro.project_gradients(
    ...     optax.scale_by_adam(), rank=4, subspace=lro.UniformSampled()
    ... )
    """

    def select(self, key, grad, old, step):
        return Hybrid(0).select(key, grad, old, step)


def _take(left: Array, turn: Array | None, score: Array, rank: int) -> Array:
    """The vectors of the highest scores, in their order; ties go to the first.

    For ``left`` and ``turn`` see `linalg.singular_factors`.
    """
    chosen = jnp.sort(jax.lax.top_k(score, rank)[1], axis=-1)[..., None, :]
    if turn is None:
        return jnp.take_along_axis(left, chosen, axis=-1)
    return linalg.matmul(left, jnp.take_along_axis(turn, chosen, axis=-1))


@dataclasses.dataclass(frozen=True)
class RandomOrthonormal(Joint):
    """A uniformly random subspace, whatever the gradient: GoLore's.

    The orthonormal factor of a Gaussian matrix, with the signs of a triangular factor
    of positive diagonal, is uniform on the Stiefel manifold.

    >>> import optax, lowrank_optax as lro
    >>> tx = lro.project_gradients(
    ...     optax.scale_by_adam(), rank=4, subspace=lro.RandomOrthonormal()
    ... )
    """

    lacks: ClassVar[tuple[str, ...]] = (compatible.CHOSEN,)

    def select_each(self, keys, grads, olds, step):
        each = zip(keys, olds, strict=True)
        normal = [random.normal(key, old.shape, old.dtype) for key, old in each]
        return linalg.orthonormalize_each(normal, None)


@dataclasses.dataclass(frozen=True)
class Switch(Phased):
    """One subspace up to a step, another one from then on.

    Args:
      step: the first step at which ``after`` chooses; it is asked at a refresh only.
      before, after: the subspaces.

    >>> import optax, lowrank_optax as lro
    >>> late = lro.Switch(8000, lro.TopSingular(), lro.RandomOrthonormal())
    >>> tx = lro.project_gradients(optax.scale_by_adam(), rank=4, subspace=late)
    """

    step: Any
    before: Subspace
    after: Subspace

    @property
    def phases(self) -> tuple[Subspace, ...]:
        return self.before, self.after

    def phase(self, step: Step) -> Array:
        return (jnp.asarray(step) >= self.step).astype(jnp.int32)

    @property
    def lacks(self) -> tuple[str, ...]:
        before, after = (getattr(x, "lacks", ()) for x in (self.before, self.after))
        chosen = compatible.CHOSEN  # by one of them is enough
        return tuple(
            x for x in {*before, *after} if x != chosen or x in before and x in after
        )


@dataclasses.dataclass(frozen=True)
class EnergyRank:
    """As many leading singular vectors as the energy asks for: AdaRankGrad's IASS.

    The engine's rank is the maximum. Of a randomized SVD with one power iteration
    (AR-6), rotated to singular directions (AR-5), those columns are kept that bring the
    residual ``||G - Q Q^T G||_F^2 / ||G||_F^2`` to the threshold; the others are zero.
    The residual falls with every column, so no search is needed (AR-1).

    Args:
      min_rank: the least number of columns.
      max_residual_energy: the residual that is allowed, of squares (AR-3); in [0, 1].

    >>> import optax, lowrank_optax as lro
    >>> tx = lro.project_gradients(
    ...     optax.scale_by_adam(), rank=16, subspace=lro.EnergyRank(min_rank=2)
    ... )
    """

    min_rank: int = 1
    max_residual_energy: Any = 0.1

    def __post_init__(self):
        check_rank(self.min_rank, "min_rank")
        check_range(
            self.max_residual_energy,
            "max_residual_energy",
            0,
            1,
            because=": it is the share of the squared gradient that may be left out",
        )

    @property
    def least_rank(self) -> int:
        return self.min_rank

    def select(self, key, grad, old, step):
        rank = old.shape[-1]
        basis, coeff = randomized.leading_singular(key, grad, rank, iters=1)
        # All squares of a matrix whose largest entry is about 1.
        grad, scale = linalg.unit_scale(grad)
        energy = jnp.sum((coeff / scale) ** 2, axis=-1)
        total = jnp.sum(grad**2, axis=(-2, -1))[..., None]
        tail = linalg.sums_from_end(energy)
        outside = total - tail[..., :1]
        noise = 16 * jnp.finfo(total.dtype).eps * total
        outside = jnp.where(outside > noise, outside, 0.0)
        residual = outside + jnp.append(tail[..., 1:], 0.0 * outside, axis=-1)
        too_few = jnp.sum(residual > self.max_residual_energy * total, axis=-1)
        used = jnp.maximum(too_few + 1, self.min_rank)[..., None, None]
        return jnp.where(jnp.arange(rank) < used, basis, 0.0)


@dataclasses.dataclass(frozen=True)
class RandomGaussian:
    """Independent normal entries of variance 1 / r: APOLLO's and Flora's.

    ``P P^T`` is the identity in expectation only, and the columns are not orthonormal.
    The basis is not stored but drawn again from its key at every step.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = lro.project_gradients(
    ...     optax.trace(0.9),
    ...     rank=4,
    ...     subspace=lro.RandomGaussian(),
    ...     transfer=lro.RotateFirst(),
    ... )
    >>> lro.state_bytes(tx, {"w": jnp.ones((64, 64))})  # l r floats, two counters
    1032
    """

    stored: ClassVar[bool] = False
    lacks: ClassVar[tuple[str, ...]] = (
        compatible.ORTHONORMAL,
        compatible.CHOSEN,
        compatible.ALIGNED,
    )

    def select(self, key, grad, old, step):
        return random.normal(key, old.shape, old.dtype) * old.shape[-1] ** -0.5


@dataclasses.dataclass(frozen=True)
class CrossHead(Joint):
    """A subspace of one attention head, for all of them: GaLore+'s.

    For query and key kernels, whose columns are heads side by side and whose rows are
    the input: the side must be that of the input (GP-12). At each choice and for each
    matrix another head is drawn (GP-11); several, where the rank exceeds the width of
    one, which has no more singular vectors than that (GP-4).

    Args:
      num_heads: of the kernel; with grouped queries, a key kernel has its own number.
      base: the subspace, which sees the columns of the drawn heads only.

    >>> import optax, lowrank_optax as lro
    >>> tx = lro.project_gradients(
    ...     optax.scale_by_adam(), rank=4, subspace=lro.CrossHead(8), side="left"
    ... )
    """

    num_heads: int
    base: Subspace = TopSingular("subspace_iteration")
    requires: ClassVar[tuple[str, ...]] = (compatible.CHOSEN, compatible.NAMED_SIDE)

    def __post_init__(self):
        check_rank(self.num_heads, "num_heads")
        compatible.check(self, self.base)

    def check_matrix(self, view: MatrixView) -> None:
        if view.n % self.num_heads:
            raise ValueError(
                f"Cannot share a subspace among {self.num_heads} heads: they do not "
                f"divide the {view.n} columns of '{view.path}' {view.shape}. Give each "
                "kernel its own number (of GaLore+, queries and keys a pair), or none "
                "to take it as one head."
            )

    @property
    def lacks(self) -> tuple[str, ...]:
        return getattr(self.base, "lacks", ())

    @property
    def together(self) -> bool:
        return super().together and is_joint(self.base)

    def select_each(self, keys, grads, olds, step):
        pairs = [random.split(key) for key in keys]
        each = zip(pairs, grads, olds, strict=True)
        parts = [self._drawn(k, g, old.shape[-1]) for (k, _), g, old in each]
        return select_each(self.base, [key for _, key in pairs], parts, olds, step)

    def _drawn(self, key: Array, grad: Array, rank: int) -> Array:
        """The columns of as many heads as the rank needs."""
        *batch, m, n = grad.shape
        heads = self.num_heads
        drawn = min(heads, -(-rank * heads // n))
        score = random.draw(jax.random.uniform, key, (*batch, heads), jnp.float32)
        chosen = jax.lax.top_k(score, drawn)[1]
        blocks = grad.reshape(*batch, m, heads, n // heads)
        return meshes.taken(blocks, chosen).reshape(*batch, m, -1)
