"""Runnable examples: training language models with `lowrank_optax`."""
