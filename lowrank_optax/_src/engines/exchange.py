"""What devices exchange of the gradients of their parts of a batch."""

import jax

from lowrank_optax._src.leaves.context import averaging


def mean(x: jax.Array) -> jax.Array:
    """The mean over the devices of `average_gradients`; without it, ``x``."""
    axes = averaging()
    return jax.lax.pmean(x, axes) if axes else x
