"""Whole optimizers: a method, decoupled weight decay in full space, a learning rate."""

from collections.abc import Callable
from typing import Annotated, TypeVar

import optax
from jaxtyping import PyTree

# Which leaves decay: a tree of bools, or a function from the parameters to it.
Mask = PyTree[bool] | Callable[[optax.Params], PyTree[bool]] | None

T = TypeVar("T")
STATIC = "decides shapes"
# A number that `inject_hyperparams` must keep out of the state.
Static = Annotated[T, STATIC]


def optimizer(
    method: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    mask: Mask,
) -> optax.GradientTransformationExtraArgs:
    """A method, decoupled weight decay (``mask`` as in optax), and a learning rate."""
    decay = optax.add_decayed_weights(weight_decay, mask)
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        # Zero times the weights would be added: on GPU they are read once more for it.
        nothing = optax.identity().update
        decay = optax.GradientTransformation(decay.init, nothing)
    return optax.chain(
        method,
        decay,
        optax.scale_by_learning_rate(learning_rate),
    )
