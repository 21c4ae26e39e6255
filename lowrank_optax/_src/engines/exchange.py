"""What devices exchange of the gradients of their parts of a batch."""

import jax
import jax.numpy as jnp

from lowrank_optax._src.leaves.context import averaging
from lowrank_optax._src.linalg.products import norms


def mean(x: jax.Array) -> jax.Array:
    """The mean over the devices of `average_gradients`; without it, ``x``."""
    axes = averaging()
    return jax.lax.pmean(x, axes) if axes else x


def projected(coeff: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A device's ``P^T G`` as the mean over all, and its norms."""
    return mean(coeff), root_mean_square(norms(coeff))


def root_mean_square(x: jax.Array) -> jax.Array:
    """That of a norm over the devices; without `average_gradients`, ``x``."""
    return jnp.sqrt(mean(x * x)) if averaging() else x
