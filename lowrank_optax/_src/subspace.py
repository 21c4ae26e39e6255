"""Which subspace a gradient is projected to."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from lowrank_optax._src import linalg

Method = Literal["svd", "gram_eigh", "rsvd", "subspace_iteration", "warm"]


@dataclasses.dataclass(frozen=True)
class TopSingular:
    """The leading left singular vectors of the gradient: GaLore's subspace.

    Args:
      method: how they are found.
        "svd": exactly, as the GaLore paper does; slow on accelerators.
        "gram_eigh": by the eigendecomposition of the smaller Gram matrix, exact up to
        half the digits, about six times cheaper.
        "rsvd": Gaussian sketch of rank + 8 columns with one power iteration, matmuls
        only: the default.
        "subspace_iteration": the same with two power iterations.
        "warm": one power iteration that starts from the old basis, with 8 Gaussian
        columns beside it.
    """

    method: Method = "rsvd"

    def __post_init__(self):
        if self.method not in get_args(Method):
            raise ValueError(
                f"Unknown method {self.method!r} of TopSingular: it must be one of "
                f"{', '.join(get_args(Method))}."
            )

    def select(self, key, grad, old, step):
        rank = old.shape[-1]
        if self.method == "svd":
            return jnp.linalg.svd(grad, full_matrices=False)[0][..., :rank]
        if self.method == "gram_eigh":
            return linalg.gram_eigh(grad, rank)[0]
        if self.method == "warm":
            # At the start there is no old basis: a zero column would waste its place.
            started = jnp.any(old != 0, axis=(-2, -1), keepdims=True)
            random = jax.random.normal(key, old.shape, old.dtype)
            start = jnp.where(started, old, random)
            return linalg.subspace_iteration(key, grad, rank, iters=1, start=start)
        iters = 1 if self.method == "rsvd" else 2
        return linalg.subspace_iteration(key, grad, rank, iters)
