"""Randomized range finders and singular value decompositions (Halko et al. 2011).

Products with a random or known start, and `linalg`'s factorizations of what is thin.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lowrank_optax._src import linalg
from lowrank_optax._src.linalg import meshes, random
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
    starts = None if start is None else [start]
    units = _thin_scales([a])
    return _range_finder_each([key], [a], units, [size], power_iters, starts)[0]


def _range_finder_each(
    keys: Sequence[Array],
    arrays: Sequence[Array],
    units: Sequence[Array],
    sizes: Sequence[int],
    power_iters: int,
    starts: Sequence[Array] | None,
) -> list[Array]:
    """`range_finder` of many matrices, whose small problems are common calls."""
    firsts = [None] * len(arrays) if starts is None else starts
    zs = [_omega(*of_one) for of_one in zip(keys, arrays, sizes, firsts, strict=True)]
    ys = _sketches(arrays, zs, units)
    for _ in range(power_iters):
        zs = linalg.cholesky_pass_each(
            _sketches([a.mT for a in arrays], linalg.cholesky_pass_each(ys), units)
        )
        ys = _sketches(arrays, zs, units)
    return linalg.orthonormalize_each(ys, None)


def _sketches(
    arrays: Sequence[Array], thin: Sequence[Array], units: Sequence[Array]
) -> list[Array]:
    """Each matrix times a thin one, which has its scale."""
    each = zip(arrays, thin, units, strict=True)
    return [linalg.sketch(a, w * unit) for a, w, unit in each]


def _omega(key: Array, a: Array, size: int, start: Array | None) -> Array:
    """The Gaussian matrix that ``a`` is multiplied by, its first columns known."""
    m, n = a.shape[-2:]
    size = min(size, m, n)
    known = 0 if start is None else min(start.shape[-1], size)
    omega = random.normal(key, (*a.shape[:-2], n, size - known), a.dtype)
    if start is None:
        return omega
    # Unit columns: a warm start on the scale of the Gaussian ones.
    start = linalg.unit_columns(start[..., :known].astype(a.dtype)) * n**0.5
    return jnp.concatenate([start, omega], axis=-1)


def _thin_scales(arrays: Sequence[Array]) -> list[Array]:
    """Powers of two, (*b, 1, 1), by which thin factors are multiplied, not large ones.

    So a product is of the size that it has with a matrix of largest entry about 1, or
    is far from both ends of the range of floats; and no scaled copy is made.
    """
    sizes = meshes.at_once(map(linalg.magnitude, arrays))
    found = []
    for x in sizes:
        # A thin factor times that must not overflow: 2^100 in float32.
        most = 2.0 ** (jnp.finfo(x.dtype).maxexp - 28)
        found.append(jnp.clip(linalg.power_of_two(x)[0], 1 / most, most))
    return found


def leading_singular(
    key: Key[Array, "*b"] | Key[Array, ""],
    a: Float[Array, "*b m n"],
    rank: int,
    iters: int = 2,
    oversample: int = 8,
    start: Float[Array, "*b m k"] | None = None,
) -> tuple[Float[Array, "*b m r"], Float[Array, "*b r n"]]:
    """The vectors of `subspace_iteration`, and the projection of ``a`` to them."""
    starts = None if start is None else [start]
    return leading_singular_each([key], [a], [rank], iters, oversample, starts)[0]


def leading_singular_each(
    keys: Sequence[Array],
    arrays: Sequence[Array],
    ranks: Sequence[int],
    iters: int = 2,
    oversample: int = 8,
    starts: Sequence[Array] | None = None,
) -> list[tuple[Array, Array]]:
    """`leading_singular` of many matrices, whose small problems are common calls.

    In the span of a basis Q of the range, the vectors and the projection are ``Q U``
    and ``U^T B``, with U the leading eigenvectors of ``B B^T``, ``B = Q^T a``.
    """
    arrays = list(map(linalg.at_least_float32, arrays))
    units = _thin_scales(arrays)
    if starts is not None:
        starts = _sketches([a.mT for a in arrays], starts, units)
    sizes = [rank + oversample for rank in ranks]
    bases = _range_finder_each(keys, arrays, units, sizes, iters, starts)
    wide = [
        meshes.gathered(basis * unit) for basis, unit in zip(bases, units, strict=True)
    ]
    coeffs = list(map(linalg.project, wide, arrays))
    turns = linalg.eigenvectors_each([matmul(b, b.mT) for b in coeffs])
    turns = [
        turn[..., : min(rank, *a.shape[-2:])]
        for turn, a, rank in zip(turns, arrays, ranks, strict=True)
    ]
    return [
        (matmul(basis, turn), matmul(turn.mT, b) / unit)
        for basis, turn, b, unit in zip(bases, turns, coeffs, units, strict=True)
    ]


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
      oversample: p, columns of the sketch beyond the rank.
      power_iters: q, rounds of power iteration.

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
