"""Whole optimizers: a method, decoupled weight decay in full space, a learning rate."""

from collections.abc import Callable
from typing import Any

import jax
import optax

LearningRate = float | jax.Array | Callable[[Any], Any]


def optimizer(
    method: optax.GradientTransformation,
    learning_rate: LearningRate,
    weight_decay: Any,
    mask: Any,
) -> optax.GradientTransformationExtraArgs:
    """A method, decoupled weight decay (``mask`` as in optax), and a learning rate."""
    decay = optax.add_decayed_weights(weight_decay, mask)
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        # Zero times the weights would be added: on GPU they are read once more for it.
        decay = optax.GradientTransformation(decay.init, lambda u, s, _=None: (u, s))
    return optax.chain(
        method,
        decay,
        optax.scale_by_learning_rate(learning_rate),
    )
