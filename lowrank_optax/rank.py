"""Ranks that follow what is used, on the host between steps."""

from lowrank_optax._src.rank import shrink as shrink

__all__ = ["shrink"]
