"""Factorizations of stacks of small matrices in a few fused loops.

A library's call takes one shape at a time, is followed by a dozen launches that fetch
its results, and breaks a CUDA graph; on TPU, an eigendecomposition of any size is a
large program. Up to a width of `WIDEST`, these are plain arithmetic of a fixed number
of rounds on all matrices of a model at once.
"""

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

WIDEST = 16

# Up to here, an elimination is written out number by number. XLA makes two launches of
# it on GPU, and eleven of eight masked steps; a width of 16 would take it 20 seconds.
_BY_NUMBERS = 8


def next_power_of_two(size: int, least: int = 1) -> int:
    return max(least, 1 << (size - 1).bit_length())


# Compiled, so that JAX traces its hundreds of operations once for a shape, and not in
# each program that may run on an accelerator.
@functools.partial(jax.jit, static_argnames=("least", "unroll"))
def inverse_cholesky(
    gram: Float[Array, "b k k"], least: float = 0.0, unroll: bool = True
) -> Float[Array, "b k k"]:
    """``T`` upper triangular with ``T^T gram T = 1``, column by column.

    A column whose remainder, after the ones before it, is at most ``least`` is dropped:
    zero in ``T``.

    Args:
      gram: symmetric, with no negative eigenvalue but for rounding.
      least: see above.
      unroll: whether the steps are written out, which spares a GPU launches and costs
        a CPU compilation.
    """
    if unroll and gram.shape[-1] <= _BY_NUMBERS:
        return _by_numbers(gram, least)
    return _by_rows(gram, least, unroll)


def _by_numbers(gram: Array, least: float) -> Array:
    """The factor R and its inverse, number by number, each an array (b, 1, 1)."""
    k = gram.shape[-1]
    r, t = {}, {}
    for j in range(k):
        for i in range(j + 1):
            r[i, j] = gram[:, i : i + 1, j : j + 1]
            for h in range(i):
                r[i, j] -= r[h, i] * r[h, j]
            if i < j:
                r[i, j] *= t[i, i]
        t[j, j] = _root(r[j, j], least)
        for i in reversed(range(j)):
            between = range(i + 1, j + 1)
            t[i, j] = -t[i, i] * _sum(r[i, h] * t[h, j] for h in between)
    return jnp.concatenate([_column(t, j, k) for j in range(k)], axis=-1)


def _column(t: Mapping[tuple[int, int], Array], j: int, k: int) -> Array:
    place = jnp.arange(k)[:, None]
    column = jnp.where(place == j, t[j, j], 0.0)
    for i in range(j):
        column = jnp.where(place == i, t[i, j], column)
    return column


def _root(pivot: Array, least: float) -> Array:
    """The root of the pivot's inverse; zero where it is dropped."""
    used = pivot > least
    return jnp.where(used, jax.lax.rsqrt(jnp.where(used, pivot, 1.0)), 0.0)


def _by_rows(gram: Array, least: float, unroll: bool) -> Array:
    """Gauss's elimination on ``(gram, 1)``, whose right half becomes ``T^T``."""
    k = gram.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(k, dtype=gram.dtype), gram.shape)
    place = jnp.arange(k)

    def step(j, rows):
        taken = place == j
        # Sums term by term, which are fused with all else where a reduction is not.
        row = _sum(jnp.where(taken[i], rows[:, i], 0.0) for i in range(k))
        pivot = _sum(jnp.where(taken[i], row[:, [i]], 0.0) for i in range(k))
        row = row * _root(pivot, least)
        below = rows - row[:, :k, None] * row[:, None, :]
        rows = jnp.where(taken[:, None], row[:, None, :], rows)
        return jnp.where((place > j)[:, None], below, rows)

    rows = jnp.concatenate([gram, eye], axis=-1)
    rows = jax.lax.fori_loop(0, k, step, rows, unroll=k if unroll else 1)
    return rows[:, :, k:].mT


def _sum(terms: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, terms)


@functools.partial(jax.jit, static_argnames="unroll")
def jacobi_eigh(
    a: Float[Array, "b k k"], unroll: bool = True
) -> tuple[Float[Array, "b k"], Float[Array, "b k k"]]:
    """Eigenvalues of symmetric matrices, descending, and eigenvectors, by Jacobi.

    Each round rotates k / 2 disjoint pairs at once, and a round-robin brings every
    index to every other in a sweep; it converges quadratically. Small eigenvalues of a
    graded matrix come out to their own precision, as by no other method.
    """
    k = a.shape[-1]
    if k == 1:
        return a[..., 0], jnp.ones_like(a)
    if k % 2:  # an index that meets nobody: its row is zero, and so are its rotations
        a = jnp.pad(a, [(0, 0), (0, 1), (0, 1)])
    size = a.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(size, dtype=a.dtype), a.shape)
    # Some rounds in the body spare a GPU the launches that count a loop's steps.
    rows = jax.lax.fori_loop(
        0,
        rounds(size),
        lambda _, rows: _rotate(rows),
        jnp.concatenate([a, eye], axis=1),
        unroll=min(7, size - 1) if unroll else 1,
    )
    a, v = rows[:, :size], rows[:, size:]
    return _descending(jnp.diagonal(a, axis1=-2, axis2=-1), v, k)


def rounds(size: int) -> int:
    """Of Jacobi's rotations: to 1e-6 for any matrix; most need two sweeps fewer."""
    return (6 if size <= 8 else 8) * (size - 1)


def _descending(values: Array, v: Array, k: int) -> tuple[Array, Array]:
    """Sorted by comparing all pairs, which is one small loop where a sort is many."""
    size = values.shape[-1]
    if k < size:  # what was added is an eigenvector of its own, and comes last
        values = jnp.where(jnp.abs(v[:, -1, :]) > 0.5, -jnp.inf, values)
    mine, other = values[:, :, None], values[:, None, :]
    earlier = np.tri(size, k=-1, dtype=bool)
    before = (other > mine) | ((other == mine) & earlier)
    place = jnp.sum(before, axis=-1)[:, :, None] == jnp.arange(k)
    chosen = jnp.where(place, values[:, :, None], 0.0)
    moved = jnp.where(place[:, None], v[:, :k, :, None], 0.0)
    return jnp.sum(chosen, axis=1), jnp.sum(moved, axis=2)


def _next_round(size: int) -> np.ndarray:
    """Where each place takes its index from: pairs are ``(i, i + size / 2)``.

    The first place stays, all others move on by one around the two rows of places.
    """
    half = size // 2
    top, bottom = np.arange(half), np.arange(half, size)
    new_top = np.concatenate([top[:1], bottom[:1], top[1:-1]]) if half > 1 else top
    new_bottom = np.concatenate([bottom[1:], top[-1:]]) if half > 1 else bottom
    return np.concatenate([new_top, new_bottom])


def _rotate(rows: Array) -> Array:
    """One round: rotations in all planes ``(i, i + k / 2)`` make ``a`` zero there.

    Of ``a``, above, rows and columns; of the eigenvectors, below, the columns. Each
    number is made of four, and takes its place in the next round.
    """
    size = rows.shape[-1]
    half, order = size // 2, _next_round(size)
    at = np.arange(half)
    p, q, off = rows[:, at, at], rows[:, at + half, at + half], rows[:, at, at + half]
    # The smaller angle of the two. Where there is nothing to rotate, it is zero.
    twice = q - p
    length = jnp.abs(twice) + jnp.sqrt(twice * twice + 4 * off * off)
    t = jnp.where(twice < 0, -2.0, 2.0) * off / jnp.where(length > 0, length, 1.0)
    c = jax.lax.rsqrt(1 + t * t)
    s = t * c
    c, s = jnp.concatenate([c, c], -1)[:, order], jnp.concatenate([-s, s], -1)[:, order]
    partner = (order + half) % size
    below = np.arange(size, 2 * size)
    row, other = np.concatenate([order, below]), np.concatenate([partner, below])
    c_row = jnp.concatenate([c, jnp.ones_like(c)], -1)[:, :, None]
    s_row = jnp.concatenate([s, jnp.zeros_like(s)], -1)[:, :, None]

    def turned(rows):
        return c[:, None] * rows[:, :, order] + s[:, None] * rows[:, :, partner]

    return c_row * turned(rows[:, row]) + s_row * turned(rows[:, other])
