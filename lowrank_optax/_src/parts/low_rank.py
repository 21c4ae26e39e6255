"""MLorc's compression: a matrix of state as two thin factors, renewed at every step."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from lowrank_optax._src import linalg
from lowrank_optax._src.linalg import matmul, random
from lowrank_optax._src.linalg.meshes import at_once, gathered, whole_product
from lowrank_optax._src.linalg.products import (
    Lying,
    kept_apart,
    near_one,
    power_of_two,
)
from lowrank_optax._src.linalg.thin import Arrays, Stacks, each
from lowrank_optax._src.parts import compatible
from lowrank_optax._src.parts.best_codes import Sketch, best_codes
from lowrank_optax._src.parts.checks import check_rank
from lowrank_optax._src.parts.factors import (
    LowRankCode,
    clamp_negative,
    is_small,
    low_rank_product,
    negative_mean,
)


@dataclasses.dataclass(frozen=True)
class LowRank:
    """A randomized rank-r approximation, renewed at every step: MLorc's compression.

    ``A ~ Q Q^T A``, ``Q = orth(A Omega)``, where Omega is the previous right factor
    with ``oversample`` random columns beside it, so that one product with A serves as
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
        (omega,) = self.draw([key], [old], None)
        lying = Lying(x, False)
        first = first_sketch(lying, omega, old)
        (sketch,) = sketches([self], [first], [lying], [old], None)
        (code,) = best_codes([sketch], [old], None, None)
        return code

    def decode(self, code):
        x = low_rank_product(code)
        return clamp_negative(x, negative_mean(*code)) if self.nonnegative else x

    def draw(
        self, keys: list[Array], olds: list[LowRankCode], count: Array | None
    ) -> list[Array | None]:
        """Omega^T of each code; None where the whole space is its own range.

        Args:
          keys: one for each matrix.
          olds: the codes to be replaced.
          count: see `thin.places`.
        """
        drawn: dict[int, Array | None] = dict.fromkeys(range(len(olds)))
        sizes = [self._size(old) for old in olds]
        wanted = [i for i, old in enumerate(olds) if sizes[i] < old.left.shape[-2]]
        if not self.warm_start:
            for i in wanted:
                *batch, _, n = olds[i].right.shape
                shape = (*batch, n, sizes[i])
                drawn[i] = random.normal(keys[i], shape, olds[i].right.dtype).mT
            return list(drawn.values())
        for size in {sizes[i] - olds[i].right.shape[-2] for i in wanted}:
            same = [i for i in wanted if sizes[i] - olds[i].right.shape[-2] == size]
            rights = [olds[i].right for i in same]
            stacks = Stacks([(x,) for x in rights], count)
            seeds = [
                jnp.broadcast_to(random.seeds(keys[i]), x.shape[:-2])[..., None, None]
                for i, x in zip(same, rights, strict=True)
            ]
            omegas = _beside_signs(stacks.stack(seeds), stacks.stack(rights), size)
            drawn |= zip(same, kept_apart(stacks.unstack(omegas)), strict=True)
        return list(drawn.values())

    def prepare(
        self, keys: list[Array], olds: list[LowRankCode], count: Array | None
    ) -> tuple[list[Array | None], list[Array | None]]:
        """`draw`, and the products of the codes with it, see `Average`.

        On a mesh, codes that are whole on each device leave nothing to be exchanged.
        """
        omegas = self.draw(keys, olds, count)
        return omegas, kept_sketches(olds, omegas, count)

    def mean_square(self, a: Lying, sketch: Array | None, old: LowRankCode) -> Array:
        """That of the entries of each matrix, (*b, 1, 1), about, by ``A Omega``.

        Where no random columns are drawn, A itself is looked at.
        """
        weights = self.weights(sketch, old)
        if sketch is None or weights is None:
            return jnp.mean(a.array * a.array, axis=(-2, -1), keepdims=True)
        return weighted_square(sketch, weights)

    def weights(self, sketch: Array | None, old: LowRankCode) -> Array | None:
        """(*b, 1, k), of the squares of ``A Omega`` in `mean_square`; None where none.

        Of random columns each is an estimate of ``|A|^2``. Where there is a warm start,
        the old right factors have their own parts of it, and the random columns beside
        them the rest.
        """
        if sketch is None or not self.oversample:
            return None
        k, (r, n) = sketch.shape[-1], old.right.shape[-2:]
        weights = np.full((1, k), 1 / k)
        if self.warm_start:
            weights = np.where(np.arange(k) < r, 1.0, n / max(k - r, 1))[None]
        weights = weights / (old.left.shape[-2] * n)
        batch = sketch.shape[:-2]
        return jnp.broadcast_to(weights.astype(sketch.dtype), (*batch, 1, k))

    def _size(self, old: LowRankCode) -> int:
        r, n = old.right.shape[-2:]
        return min(r + self.oversample, old.left.shape[-2], n)


def weighted_square(sketch: Array, weights: Array) -> Array:
    """The sum of the squares of ``A Omega``, see `LowRank.weights`."""
    return jnp.sum(sketch * sketch * weights, axis=(-2, -1), keepdims=True)


def first_sketch(a: Lying, omega: Array | None, old: LowRankCode) -> Array | None:
    """``A Omega``; None where the whole space is its own range."""
    return None if omega is None else _whole_sketch(a, omega, old)


def _whole_sketch(a: "Lying | Average", omega: Array, old: LowRankCode) -> Array:
    """``A Omega``, whole where the code is, see `whole_codes`."""
    y = a.sketch(omega)
    return whole_product(y) if is_small(old.right) else y


def sketches(
    codecs: Sequence[LowRank],
    firsts: Sequence[Array | None],
    matrices: "Sequence[Lying | Average]",
    olds: Sequence[LowRankCode],
    sizes: Sequence[Array] | None,
) -> list[Sketch]:
    """Both products of each matrix of a leaf; ``firsts`` are ``A Omega``.

    Those of an `Average` lack what `with_kept` adds. For ``sizes`` see `lifted_each`.
    """
    given = zip(codecs, firsts, matrices, olds, strict=True)
    ys = [first_product(*x) for x in given]
    ys = lifted_each(ys, olds, sizes, None)
    zs = [
        x.last(y) if isinstance(x, Average) else x.project(y)
        for x, y in zip(matrices, ys, strict=True)
    ]
    return list(zip(ys, zs, strict=True))


def first_product(
    codec: LowRank,
    first: Array | None,
    x: "Lying | Average",
    old: LowRankCode,
) -> Array:
    """``A Omega``, after power iterations if there are any; one where it is None."""
    if first is None:
        *batch, m, _ = old.left.shape
        return jnp.broadcast_to(jnp.eye(m, dtype=old.left.dtype), (*batch, m, m))
    y = first
    for _ in range(codec.power_iters):
        z = x.project(linalg.range_basis(y)).mT
        y = _whole_sketch(x, linalg.range_basis(z).mT, old)
    return y


def lifted_each(
    ys: Sequence[Array],
    olds: Sequence[LowRankCode],
    sizes: Sequence[Array] | None,
    count: Array | None,
) -> list[Array]:
    """First products ``A Omega``, ready for the second ones with A.

    They span the same, nearly orthonormal already. The second products are as precise
    as the smallest direction needs them then; with ``A Omega`` itself, all would be
    near that with the leading one, and the others lost among its rounding errors.

    Args:
      ys: the products; where all was drawn that there is, they remain as they are.
      olds: the codes before.
      sizes: of the entries of each A, (*b, 1, 1), to some powers of ten; where it is
        None, the products are looked at, which takes launches.
      count: see `thin.places`.
    """
    found = dict(enumerate(ys))
    drawn = [i for i, y in enumerate(ys) if y.shape[-1] < y.shape[-2]]
    # Where no column is spare, the faint directions count too.
    spare = {i: ys[i].shape[-1] > olds[i].right.shape[-2] for i in drawn}
    for ready, wanted in ((linalg.lifted, True), (linalg.range_basis, False)):
        own = [i for i in drawn if spare[i] == wanted]
        given = [(ys[i], *([] if sizes is None else [sizes[i]])) for i in own]
        made = each(functools.partial(_ready, ready), given, count)
        found |= {
            i: gathered(y) if is_small(olds[i].right) else y
            for i, y in zip(own, made, strict=True)
        }
    return list(found.values())


def _ready(ready: Callable[[Array], Array], y: Array, *size: Array) -> Array:
    return ready(y * power_of_two(*size)[0] if size else near_one(y))


def _beside_signs(seeds: Arrays, rights: Arrays, count: int) -> list[Array]:
    """The right factors, with ``count`` random rows below them.

    The random rows are made orthogonal to the factors, which changes no range. Else
    their products would all be near that with the leading factor, and a Gram matrix
    could not tell what is left of them from its rounding errors.
    """
    rows = []
    for seed, right in zip(seeds, rights, strict=True):
        n = right.shape[-1]
        fresh = random.signs(seed[..., 0, 0], n, count, right.dtype).mT
        rows.append(fresh * n**-0.5)
    overlaps = at_once(matmul(x, y.mT) for x, y in zip(rows, rights, strict=True))
    each = zip(rights, rows, overlaps, strict=True)
    return [
        jnp.concatenate([right, fresh - matmul(overlap, right)], axis=-2)
        for right, fresh, overlap in each
    ]


@dataclasses.dataclass(frozen=True)
class Average:
    """``decay L R + (1 - decay) G`` by its products; it is never formed.

    Its thin products with L and R can be made for many matrices at once: `kept` before
    it is sketched, and by `with_kept` after the last product with G.

    Attributes:
      grad: G.
      kept: ``L R Omega``; None where there is no Omega, and A is its own sketch.
      new: ``G Omega``.
      scale: G is ``scale * grad``.
    """

    decay: Any
    old: LowRankCode
    grad: Lying
    kept: Array | None = None
    new: Array | None = None
    scale: Array | float = 1.0

    @property
    def first(self) -> Array | None:
        """``A Omega``, if there is an Omega."""
        if self.kept is None:
            return None
        return self.decay * self.kept + self._weight * self.new

    def last(self, q: Array) -> Array:
        """``q^T G``, of which `with_kept` makes ``q^T A``."""
        return self.scale * self.grad.project(q)

    def sketch(self, w: Array) -> Array:
        kept = matmul(self.old.left, matmul(self.old.right, w.mT))
        return self.decay * kept + self._weight * self.grad.sketch(w)

    def project(self, q: Array) -> Array:
        kept = matmul(matmul(q.mT, self.old.left), self.old.right)
        return self.decay * kept + self._weight * self.grad.project(q)

    @property
    def _weight(self):
        return (1 - self.decay) * self.scale


def kept_sketches(
    olds: Sequence[LowRankCode], omegas: Sequence[Array | None], count: Array | None
) -> list[Array | None]:
    """``L R Omega`` of each code, see `Average`."""
    kept: dict[int, Array | None] = dict.fromkeys(range(len(olds)))
    drawn = {i: x for i, x in enumerate(omegas) if x is not None}
    problems = [(*olds[i], x) for i, x in drawn.items()]
    if problems:
        made = each(
            lambda left, right, x: matmul(left, matmul(right, x.mT)), problems, count
        )
        kept |= zip(drawn, made, strict=True)
    return list(kept.values())


def with_kept(
    found: Sequence[Sketch],
    olds: Sequence[LowRankCode],
    decay: ArrayLike,
    count: Array | None,
) -> list[Sketch]:
    """Sketches whose second products are ``y^T A`` of an `Average` A, not ``y^T G``."""

    def add(y, z, left, right):
        return decay * matmul(matmul(y.mT, left), right) + (1 - decay) * z

    problems = [(*sketch, *old) for sketch, old in zip(found, olds, strict=True)]
    added = each(add, problems, count)
    return [(y, z) for (y, _), z in zip(found, added, strict=True)]


def _sign_rows(shape: tuple[int, ...], dtype: Any) -> Array:
    """Unit rows in general position, the first sketch."""
    rows = random.fixed_signs(shape[-1], shape[-2]).T.astype(dtype) * shape[-1] ** -0.5
    return jnp.broadcast_to(rows, shape)
