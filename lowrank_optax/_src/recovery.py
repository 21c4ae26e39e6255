"""What is done with what the projection leaves out."""

import dataclasses

import optax

from lowrank_optax._src.linalg import matmul


@dataclasses.dataclass(frozen=True)
class Drop:
    """Nothing: the update is ``scale * P N``, as in GaLore."""

    def init(self, view):
        return optax.MaskedNode()

    def prepare(self, grad, state):
        return grad

    def recover(self, grad, coeff, direction, basis, scale, state):
        return scale * matmul(basis, direction), state
