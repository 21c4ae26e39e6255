"""How far a step can go whatever the gradients were."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

T = TypeVar("T")


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


def most_of_square(
    mean: jax.Array, size: int, b2: ArrayLike, step: ArrayLike
) -> jax.Array:
    """What a step may add to an entry of a second moment that is stored at low rank.

    A flat matrix of this mean has ``sqrt(size) mean`` for its one singular value. The
    factors would lose it beside those of some entries that are larger, and with it what
    divides the updates of all others. So an entry may add a tenth of that, by a moment
    of a hundred gradients at least: no ordinary gradient comes near.

    Args:
      mean: of the moment before the step, not corrected.
      size: entries of the matrix.
      b2: decay of the moment.
      step: steps before this one.

    Returns:
      The most, of the shape of ``mean``; infinity where that is not positive.
    """
    # In the moments' type: of whole numbers, powers may be wider.
    seen = 1 - b2 ** jnp.maximum(step, 1).astype(mean.dtype)
    longer = jnp.maximum(100 * (1 - b2) / seen, 1.0)
    return jnp.where(mean > 0, 0.1 * size**0.5 * mean * longer, jnp.inf)


def scale_down(square: jax.Array, most: jax.Array) -> jax.Array:
    """By what to multiply a matrix whose ``square`` may not exceed ``most``."""
    above = square > most
    # The root only of what is not infinite, where it has no derivative.
    ratio = jnp.where(above, most, 1.0) / jnp.where(above, square, 1.0)
    return jnp.sqrt(ratio)


def cut_off(updates: T, b1: ArrayLike, b2: ArrayLike) -> T:
    """Updates of which no entry exceeds `most_of_adam`, by moments that have a loss.

    Moments of complex leaves are not compressed: such updates keep to it by themselves.
    """
    most = most_of_adam(b1, b2)

    def cut(u):
        return u if jnp.iscomplexobj(u) else jnp.clip(u, -most, most)

    return jax.tree.map(cut, updates)


def bounded(
    adam: optax.GradientTransformation, b1: ArrayLike, b2: ArrayLike
) -> optax.GradientTransformation:
    """Adam with these decays, its updates `cut_off`."""

    def update(*args, **extra):
        updates, state = adam.update(*args, **extra)
        return cut_off(updates, b1, b2), state

    return adam._replace(update=update)
