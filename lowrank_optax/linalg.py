"""Randomized and Gram-based factorizations, usable on their own.

All work on the last two axes, whatever the batch axes before them.

>>> import jax, jax.numpy as jnp, lowrank_optax as lro
>>> key = jax.random.key(0)
>>> stack = jax.random.normal(key, (3, 16, 4)) @ jax.random.normal(key, (3, 4, 10))
>>> q = lro.linalg.range_finder(key, stack, size=6)  # 6 orthonormal columns
>>> bool(jnp.allclose(q @ (q.mT @ stack), stack, atol=1e-4))
True
>>> lro.linalg.subspace_iteration(key, stack, rank=2).shape  # leading singular vectors
(3, 16, 2)
>>> vectors, values = lro.linalg.gram_eigh(stack, rank=2)  # the same, not randomized
>>> vectors.shape, values.shape
((3, 16, 2), (3, 2))
>>> basis = lro.linalg.range_basis(stack)  # rank 4: nothing is invented
>>> bool(jnp.allclose(basis @ (basis.mT @ stack), stack, atol=1e-4))
True
"""

from lowrank_optax._src.linalg import gram_eigh as gram_eigh
from lowrank_optax._src.linalg import orthonormalize as orthonormalize
from lowrank_optax._src.linalg import range_basis as range_basis
from lowrank_optax._src.linalg.random import draw as draw
from lowrank_optax._src.linalg.randomized import randomized_svd as randomized_svd
from lowrank_optax._src.linalg.randomized import range_finder as range_finder
from lowrank_optax._src.linalg.randomized import (
    subspace_iteration as subspace_iteration,
)

__all__ = [
    "draw",
    "gram_eigh",
    "orthonormalize",
    "randomized_svd",
    "range_basis",
    "range_finder",
    "subspace_iteration",
]
