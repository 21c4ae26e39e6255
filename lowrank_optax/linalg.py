"""Randomized and Gram-based factorizations, usable on their own."""

from lowrank_optax._src.linalg import gram_eigh as gram_eigh
from lowrank_optax._src.linalg import orthonormalize as orthonormalize
from lowrank_optax._src.linalg import randomized_svd as randomized_svd
from lowrank_optax._src.linalg import range_basis as range_basis
from lowrank_optax._src.linalg import range_finder as range_finder
from lowrank_optax._src.linalg import subspace_iteration as subspace_iteration

__all__ = [
    "gram_eigh",
    "orthonormalize",
    "randomized_svd",
    "range_basis",
    "range_finder",
    "subspace_iteration",
]
