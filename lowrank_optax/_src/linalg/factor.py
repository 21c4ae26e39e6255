"""Gram-based factorizations over the last two axes, any batch axes.

Everything tall is a matmul: the only factorizations are those of small (r, r)
matrices, so rows may stay sharded (a Gram matrix costs one small all-reduce) and
nothing here needs Householder QR, which is slow on accelerators. Arithmetic is in
float32 at least, at the highest matmul precision.
"""

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowrank_optax._src.linalg import meshes, random, small, thin
from lowrank_optax._src.linalg.lapack import eigh, inverse_cholesky, inverse_root
from lowrank_optax._src.linalg.products import (
    at_least_float32,
    gram,
    kept_apart,
    magnitude,
    matmul,
    of_unit_length,
    outer_product,
    unit_scale,
)


def _eps(x: Array) -> float:
    return float(jnp.finfo(x.dtype).eps)


def _polish(y: Array) -> Array:
    """One Newton-Schulz step: squares a small orthonormality error, keeps zeros."""
    return _polish_each([y])[0]


def _polish_each(ys: Sequence[Array]) -> list[Array]:
    return [
        matmul(y, 1.5 * jnp.eye(y.shape[-1], dtype=y.dtype) - 0.5 * square)
        for y, square in zip(ys, _grams(ys), strict=True)
    ]


def _grams(ys: Sequence[Array]) -> list[Array]:
    return meshes.at_once(map(gram, ys))


def cholesky_pass_each(arrays: Sequence[Array]) -> list[Array]:
    """``y R^-1`` of each y, with ``R^T R = y^T y + shift``.

    It spans the same, and is far better conditioned. Small problems are common calls.
    Squares of y must be in the range of floats; smaller ones are taken for zero.
    """
    stacks = thin.Stacks([(a,) for a in arrays], None)
    ys = stacks.stack(arrays)
    inverses = thin.across(_relative_inverse, _grams(ys))
    return stacks.unstack([matmul(y, t) for y, t in zip(ys, inverses, strict=True)])


def eigenvectors_each(squares: Sequence[Array]) -> list[Array]:
    """The eigenvectors of symmetric matrices, of descending values, in common calls."""
    flat = [a.reshape(-1, *a.shape[-2:]) for a in meshes.at_once(squares)]
    found = thin.across(lambda a: eigh(a)[1], flat)
    return [x.reshape(a.shape) for x, a in zip(found, squares, strict=True)]


def _relative_inverse(square: Array) -> Array:
    """`_shifted_inverse` on the scale of the longest column."""
    largest = magnitude(jnp.diagonal(square, axis1=-2, axis2=-1), axis=-1)
    # The absolute floor is for the zero matrix, which must come out zero.
    floor = float(jnp.finfo(square.dtype).tiny)
    return _shifted_inverse(square, largest[..., None], floor)


def _shifted_inverse(
    square: Array, scale: Array | float = 1.0, floor: float = 0.0
) -> Array:
    """``R^-1`` with ``R^T R = square + shift``, see `cholesky_pass_each`.

    The shift is above the rounding errors of a Gram matrix whose largest number is
    ``scale``.
    """
    r = square.shape[-1]
    eye = jnp.eye(r, dtype=square.dtype)
    return inverse_root(square + (2 * r * _eps(square) * scale + floor) * eye).mT


def orthonormalize(a: Float[Array, "*b m r"]) -> Float[Array, "*b m r"]:
    """An orthonormal basis whose span contains that of ``a``, column by column.

    Columns are orthonormal to 1e-5 for every finite input: linearly dependent,
    badly scaled or zero columns are replaced by directions of a fixed matrix in
    general position. Shifted Cholesky-QR, repeated; a shift alone leaves the
    columns of a rank-deficient matrix dependent, hence the filler of relative size
    1e-6. For full-rank input, the first ``k`` columns span those of ``a``.

    Args:
      a: ``(*batch, m, r)`` with ``r <= m``.

    Returns:
      ``(*batch, m, r)`` in float32 (float64 for float64 input).

    Raises:
      ValueError: if ``r > m``.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> q = lro.linalg.orthonormalize(jnp.ones((6, 3)))
    >>> bool(jnp.allclose(q.T @ q, jnp.eye(3), atol=1e-5))
    True
    """
    flat = a.reshape(-1, *a.shape[-2:])
    return orthonormalize_each([flat], None)[0].reshape(a.shape)


def orthonormalize_each(arrays: Sequence[Array], count: Array | None) -> list[Array]:
    """`orthonormalize` of many matrices, whose small problems are common calls."""
    for a in arrays:
        m, r = a.shape[-2:]
        if r > m:
            raise ValueError(
                f"Cannot orthonormalize a matrix of shape {a.shape}: {r} columns "
                f"cannot be orthonormal in {m} dimensions. Pass at most {m} columns."
            )
    stacks = thin.Stacks([(a,) for a in arrays], count)
    ys = _filled_each(map(meshes.whole_single, stacks.stack(arrays)))
    for _ in range(max((_passes(a.shape[-1]) for a in arrays), default=0)):
        # The longest column has norm one, or all are filled in and short.
        inverses = thin.across(_shifted_inverse, _grams(ys))
        ys = [matmul(y, t) for y, t in zip(ys, inverses, strict=True)]
    ys = _polish_each(_polish_each(ys))
    return stacks.unstack(list(map(meshes.whole_single, ys)))


def _filled_each(arrays: Iterable[Array]) -> list[Array]:
    """Unit columns, with a little of a fixed matrix in general position."""
    # A column's own scale carries no information about the span, and costs accuracy.
    ys = list(map(at_least_float32, arrays))
    sizes = meshes.at_once(magnitude(y, axis=-2) for y in ys)
    ys = [unit_scale(y, size)[0] for y, size in zip(ys, sizes, strict=True)]
    squares = meshes.at_once(jnp.sum(y * y, axis=-2, keepdims=True) for y in ys)
    return [y + _filler(y) for y in map(of_unit_length, ys, squares)]


def _filler(y: Array) -> Array:
    m, r = y.shape[-2:]
    return 2e-6 * m**-0.5 * random.fixed_uniform(m, r).astype(y.dtype)


def _passes(r: int) -> int:
    """So many lift the least singular value of the filler, 1e-9, to one.

    Each lifts a small one by the root of the shift, a hundredfold or more.
    """
    return 4 if r <= 64 else 5 if r <= 256 else 6


def _whiten(y: Array) -> tuple[Array, Array]:
    """``(y T, y U)`` with ``T`` the pseudo-inverse root of ``y^T y = U L U^T``.

    Directions below the noise of the Gram matrix are exactly zero in the first and left
    over, at their own small scale, in the second.
    """
    values, vectors = eigh(gram(y))
    keep = values > 4 * y.shape[-1] * _eps(y) * values[..., :1]
    root = jnp.where(keep, jax.lax.rsqrt(jnp.where(keep, values, 1.0)), 0.0)
    rotated = matmul(y, vectors)
    return rotated * root[..., None, :], jnp.where(keep[..., None, :], 0.0, rotated)


def lifted(y: Float[Array, "*b m k"]) -> Float[Array, "*b m k"]:
    """``y T``, which spans the same and is far better conditioned.

    The columns of y need not be of one size. Those of ``y T`` are orthogonal to what
    the Gram matrix of y can tell, and of norm one, or less where they depend on others:
    by a tenth where what is new in them is three times the root of the shift (1e-3 of
    a column in float32), and of next to none where it is a rounding error. Squares of
    y must be in the range of floats.
    """
    y = kept_apart(y)
    square, k = gram(y), y.shape[-1]
    # Columns below are the rounding errors of the largest, and stay as short.
    noise = (26 * _eps(y)) ** 2 * _longest(square)
    shift = jnp.where(square > noise, 2 * k * _eps(y) * square, 1.0)
    shifted = square + shift * jnp.eye(k, dtype=square.dtype)
    # It fuses with the parts that are taken of it, where a matrix product does not.
    return outer_product(y, inverse_root(shifted).mT)


def _longest(square: Array) -> Array:
    """The largest on the diagonal of a Gram matrix, (*b, 1, 1).

    Of few, compared one by one, which takes no launch of its own on GPU.
    """
    k = square.shape[-1]
    if k > small.WIDEST:
        return jnp.max(square, axis=(-2, -1), keepdims=True)
    lengths = (square[..., i : i + 1, i : i + 1] for i in range(k))
    return functools.reduce(jnp.maximum, lengths)


# What is new in a column that `lifted` has made, squared: what is less is noise, or so
# little that the Gram matrix tells its length to no three digits in float32.
_FAINT = 1e-2


def whitening(square: Float[Array, "b k k"]) -> Float[Array, "b k k"]:
    """``T`` such that the columns of ``y T`` are orthonormal, or zero.

    From ``square = y^T y`` of columns that `lifted` has made: to 5e-6 over the least
    square of what is new in one. That is 1e-2 at least, and one if none is faint.
    """
    if square.shape[-1] <= small.WIDEST:
        return inverse_cholesky(square, _FAINT)
    # An eigendecomposition has errors of the size of the longest column: to one size.
    diagonal = jnp.diagonal(square, axis1=-2, axis2=-1)
    used = diagonal > _FAINT
    unit = jnp.where(used, jax.lax.rsqrt(jnp.where(used, diagonal, 1.0)), 0.0)
    values, vectors = eigh(square * unit[..., None] * unit[..., None, :])
    keep = values > 0.1
    root = jnp.where(keep, jax.lax.rsqrt(jnp.where(keep, values, 1.0)), 0.0)
    return unit[..., None] * vectors * root[..., None, :]


def range_basis(a: Float[Array, "*b m r"]) -> Float[Array, "*b m r"]:
    """Orthonormal columns that span exactly the range of ``a``; the rest are zero.

    ``Q Q^T a = a`` to 1e-5 of ``a``'s norm, and every column of ``Q`` has norm one or
    is exactly zero: nothing is invented for a rank-deficient ``a``. That is what a
    codec wants, whose unused columns must decode to nothing. Each round takes the
    eigendecomposition of an (r, r) Gram matrix and leaves to the next what was lost
    in the noise of the squared condition number.

    Args:
      a: ``(*batch, m, r)``, any ``r``.

    Returns:
      ``(*batch, m, r)`` in float32 (float64 for float64 input).
    """
    left_over, _ = unit_scale(a)
    floor = (
        8 * _eps(left_over) * jnp.linalg.norm(left_over, axis=(-2, -1), keepdims=True)
    )
    basis = jnp.zeros_like(left_over)
    for _ in range(2 if a.shape[-1] <= 16 else 3):
        # Below the floor, a left-over is the rounding error of the rounds before.
        norm = jnp.linalg.norm(left_over, axis=-2, keepdims=True)
        left_over, scale = unit_scale(jnp.where(norm > floor, left_over, 0.0))
        floor = floor / scale
        new, left_over = _whiten(left_over)
        # New columns stand first, as the old ones do: move them behind those.
        used = jnp.sum(jnp.any(basis != 0, axis=-2), axis=-1)[..., None, None]
        place = (jnp.arange(a.shape[-1]) - used) % a.shape[-1]
        new = new - matmul(basis, matmul(basis.mT, new))
        basis = _polish(_polish(basis + jnp.take_along_axis(new, place, axis=-1)))
        for _ in range(2):  # once is not enough in floating point, twice is
            left_over = left_over - matmul(basis, matmul(basis.mT, left_over))
    return basis


def gram_eigh(
    a: Float[Array, "*b m n"], rank: int | None = None
) -> tuple[Float[Array, "*b m r"], Float[Array, "*b r"]]:
    """Leading left singular vectors and values, by the smaller Gram matrix.

    Two eigendecompositions of (s, s) matrices, s = min(m, n), and products. As squaring
    a matrix costs half of the digits, the first only tells the vectors whose values are
    above 1e-2 of the largest; ``a`` is multiplied by all of them, and of the others,
    that product has a Gram matrix which is precise at their own size.
    Values are precise to about 3e-6 of the largest, those above 1e-4 of it to four
    digits; what is below is noise. The vectors are orthonormal all the same.

    Args:
      a: ``(*batch, m, n)``.
      rank: how many to return, ``min(m, n)`` (default: all of these).

    Returns:
      ``(u, s)`` of shapes ``(*batch, m, rank)`` and ``(*batch, rank)``, descending.
    """
    left, turn, values = singular_factors(a, rank)
    return left if turn is None else matmul(left, turn), values


def singular_factors(
    a: Float[Array, "*b m n"], rank: int | None = None
) -> tuple[Float[Array, "*b m s"], Float[Array, "*b s r"] | None, Float[Array, "*b r"]]:
    """``(w, t, values)`` of `gram_eigh`, whose vectors are ``w t``, or w without t.

    For what takes a few of all vectors: it multiplies no others.
    """
    m, n = a.shape[-2:]
    rank = min(m, n) if rank is None else min(rank, m, n)
    find = functools.partial(_singular_factors, rank=rank)
    return meshes.shared_out(find, a)


def _singular_factors(a: Array, rank: int) -> tuple[Array, Array | None, Array]:
    a, scale = unit_scale(a)
    m, n = a.shape[-2:]
    wide = meshes.whole_columns(a if m <= n else a.mT)
    vectors = meshes.gathered(eigh(gram(wide.mT))[1])
    rows = matmul(vectors.mT, wide)
    values, turn = _separated(gram(rows.mT), rank)
    if m > n:
        vectors, turn = orthonormalize(matmul(rows.mT, turn)), None
    return vectors, turn, jnp.sqrt(jnp.maximum(values, 0.0)) * scale[..., 0]


# Of squares, relative to the largest: so far down one eigendecomposition tells apart.
_TOLD = 1e-4


def _separated(square: Array, rank: int) -> tuple[Array, Array]:
    """Eigenvalues and vectors of a nearly diagonal matrix of entries of many sizes.

    Its first rows, the large ones, are diagonal but for rounding. What they share with
    the small ones is rotated away to first order, which is enough for so small angles,
    and the small ones have an eigendecomposition of their own, in which the rounding
    errors of large numbers have no part.
    """
    k = square.shape[-1]
    diagonal = jnp.diagonal(square, axis1=-2, axis2=-1)
    large = diagonal > _TOLD * jnp.max(diagonal, axis=-1, keepdims=True)
    row, column = ~large[..., None], large[..., None, :]
    divisor = jnp.where(large, diagonal, 1.0)[..., None, :]
    angle = jnp.where(row & column, square / divisor, 0.0)
    rest = jnp.where(row & ~column, square - matmul(angle, square), 0.0)
    # The large ones take no part: each is an eigenvector, of a negative value that
    # no other has.
    size = jnp.max(jnp.diagonal(rest, axis1=-2, axis2=-1), axis=-1, keepdims=True)
    apart = jnp.where(large, -size * jnp.linspace(0.5, 1.0, k, dtype=square.dtype), 0.0)
    eye = jnp.eye(k, dtype=square.dtype)
    values, vectors = eigh(rest + apart[..., None] * eye)
    known = jnp.where(large, diagonal, 0.0)[..., None]
    values = jnp.maximum(values, 0.0) + jnp.sum(vectors**2 * known, axis=-2)
    order = jnp.argsort(-values, axis=-1)[..., :rank]
    vectors = jnp.take_along_axis(vectors, order[..., None, :], axis=-1)
    turn = matmul(_polish(eye + angle - angle.mT), vectors)
    return jnp.take_along_axis(values, order, axis=-1), turn
