"""Update passes as Pallas kernels for GPU and TPU: the choice of them."""

from lowrank_optax._src.kernels.dispatch import dispatch as dispatch

__all__ = ["dispatch"]
