"""Factorizations by a library, those of small square matrices by `small`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowrank_optax._src.linalg import meshes, small
from lowrank_optax._src.linalg.products import matmul
from lowrank_optax._src.linalg.tier import on_gpu


def one_by_one(function: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """A factorization of a stack of matrices; on CPU in a loop over them.

    On a mesh, each device takes its part of them.

    jaxlib gives a stack of any size to its threads and lets the caller, which is one of
    these itself, wait for them: as many such calls at a time as there are threads wait
    for one another for ever.
    """

    def in_a_loop(a):
        flat = a.reshape(-1, *a.shape[-2:])
        found = jax.lax.map(function, flat)
        return jax.tree.map(lambda x: x.reshape(*a.shape[:-2], *x.shape[1:]), found)

    def apply(a):
        return function(a) if a.ndim == 2 else meshes.shared_out(each, a)

    def each(a):
        return jax.lax.platform_dependent(a, cpu=in_a_loop, default=function)

    return apply


@one_by_one
def svd(a: Float[Array, "*b m n"]) -> tuple[Array, Array, Array]:
    """Thin singular value decompositions, values descending."""
    u, s, vt = jnp.linalg.svd(a, full_matrices=False)
    return u, s, vt


def eigh(a: Float[Array, "*b r r"]) -> tuple[Array, Array]:
    """Eigenvalues of symmetric matrices, descending, and their eigenvectors."""
    if a.shape[-1] > small.WIDEST:
        return _library_eigh(a)
    flat = a.reshape(-1, *a.shape[-2:])
    # LAPACK is at hand on CPU, and costs no compilation.
    values, vectors = on_gpu(_jacobi_kernel, _library_eigh, _jacobi_eigh, flat)
    return values.reshape(a.shape[:-1]), vectors.reshape(a.shape)


@jax.custom_jvp
def _descending_eigh(a: Array) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh(a)
    return jnp.flip(values, -1), jnp.flip(vectors, -1)


def eigh_derivative(find: Callable[[Array], tuple[Array, Array]]) -> Callable[..., Any]:
    """The derivative of an eigendecomposition, for `jax.custom_jvp`.

    As usual, but that vectors of equal values do not turn towards one another. A matrix
    of low rank has the value zero many times, where the usual one divides by the
    differences.
    """

    def derivative(primals, tangents):
        values, vectors = find(*primals)
        change = matmul(vectors.mT, matmul(tangents[0], vectors))
        change = (change + change.mT) / 2
        gap = values[..., None, :] - values[..., :, None]
        turn = jnp.where(gap != 0, change / jnp.where(gap != 0, gap, 1.0), 0.0)
        moved = jnp.diagonal(change, axis1=-2, axis2=-1), matmul(vectors, turn)
        return (values, vectors), moved

    return derivative


@jax.custom_jvp
def _jacobi_eigh(a: Array) -> tuple[Array, Array]:
    return small.jacobi_eigh(a)


_descending_eigh.defjvp(eigh_derivative(_descending_eigh))
_jacobi_eigh.defjvp(eigh_derivative(_jacobi_eigh))
_library_eigh = one_by_one(_descending_eigh)


def inverse_root(gram: Float[Array, "*b r r"]) -> Float[Array, "*b r r"]:
    """The inverse of the lower Cholesky factor."""
    if gram.shape[-1] > small.WIDEST:
        return _library_inverse_root(gram)
    flat = gram.reshape(-1, *gram.shape[-2:])
    upper = inverse_cholesky(flat, 0.0, lambda x: _library_inverse_root(x).mT)
    return upper.mT.reshape(gram.shape)


def inverse_cholesky(
    gram: Float[Array, "b k k"],
    least: float,
    cpu: Callable[[Array], Array] | None = None,
) -> Float[Array, "b k k"]:
    """`small.inverse_cholesky`, on each platform as it is fastest there.

    Args:
      gram, least: see there.
      cpu: on CPU; by default the same in a loop, which costs less to compile.
    """
    return on_gpu(
        functools.partial(_elimination_kernel, least=least),
        cpu or (lambda x: small.inverse_cholesky(x, least, unroll=False)),
        lambda x: small.inverse_cholesky(x, least),
        gram,
    )


def _elimination_kernel(gram: Array, interpret: bool, least: float) -> Array:
    from lowrank_optax._src.linalg import small_gpu  # where Pallas is wanted

    return small_gpu.inverse_cholesky(gram, least, interpret)


def _jacobi_kernel(a: Array, interpret: bool) -> tuple[Array, Array]:
    from lowrank_optax._src.linalg import small_gpu

    return small_gpu.jacobi_eigh(a, interpret)


@one_by_one
def _library_inverse_root(gram: Array) -> Array:
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    lower = jnp.linalg.cholesky(gram)
    return jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
