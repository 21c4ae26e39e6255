"""Randomized range finders and singular value decompositions (Halko et al. 2011).

Products with a random or known start, and `linalg`'s factorizations of what is thin.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lowrank_optax._src import linalg
from lowrank_optax._src.linalg import random
from lowrank_optax._src.linalg.products import matmul, unit_scale


def range_finder(
    key: Key[Array, "*b"] | Key[Array, ""],
    a: Float[Array, "*b m n"],
    size: int,
    power_iters: int = 0,
    start: Float[Array, "*b n k"] | None = None,
) -> Float[Array, "*b m l"]:
    """An orthonormal basis of the approximate range of ``a`` (Halko et al. 2011, 4.4).

    ``Q = orth((A A^T)^q A Omega)`` with a Gaussian ``Omega``; between the products the
    sketch is re-conditioned, so that small singular values survive the powers.

    Args:
      key: for ``Omega``; one, or one for each matrix.
      a: ``(*batch, m, n)``.
      size: columns wanted; at most ``min(m, n)`` are returned.
      power_iters: q; each costs two more passes over ``a``.
      start: columns to use as the first ones of ``Omega`` (a warm start).

    Returns:
      ``(*batch, m, min(size, m, n))`` with orthonormal columns.
    """
    a = linalg.at_least_float32(a)
    m, n = a.shape[-2:]
    size = min(size, m, n)
    known = 0 if start is None else min(start.shape[-1], size)
    shape = (*a.shape[:-2], n, size - known)
    omega = random.normal(key, shape, a.dtype)
    if start is not None:
        # Unit columns: a warm start on the scale of the Gaussian ones.
        start = linalg.unit_columns(start[..., :known].astype(a.dtype)) * n**0.5
        omega = jnp.concatenate([start, omega], axis=-1)
    unit = thin_scale(a)
    y = linalg.sketch(a, omega * unit)
    for _ in range(power_iters):
        y = linalg.cholesky_pass(linalg.near_one(y))
        z = linalg.cholesky_pass(linalg.near_one(linalg.sketch(a.mT, y * unit)))
        y = linalg.sketch(a, z * unit)
    return linalg.orthonormalize(y)


def thin_scale(a: Float[Array, "*b m n"]) -> Float[Array, "*b 1 1"]:
    """A power of two by which a thin factor is multiplied instead of a large ``a``.

    So the product is of the size that it has with an ``a`` of largest entry about 1, or
    is far from both ends of the range of floats; and no scaled copy of ``a`` is made.
    """
    largest = jnp.max(jnp.abs(a), axis=(-2, -1), keepdims=True)
    return jnp.clip(linalg.power_of_two(largest)[0], 2.0**-100, 2.0**100)


def leading_singular(
    key: Key[Array, "*b"] | Key[Array, ""],
    a: Float[Array, "*b m n"],
    rank: int,
    iters: int = 2,
    oversample: int = 8,
    start: Float[Array, "*b m k"] | None = None,
) -> tuple[Float[Array, "*b m r"], Float[Array, "*b r n"]]:
    """The vectors of `subspace_iteration`, and the projection of ``a`` to them.

    In the span of a basis Q of the range, these are ``Q U`` and ``U^T B``, with U the
    leading eigenvectors of ``B B^T``, ``B = Q^T a``.
    """
    a, unit = linalg.at_least_float32(a), thin_scale(a)
    warm = None if start is None else linalg.sketch(a.mT, start * unit)
    basis = range_finder(key, a, rank + oversample, iters, warm)
    b = linalg.project(basis * unit, a)
    _, vectors = linalg.eigh(matmul(b, b.mT))
    vectors = vectors[..., : min(rank, *a.shape[-2:])]
    return matmul(basis, vectors), matmul(vectors.mT, b) / unit


def subspace_iteration(
    key: Key[Array, "*b"] | Key[Array, ""],
    a: Float[Array, "*b m n"],
    rank: int,
    iters: int = 2,
    oversample: int = 8,
    start: Float[Array, "*b m k"] | None = None,
) -> Float[Array, "*b m r"]:
    """Leading left singular vectors by randomized subspace iteration (Halko 4.4).

    Args:
      key: for the Gaussian start; one, or one for each matrix.
      a: ``(*batch, m, n)``.
      rank: columns returned, at most ``min(m, n)``.
      iters: products with ``A A^T``.
      oversample: extra columns carried along and dropped at the end.
      start: an older basis ``(*batch, m, k)`` to begin from.

    Returns:
      ``(*batch, m, min(rank, m, n))``, orthonormal, in descending order.
    """
    return leading_singular(key, a, rank, iters, oversample, start)[0]


def randomized_svd(
    key: Key[Array, "*b"] | Key[Array, ""],
    a: Float[Array, "*b m n"],
    rank: int,
    oversample: int = 8,
    power_iters: int = 1,
) -> tuple[Float[Array, "*b m r"], Float[Array, "*b r"], Float[Array, "*b r n"]]:
    """A rank-``rank`` SVD by a Gaussian sketch (Halko et al. 2011; MLorc Algorithm 3).

    ``Q = range_finder(A, rank + oversample)``, then the exact SVD of ``Q^T A``,
    truncated to ``rank`` (which MLorc's Algorithm 3 leaves out). For oversample
    p >= 2 and no power iteration, the expected squared error is at most
    ``(1 + rank / (p - 1))`` times that of the best rank-``rank`` approximation before
    the truncation. Costs ``2 (power_iters + 1)`` products with ``A``.

    Args:
      key: for the sketch; one, or one for each matrix.
      a: ``(*batch, m, n)``.
      rank: at most ``min(m, n)`` are returned.
      oversample: p.
      power_iters: q.

    Returns:
      ``(u, s, vt)`` of shapes ``(*batch, m, r)``, ``(*batch, r)``, ``(*batch, r, n)``.

    >>> import jax, jax.numpy as jnp, lowrank_optax as lro
    >>> a = jnp.outer(jnp.arange(1.0, 6.0), jnp.arange(1.0, 8.0))
    >>> u, s, vt = lro.linalg.randomized_svd(jax.random.key(0), a, rank=1)
    >>> bool(jnp.allclose(u * s @ vt, a, rtol=1e-4))
    True
    """
    rank = min(rank, *a.shape[-2:])
    a, scale = unit_scale(a)
    q = range_finder(key, a, rank + oversample, power_iters)
    b = linalg.project(q, a)
    rows = linalg.orthonormalize(b.mT).mT
    u, s, vt = linalg.svd(matmul(b, rows.mT))
    u, s, vt = u[..., :rank], s[..., :rank], vt[..., :rank, :]
    return matmul(q, u), s * scale[..., 0], matmul(vt, rows)
