"""Factorizations of small matrices by the backend's library."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def one_by_one(function: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """A factorization of a stack of matrices; on CPU in a loop over them.

    jaxlib gives a stack of any size to its threads and lets the caller, which is one of
    these itself, wait for them: as many such calls at a time as there are threads wait
    for one another for ever.
    """

    def in_a_loop(a):
        flat = a.reshape(-1, *a.shape[-2:])
        found = jax.lax.map(function, flat)
        return jax.tree.map(lambda x: x.reshape(*a.shape[:-2], *x.shape[1:]), found)

    def apply(a):
        if a.ndim == 2:
            return function(a)
        return jax.lax.platform_dependent(a, cpu=in_a_loop, default=function)

    return apply


@one_by_one
def svd(a: Float[Array, "*b m n"]) -> tuple[Array, Array, Array]:
    """Thin singular value decompositions, values descending."""
    u, s, vt = jnp.linalg.svd(a, full_matrices=False)
    return u, s, vt


@one_by_one
def eigh(a: Float[Array, "*b r r"]) -> tuple[Array, Array]:
    """Eigenvalues of symmetric matrices, ascending, and their eigenvectors."""
    values, vectors = jnp.linalg.eigh(a)
    return values, vectors


@one_by_one
def inverse_root(gram: Array) -> Array:
    """The inverse of the lower Cholesky factor."""
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    lower = jnp.linalg.cholesky(gram)
    return jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
