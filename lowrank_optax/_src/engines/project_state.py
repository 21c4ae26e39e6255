"""The state of `project_gradients`, and the leaves of one of its updates."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from lowrank_optax._src.engines import exchange
from lowrank_optax._src.engines.one_matrix import Matrix, Moments, Own
from lowrank_optax._src.leaves.fields import Layout
from lowrank_optax._src.linalg.products import norms


class ProjectState(NamedTuple):
    """State of `project_gradients`; trees mirror the parameters'.

    Attributes:
      step: updates made so far, int32.
      basis: ``(*batch, m, r)`` at matrices, ``MaskedNode()`` elsewhere; set at a
        refresh. Of a subspace that is not stored, the step at which it was drawn,
        int32.
      refresh: state of the refresh rule at matrices.
      recovery: state of the recovery at matrices.
      inner_state: of the inner optimizer, on ``(*batch, r, n)`` at matrices and on the
        parameter's own shape elsewhere.
    """

    step: jax.Array
    basis: Any
    refresh: Any
    recovery: Any
    inner_state: Any


@dataclasses.dataclass
class Leaves:
    """The leaves of one update, in the order of their tree.

    Attributes:
      treedef: of the updates.
      layout: of the inner optimizer's state.
      grads: as they lie in memory.
      low: what the inner optimizer sees, by its shape alone at matrices.
      matrices: by the number of the leaf.
      moments: the inner optimizer's, by the number of the leaf and the field.
    """

    treedef: jax.tree_util.PyTreeDef
    layout: Layout
    grads: list[jax.Array]
    low: list[Any]
    matrices: dict[int, Matrix]
    moments: dict[int, Moments]

    def seen(
        self,
        group: Sequence[int],
        at: Mapping[int, Matrix],
        summed: Sequence[jax.Array] | None = None,
    ) -> tuple[dict[int, jax.Array], dict[int, jax.Array]]:
        """What the inner optimizer sees of leaves, and its norms at matrices.

        Args:
          group: the leaves.
          at: those that are matrices.
          summed: what it sees instead; None for these gradients.
        """
        if summed is not None:
            return {i: summed[i] for i in group}, {i: norms(summed[i]) for i in at}
        own = {i: x.down() for i, x in at.items()}
        seen = {i: exchange.mean(own[i]) if i in at else self.low[i] for i in group}
        return seen, {i: exchange.mean(norms(x)) for i, x in own.items()}

    def store(
        self, state: ProjectState, own: Mapping[int, Own], inner_state: Any
    ) -> ProjectState:
        trees = (state.basis, state.refresh, state.recovery)
        columns = [self.treedef.flatten_up_to(x) for x in trees]
        for i, kept in own.items():
            for column, x in zip(columns, kept, strict=True):
                column[i] = x
        basis, refresh, recovery = map(self.treedef.unflatten, columns)
        return ProjectState(state.step, basis, refresh, recovery, inner_state)
