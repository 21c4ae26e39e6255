"""Implementation; the public names are in `lowrank_optax`."""
