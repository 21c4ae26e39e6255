"""Factorizations of small matrices on GPU, each in one launch: a program a matrix.

Of the same arithmetic in `linalg.small`, which is what TPUs run, XLA makes some fifty
launches, and takes seconds to compile it. Here a matrix stays in the registers of its
program, as a tile of a power of two, which Triton wants.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array

from lowrank_optax._src.linalg import small
from lowrank_optax._src.linalg.lapack import eigh_derivative

_LEAST = 4  # of two indices there is one pair, and no order of rounds


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def inverse_cholesky(gram: Array, least: float, interpret: bool) -> Array:
    """`linalg.small.inverse_cholesky`."""
    kernel = functools.partial(_eliminate, k=gram.shape[-1], least=least)
    # By JAX, so that they vary within a `jax.shard_map` as the matrices do.
    outs = jax.eval_shape(lambda x: [x], gram)
    return _each_matrix(kernel, "eliminate", interpret, gram, outs)[0]


@inverse_cholesky.defjvp
def _inverse_cholesky_derivative(least, _, primals, tangents):
    return jax.jvp(lambda x: small.inverse_cholesky(x, least), primals, tangents)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def jacobi_eigh(a: Array, interpret: bool) -> tuple[Array, Array]:
    """`linalg.small.jacobi_eigh`."""
    kernel = functools.partial(_diagonalize, k=a.shape[-1])
    outs = jax.eval_shape(lambda x: [x[:, :1], x], a)
    values, vectors = _each_matrix(kernel, "diagonalize", interpret, a, outs)
    return values[:, 0], vectors


@jacobi_eigh.defjvp
def _jacobi_eigh_derivative(interpret, primals, tangents):
    find = functools.partial(jacobi_eigh, interpret=interpret)
    return eigh_derivative(find)(primals, tangents)


def _each_matrix(
    kernel: Callable[..., None],
    name: str,
    interpret: bool,
    a: Array,
    outs: Sequence[jax.ShapeDtypeStruct],
) -> list[Array]:
    """A kernel's results ``(b, ., k)``, which is given one matrix of (b, k, k)."""
    wide = a.shape[-1] > 8
    return pl.pallas_call(
        kernel,
        grid=(len(a),),
        in_specs=[_matrix_of(a)],
        out_specs=[_matrix_of(x) for x in outs],
        out_shape=outs,
        compiler_params=triton.CompilerParams(num_warps=4 if wide else 1),
        interpret=interpret,
        name=name,
    )(a)


def _matrix_of(stack: Any) -> pl.BlockSpec:
    return pl.BlockSpec((None, *stack.shape[1:]), lambda b: (b, 0, 0))


def _eliminate(gram_ref, out_ref, *, k, least):
    """Gauss's elimination on the columns of ``(gram, 1)``: the lower half becomes T."""
    row, column = _places(k)
    gram = _load(gram_ref, k)

    def step(j, halves):
        taken = column == j
        upper, lower = (_sum(jnp.where(taken, x, 0.0), 1) for x in halves)
        pivot = _sum(jnp.where(row == j, upper, 0.0), 0)
        used = pivot > least
        root = jnp.where(used, jax.lax.rsqrt(jnp.where(used, pivot, 1.0)), 0.0)
        upper, lower = upper * root, lower * root
        # What the taken one has in the place of each column.
        shares = _sum(jnp.where(row == column, upper, 0.0), 0)
        return tuple(
            jnp.where(taken, new, jnp.where(column > j, x - new * shares, x))
            for x, new in zip(halves, (upper, lower), strict=True)
        )

    start = gram, jnp.where(row == column, 1.0, 0.0).astype(gram.dtype)
    _store(out_ref, jax.lax.fori_loop(0, k, step, start)[1], k)


def _diagonalize(a_ref, values_ref, vectors_ref, *, k):
    """Jacobi's rotations, in the order of `linalg.small`, and a sort."""
    row, column = _places(k)
    size = len(row)
    a = _load(a_ref, k)
    start = a, jnp.where(row == column, 1.0, 0.0).astype(a.dtype)
    rounds = small.rounds(size)
    a, v = jax.lax.fori_loop(0, rounds, lambda _, both: _rotate(*both), start)
    # Rows that were added are eigenvectors of their own, and come last.
    added = _sum(jnp.where(row >= k, jnp.abs(v), 0.0), 0) > 0.5
    values = jnp.where(added, -jnp.inf, _sum(jnp.where(row == column, a, 0.0), 0))
    mine = _upright(values)
    before = (values > mine) | ((values == mine) & (column < row))
    place = _sum(jnp.where(before, 1, 0), 1)
    _store(values_ref, _sum(jnp.where(place == column, mine, 0.0), 0), k)
    _store(vectors_ref, _product(v, jnp.where(place == column, 1.0, 0.0)), k)


def _rotate(a: Array, v: Array) -> tuple[Array, Array]:
    """One round: rotations in all planes ``(i, i + size / 2)`` make ``a`` zero there.

    They are one matrix, whose columns stand where their indices are in the next round.
    """
    size = len(a)
    row, column = _places(size)
    half = size // 2
    top = jnp.where(column == 0, 0, jnp.where(column == 1, half, column - 1))
    bottom = jnp.where(column == size - 1, half - 1, column + 1)
    source = jnp.where(column < half, top, bottom)
    upper = row < half
    partner = jnp.where(upper, row + half, row - half)
    diagonal = _sum(jnp.where(row == column, a, 0.0), 0)
    mine = _upright(diagonal)
    other = _sum(jnp.where(column == partner, diagonal, 0.0), 1)
    # The same number for both of a pair, of which rounding makes two in ``a``.
    pairs = jnp.where((column == partner) & upper, a, 0.0)
    off = _sum(pairs, 1) + _upright(_sum(pairs, 0))
    # The smaller angle of the two. Where there is nothing to rotate, it is zero.
    twice = jnp.where(upper, other - mine, mine - other)
    length = jnp.abs(twice) + jnp.sqrt(twice * twice + 4 * off * off)
    t = jnp.where(twice < 0, -2.0, 2.0) * off / jnp.where(length > 0, length, 1.0)
    c = jax.lax.rsqrt(1 + t * t)
    s = jnp.where(upper, t * c, -t * c)
    turn = jnp.where(source == row, c, jnp.where(source == partner, s, 0.0))
    turned = _product(a, turn)
    turned = jnp.sum(turn[:, :, None] * turned[:, None, :], axis=0)
    return turned, _product(v, turn)


def _places(k: int) -> tuple[Array, Array]:
    size = small.next_power_of_two(k, _LEAST)
    shape = (size, size)
    return (
        jax.lax.broadcasted_iota(jnp.int32, shape, 0),
        jax.lax.broadcasted_iota(jnp.int32, shape, 1),
    )


def _sum(x: Array, axis: int) -> Array:
    return jnp.sum(x, axis=axis, keepdims=True)


def _product(a: Array, b: Array) -> Array:
    return jnp.sum(a[:, :, None] * b[None, :, :], axis=1)


def _upright(x: Array) -> Array:
    """A row (1, size) as a column."""
    row, column = _places(x.shape[-1])
    return _sum(jnp.where(row == column, x, 0.0), 1)


def _load(ref: Any, k: int) -> Array:
    """A matrix with zeros around it."""
    size = small.next_power_of_two(k, _LEAST)
    at, inside = _inside((size, size), k)
    zero = None if inside is None else jnp.zeros([], ref.dtype)
    return triton.load(ref.at[at], mask=inside, other=zero)


def _store(ref: Any, x: Array, k: int) -> None:
    at, inside = _inside(x.shape, k)
    triton.store(ref.at[at], x, mask=inside)


def _inside(tile: tuple[int, ...], k: int) -> tuple[tuple[Any, ...], Array | None]:
    """The slices of a tile, and which of its numbers are there; None for all."""
    if tile[-1] == k:
        return tuple(pl.ds(0, size) for size in tile), None
    origin = 0 * pl.program_id(0)  # see `gpu.Access`
    row, column = (jax.lax.broadcasted_iota(jnp.int32, tile, i) for i in (0, 1))
    return tuple(pl.ds(origin, size) for size in tile), (row < k) & (column < k)
