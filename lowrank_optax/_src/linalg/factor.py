"""Gram-based factorizations over the last two axes, any batch axes.

Everything tall is a matmul: the only factorizations are those of small (r, r)
matrices, so rows may stay sharded (a Gram matrix costs one small all-reduce) and
nothing here needs Householder QR, which is slow on accelerators. Arithmetic is in
float32 at least, at the highest matmul precision.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowrank_optax._src.linalg import random
from lowrank_optax._src.linalg.lapack import eigh, inverse_root
from lowrank_optax._src.linalg.products import matmul, unit_columns, unit_scale

_EPS = 1.1920929e-07  # float32; the laws below are promised at this precision


def _gram(y: Array) -> Array:
    return matmul(y.mT, y)


def _polish(y: Array, gram: Array | None = None) -> Array:
    """One Newton-Schulz step: squares a small orthonormality error, keeps zeros."""
    gram = _gram(y) if gram is None else gram
    return matmul(y, 1.5 * jnp.eye(y.shape[-1], dtype=y.dtype) - 0.5 * gram)


def cholesky_pass(y: Array, gram: Array | None = None) -> Array:
    """``y R^-1`` with ``R^T R = y^T y + shift``: same span, far better conditioned."""
    r = y.shape[-1]
    gram = _gram(y) if gram is None else gram
    # The absolute floor is for the zero matrix, which must come out zero.
    shift = 2 * r * _EPS * jnp.max(jnp.diagonal(gram, axis1=-2, axis2=-1), -1) + 1e-30
    eye = jnp.eye(r, dtype=y.dtype)
    return matmul(y, inverse_root(gram + shift[..., None, None] * eye).mT)


def orthonormalize(a: Float[Array, "*b m r"]) -> Float[Array, "*b m r"]:
    """An orthonormal basis whose span contains that of ``a``, column by column.

    Columns are orthonormal to 1e-5 for every finite input: linearly dependent,
    badly scaled or zero columns are replaced by directions of a fixed matrix in
    general position. Shifted Cholesky-QR, repeated; a relative shift alone leaves the
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
    m, r = a.shape[-2:]
    if r > m:
        raise ValueError(
            f"Cannot orthonormalize a matrix of shape {a.shape}: {r} columns cannot be "
            f"orthonormal in {m} dimensions. Pass at most {m} columns."
        )
    y, _ = unit_scale(a)
    # A column's own scale carries no information about the span, and costs accuracy.
    largest = jnp.max(jnp.abs(y), axis=-2, keepdims=True)
    y = unit_columns(y / jnp.where(largest > 0, largest, 1.0))
    y = y + 1e-6 * m**-0.5 * random.filler(m, r).astype(y.dtype)
    tolerance = max(1e-3, 4 * r * _EPS)  # of a column; below is what the shift leaves

    def far(state):
        _, gram, passes = state
        error = jnp.linalg.norm(gram - jnp.eye(r, dtype=y.dtype), axis=-1)
        return (passes < 8) & jnp.any(error > tolerance)

    def lift(state):
        y, gram, passes = state
        y = cholesky_pass(y, gram)
        return y, _gram(y), passes + 1

    # Each pass lifts a small singular value at least a hundredfold: two are enough for
    # most, and six for dependent columns.
    y, gram, _ = jax.lax.while_loop(far, lift, (y, _gram(y), 0))
    return _polish(_polish(y, gram))


def _whiten(y: Array) -> tuple[Array, Array]:
    """``(y T, y U)`` with ``T`` the pseudo-inverse root of ``y^T y = U L U^T``.

    Ascending order. Directions below the noise of the Gram matrix are exactly zero in
    the first and left over, at their own small scale, in the second.
    """
    values, vectors = eigh(_gram(y))
    keep = values > 4 * y.shape[-1] * _EPS * values[..., -1:]
    root = jnp.where(keep, jax.lax.rsqrt(jnp.where(keep, values, 1.0)), 0.0)
    rotated = matmul(y, vectors)
    return rotated * root[..., None, :], jnp.where(keep[..., None, :], 0.0, rotated)


def whitening(y: Float[Array, "*b m r"]) -> Float[Array, "*b r r"]:
    """``T`` such that the columns of ``y T`` are orthonormal to 1e-4, or zero.

    Where only products with ``y`` are known, such as ``y^T A``, that of its basis is
    ``T^T (y^T A)``. Two rounds, as the Gram matrix of the first does not tell
    directions below 3e-3 of the largest from noise: without the second, a code of a
    matrix dominated by one direction has up to twice its error. Directions below 1e-3
    are left out, as ``T`` multiplies the rounding errors of ``y^T A`` by the inverse;
    `range_basis` finds those too, and has no ``T``.
    """
    eye = jnp.eye(y.shape[-1], dtype=y.dtype)
    scale = _inverse_norms(y, 0.0)
    unit = y * scale
    _, t = eigh(_gram(unit))
    t = t * _inverse_norms(matmul(unit, t), 1e-3)
    values, vectors = eigh(_gram(matmul(unit, t)))
    keep = values > 8 * y.shape[-1] * _EPS * values[..., -1:]
    root = jnp.where(keep, jax.lax.rsqrt(jnp.where(keep, values, 1.0)), 0.0)
    t = matmul(t, vectors * root[..., None, :])
    for _ in range(2):
        t = matmul(t, 1.5 * eye - 0.5 * _gram(matmul(unit, t)))
    return scale.mT * t


def _inverse_norms(y: Array, floor: float) -> Array:
    """Of the columns, (*batch, 1, r); zero for those below ``floor`` of the largest."""
    norm = jnp.linalg.norm(y, axis=-2, keepdims=True)
    used = norm > floor * jnp.max(norm, axis=-1, keepdims=True)
    return jnp.where(used, 1.0 / jnp.where(used, norm, 1.0), 0.0)


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
    floor = 8 * _EPS * jnp.linalg.norm(left_over, axis=(-2, -1), keepdims=True)
    basis = jnp.zeros_like(left_over)
    for _ in range(2 if a.shape[-1] <= 16 else 3):
        # Below the floor, a left-over is the rounding error of the rounds before.
        norm = jnp.linalg.norm(left_over, axis=-2, keepdims=True)
        left_over, scale = unit_scale(jnp.where(norm > floor, left_over, 0.0))
        floor = floor / scale
        new, left_over = _whiten(left_over)
        # New columns stand last, as the old ones do: move them in front of those.
        used = jnp.sum(jnp.any(basis != 0, axis=-2), axis=-1)[..., None, None]
        place = (jnp.arange(a.shape[-1]) + used) % a.shape[-1]
        new = new - matmul(basis, matmul(basis.mT, new))
        basis = _polish(_polish(basis + jnp.take_along_axis(new, place, axis=-1)))
        for _ in range(2):  # once is not enough in floating point, twice is
            left_over = left_over - matmul(basis, matmul(basis.mT, left_over))
    return basis


def gram_eigh(
    a: Float[Array, "*b m n"], rank: int | None = None
) -> tuple[Float[Array, "*b m r"], Float[Array, "*b r"]]:
    """Leading left singular vectors and values, by the smaller Gram matrix.

    An eigendecomposition of an (s, s) matrix, s = min(m, n), several times cheaper
    than the SVD. Values below 3e-4 of the largest are noise, as squaring the matrix
    costs half of the digits; the vectors are orthonormal all the same.

    Args:
      a: ``(*batch, m, n)``.
      rank: how many to return, ``min(m, n)`` (default: all of these).

    Returns:
      ``(u, s)`` of shapes ``(*batch, m, rank)`` and ``(*batch, rank)``, descending.
    """
    a, scale = unit_scale(a)
    m, n = a.shape[-2:]
    rank = min(m, n) if rank is None else min(rank, m, n)
    values, vectors = eigh(_gram(a.mT) if m <= n else _gram(a))
    vectors = jnp.flip(vectors, -1)[..., :rank]
    values = jnp.flip(values, -1)[..., :rank]
    if m > n:
        vectors = orthonormalize(matmul(a, vectors))
    return vectors, jnp.sqrt(jnp.maximum(values, 0.0)) * scale[..., 0]
