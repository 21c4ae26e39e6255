"""How far a step can go whatever the gradients were."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def most_of_adam(b1: ArrayLike, b2: ArrayLike) -> jax.Array:
    """The largest ``|m| / sqrt(v)`` that Adam's moments of any gradients have.

    ``(1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2))``, by Cauchy-Schwarz: 7.3 with 0.9 and
    0.999. Infinity where ``b1^2 >= b2``, which has no such bound. Moments that were
    stored with a loss may exceed it, after an outlier by orders of magnitude.
    """
    b1, b2 = jnp.asarray(b1, jnp.float32), jnp.asarray(b2, jnp.float32)
    square = (1 - b2) * (1 - b1**2 / b2)
    some = jnp.where(square > 0, square, 1.0)
    return jnp.where(square > 0, (1 - b1) / jnp.sqrt(some), jnp.inf)
