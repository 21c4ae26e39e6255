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
    return optax.chain(
        method,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
