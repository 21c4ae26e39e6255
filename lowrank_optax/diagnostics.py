"""Measures of rank and of subspaces, each usable inside `jax.jit`.

`state_metrics` reports them over an optimizer's state.
"""

from lowrank_optax._src.report.diagnostics import captured_energy as captured_energy
from lowrank_optax._src.report.diagnostics import effective_rank as effective_rank
from lowrank_optax._src.report.diagnostics import (
    singular_value_ratio as singular_value_ratio,
)
from lowrank_optax._src.report.diagnostics import stable_rank as stable_rank
from lowrank_optax._src.report.diagnostics import state_metrics as state_metrics
from lowrank_optax._src.report.diagnostics import subspace_overlap as subspace_overlap

__all__ = [
    "captured_energy",
    "effective_rank",
    "singular_value_ratio",
    "stable_rank",
    "state_metrics",
    "subspace_overlap",
]
