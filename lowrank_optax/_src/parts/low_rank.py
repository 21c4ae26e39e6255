"""MLorc's compression: a matrix of state as two thin factors, renewed at every step."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lowrank_optax._src import linalg
from lowrank_optax._src.engines import batching
from lowrank_optax._src.linalg import matmul, random
from lowrank_optax._src.parts import compatible
from lowrank_optax._src.parts.checks import check_rank


class LowRankCode(NamedTuple):
    """A matrix as ``left @ right``.

    Attributes:
      left: (*batch, m, r), carries the scale; zero columns are unused.
      right: (*batch, r, n), unit rows, the next warm start.
    """

    left: Float[Array, "*b m r"]
    right: Float[Array, "*b r n"]

    @property
    def mT(self) -> "LowRankCode":
        """The code of the transpose."""
        return LowRankCode(self.right.mT, self.left.mT)


@dataclasses.dataclass(frozen=True)
class LowRank:
    """A randomized rank-r approximation, renewed at every step: MLorc's compression.

    ``A ~ Q Q^T A``, ``Q = orth(A Omega)``, where Omega is the previous right factor
    with `oversample` random columns beside it, so that one product with A serves as
    well as a power iteration: moments turn slowly. Truncated to rank r by the
    eigenvectors of the small ``(Q^T A)(Q^T A)^T``. Exact at full rank.

    Args:
      rank: r; effectively ``min(r, m, n)``.
      nonnegative: decode to ``max(A, 0) + zeta [A < 0]`` with zeta the mean magnitude
        of the negative entries, as a second moment must (MLorc equation 2).
      oversample: random sign columns beside the warm start.
        Without a warm start, r + oversample Gaussian columns are drawn.
      power_iters: q; each costs two more products with A.
      warm_start: reuse the previous right factor; False draws all columns anew, which
        is the paper's Algorithm 3.
    """

    rank: int
    nonnegative: bool = False
    oversample: int = 4
    power_iters: int = 0
    warm_start: bool = True
    # Both moments of a leaf may have the same sketch, as `mlorc_scale_by_adam` draws.
    one_key: ClassVar[bool] = True

    @property
    def lacks(self) -> tuple[str, ...]:
        sign = compatible.SIGNS if self.nonnegative else compatible.NONNEGATIVE
        return sign, compatible.INDEPENDENT

    def __post_init__(self):
        check_rank(self.rank)
        for name in ("oversample", "power_iters"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"`{name}` must not be negative, got {getattr(self, name)}."
                )

    def init(self, view):
        r = view.rank(self.rank)
        return LowRankCode(left=view.zeros("m", r), right=view.full(_sign_rows, r, "n"))

    def encode(self, key, x, old):
        def steps():
            omega = yield from self.draw(key, old)
            return (yield from self.compress(omega, Whole(x), old))

        code, _ = batching.drive(steps())[0]
        return code

    def decode(self, code):
        x = low_rank_product(code)
        return clamp_negative(x, negative_mean(*code)) if self.nonnegative else x

    def draw(self, key: Array, old: LowRankCode) -> batching.Steps:
        """Omega; or None where the whole space is small enough to be its own range."""
        *batch, r, n = old.right.shape
        size = min(r + self.oversample, old.left.shape[-2], n)
        if size == old.left.shape[-2]:
            return None
        if not self.warm_start:
            shape = (*batch, n, size)
            return random.normal(key, shape, old.right.dtype)
        seeds = jnp.broadcast_to(random.seeds(key), batch)[..., None, None]
        return (yield from batching.ask(_beside_signs(size - r), seeds, old.right))

    def compress(
        self,
        omega: Array | None,
        x: "Whole | Average",
        old: LowRankCode,
        ends_turn: bool = False,
    ) -> batching.Steps:
        """The code of a matrix that is known by its products.

        Args:
          omega: from `draw`.
          x: the matrix.
          old: its code before.
          ends_turn: whether it is the last of a leaf, see `batching.take_turn`.

        Returns:
          ``(code, finite)``: whether all of it is, ``(*batch, 1, 1)``.
        """
        *batch, m, _ = old.left.shape
        if omega is None:
            y = jnp.broadcast_to(jnp.eye(m, dtype=old.left.dtype), (*batch, m, m))
        else:
            y, largest = x.sketch(omega)
            if ends_turn:
                batching.end_turn(largest)
            for _ in range(self.power_iters):
                y = yield from batching.ask(linalg.range_basis, y)
                z = x.join(*x.project(y)).mT
                y, _ = x.sketch((yield from batching.ask(linalg.range_basis, z)))
            if y.shape[-1] == old.right.shape[-1]:  # the faint directions count too
                y = yield from batching.ask(linalg.range_basis, y)
        # A is multiplied by the sketch as it is, not by its basis: no factorization
        # comes between the two products with A, which need not be kept in the meantime.
        return (yield from batching.ask(x.best_code, y, old.right, *x.project(y)))


@functools.cache
def _beside_signs(cols: int) -> Callable[[Array, Array], Array]:
    """The transposed right factors as columns, with random ones beside them."""

    def omega(seeds, right):
        warm = right.mT
        n = warm.shape[-2]
        fresh = random.signs(seeds[..., 0, 0], n, cols, warm.dtype) * n**-0.5
        return jnp.concatenate([warm, fresh], axis=-1)

    return omega


@dataclasses.dataclass(frozen=True)
class Whole:
    """A matrix A, by its products.

    A thin matrix is at hand in each update of each leaf; what is made of thin matrices
    alone is left to `best_code`, which runs for all leaves together.
    """

    matrix: Array
    turned: bool = False  # whether it is a transposed view

    def sketch(self, w: Array) -> tuple[Array, Array]:
        """``A w / s`` with a scale s that keeps its squares in range; about s."""
        return linalg.near_one(linalg.sketch(self.matrix, w, self.turned))

    def project(self, q: Array) -> tuple[Array, ...]:
        """Thin arrays that `join` to ``q^T A``."""
        return (linalg.project(q, self.matrix, self.turned),)

    @staticmethod
    def join(z: Array) -> Array:
        return z

    @staticmethod
    def best_code(y: Array, old_right: Array, z: Array) -> tuple[LowRankCode, Array]:
        return _best_code(y, z, old_right)


@dataclasses.dataclass(frozen=True)
class Average:
    """``decay L R + (1 - decay) G`` by its products; it is never formed."""

    decay: Array
    old: LowRankCode
    grad: Array
    turned: bool = False

    def sketch(self, w: Array, new: Array | None = None) -> tuple[Array, Array]:
        """As of `Whole`; ``new`` is ``G w`` where that is known."""
        kept = matmul(self.old.left, matmul(self.old.right, w))
        new = linalg.sketch(self.grad, w, self.turned) if new is None else new
        largest = jnp.maximum(
            *(jnp.max(jnp.abs(x), (-2, -1), keepdims=True) for x in (kept, new))
        )
        y = self.decay * kept + (1 - self.decay) * new
        return y * linalg.power_of_two(largest)[0], largest

    def project(self, q: Array, new: Array | None = None) -> tuple[Array, ...]:
        """As of `Whole`; ``new`` is ``q^T G`` where that is known."""
        decay = jnp.asarray(self.decay, q.dtype) * jnp.ones(
            (*q.shape[:-2], 1, 1), q.dtype
        )
        kept = matmul(q.mT, self.old.left)
        new = linalg.project(q, self.grad, self.turned) if new is None else new
        return decay, kept, self.old.right, new

    @staticmethod
    def join(decay: Array, kept: Array, right: Array, new: Array) -> Array:
        return decay * matmul(kept, right) + (1 - decay) * new

    @staticmethod
    def best_code(
        y: Array, old_right: Array, *parts: Array
    ) -> tuple[LowRankCode, Array]:
        return _best_code(y, Average.join(*parts), old_right)


def _best_code(y: Array, z: Array, old_right: Array) -> tuple[LowRankCode, Array]:
    """The best code of ``Q Q^T A``, of the old code's rank; and whether it is finite.

    ``Q`` spans the range of the sketch ``y = A Omega``, and ``z = y^T A``: with
    ``Q = y T``, ``Q^T A = T^T z``.
    """
    rank = old_right.shape[-2]
    t = linalg.whitening(y)
    q, b = matmul(y, t), matmul(t.mT, z)
    unit, scale = linalg.unit_scale(b)
    vectors = linalg.eigh(matmul(unit, unit.mT))[1]
    vectors = jnp.flip(vectors, -1)[..., :rank]
    right = matmul(vectors.mT, unit)
    norm = jnp.linalg.norm(right, axis=-1, keepdims=True)
    used = norm > 1e-7 * jnp.max(norm, axis=-2, keepdims=True)
    right = jnp.where(used, right / jnp.where(used, norm, 1.0), 0.0)
    # An unused row keeps looking where the used ones do not: a zero row would be a
    # column lost to the next sketch.
    spare = old_right - matmul(matmul(old_right, right.mT), right)
    left = matmul(q, vectors * jnp.where(used, norm, 0.0).mT) * scale
    right = jnp.where(used, right, linalg.unit_columns(spare.mT).mT)
    finite = jnp.all(jnp.isfinite(left), axis=(-2, -1), keepdims=True)
    return LowRankCode(left, right), finite & jnp.all(
        jnp.isfinite(right), axis=(-2, -1), keepdims=True
    )


def low_rank_product(code: LowRankCode) -> Array:
    """``left @ right``; at small rank as a sum of outer products, which fuses."""
    r = code.right.shape[-2]
    if r > OUTER_MAX_RANK:
        return matmul(code.left, code.right)
    terms = (code.left[..., :, i, None] * code.right[..., i, None, :] for i in range(r))
    return functools.reduce(jnp.add, terms)


# Up to here, products of factors are formed entry by entry inside the loop that uses
# them instead of by a matrix product that has to be stored.
OUTER_MAX_RANK = 16


def _sign_rows(shape: tuple[int, ...], dtype: Any) -> Array:
    """Unit rows in general position, the first sketch."""
    rows = random.filler(shape[-1], shape[-2]).T.astype(dtype) * shape[-1] ** -0.5
    return jnp.broadcast_to(rows, shape)


def negative_mean(left: Array, right: Array) -> Float[Array, "*b 1 1"]:
    """Zeta of MLorc's equation 2: the mean of ``|x|`` over ``x < 0``, x = left @ right.

    The product is formed entry by entry and never stored: a few rows at a time are
    added up, and what is left is reduced by products with ones, several times faster
    on CPU than reductions of whole matrices are.
    """
    *batch, m, r = left.shape
    blocks = math.gcd(m, _ROW_BLOCKS)
    rows = left.reshape(*batch, m // blocks, blocks, r)
    parts = [
        low_rank_product(LowRankCode(rows[..., k, :], right)) for k in range(blocks)
    ]
    ones = jnp.ones((1, m // blocks), left.dtype)

    def total(x):
        return jnp.sum(matmul(ones, x), axis=-1, keepdims=True)

    summed = total(sum(jnp.minimum(x, 0.0) for x in parts))
    count = total(sum((x < 0).astype(left.dtype) for x in parts))
    return -summed / jnp.maximum(count, 1.0)


_ROW_BLOCKS = 16


def clamp_negative(
    x: Float[Array, "*b m n"], zeta: Float[Array, "*b 1 1"]
) -> Float[Array, "*b m n"]:
    """``max(x, 0) + zeta [x < 0]`` (ML-6): exact zeros stay zero."""
    return jnp.where(x < 0, zeta, x)
