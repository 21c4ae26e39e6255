"""Ranks that follow what is used, on the host between steps."""

from lowrank_optax._src.training.shrink import fit as fit
from lowrank_optax._src.training.shrink import shrink as shrink

__all__ = ["fit", "shrink"]
