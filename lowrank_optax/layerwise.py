"""Training steps that update each layer inside of the backward pass."""

from lowrank_optax._src.training.layerwise import LayerwiseStep as LayerwiseStep
from lowrank_optax._src.training.layerwise import value_and_update as value_and_update

__all__ = ["LayerwiseStep", "value_and_update"]
