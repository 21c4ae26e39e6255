"""An optimizer called on some of its leaves at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import optax
from jax.extend import core

from lowrank_optax._src.leaves.fields import Layout, Where, by_field, by_leaf

Leaves = Mapping[int, Any]  # by the number of the parameter's leaf
Moments = Mapping[int, Mapping[str, Any]]  # by leaf, and by field


class ByLeaves:
    """An optimizer's update, one group of leaves at a time, all others masked.

    Leaves that meet in an equation, as in a norm of all, are one group. So the moments
    of a group can come as late, and its results be used as early, as the caller likes.

    Args:
      inner: the optimizer.
      layout: of its state.
      treedef: of the updates.
      state: the old state; moments may stand there by their shapes.
      updates: all leaves, or their shapes.
      params: all leaves, or their shapes; None if the optimizer is given none.
      extra: further arguments of the update.

    Attributes:
      groups: numbers of leaves that need one another.
    """

    def __init__(
        self,
        inner: optax.GradientTransformationExtraArgs,
        layout: Layout,
        treedef: jax.tree_util.PyTreeDef,
        state: optax.OptState,
        updates: Leaves,
        params: Leaves | None,
        extra: Mapping[str, Any],
    ):
        self._inner, self._layout, self._treedef = inner, layout, treedef
        self._extra, self._has_params = extra, params is not None
        self._old = layout.structure.flatten_up_to(state)
        self._new = list(self._old)
        self.groups, self._owners = _meeting(
            self._run, layout.where, updates, self._old, params or {}
        )
        if not self.groups:
            self.step({}, {}, {})

    def step(
        self, updates: Leaves, moments: Moments, params: Leaves
    ) -> tuple[dict[int, Any], dict[int, dict[str, Any]]]:
        """The directions and the new moments of one group.

        Args:
          updates: those of the group.
          moments: those of the group.
          params: those of the group; empty if the optimizer is given none.
        """
        where = self._layout.where
        own = by_field(moments)
        entries = [
            own.get(w, optax.MaskedNode()) if w else x
            for w, x in zip(where, self._old, strict=True)
        ]
        directions, new = self._run(updates, entries, params)
        # What no parameter owns, such as a norm of all, is made by the group that it
        # depends on; a count depends on none, and is the same from each.
        for k, (w, owner) in enumerate(zip(where, self._owners, strict=True)):
            if not w and (owner is None or owner in updates):
                self._new[k] = new[k]
        found = {w: x for w, x in zip(where, new, strict=True) if w in own}
        return {i: directions[i] for i in updates}, by_leaf(found, updates)

    def state(self, moments: Moments) -> optax.OptState:
        """The whole new state, with these moments in it."""
        state = self._layout.structure.unflatten(self._new)
        return self._layout.set(state, by_field(moments))

    def _run(self, updates: Leaves, entries: Sequence[Any], params: Leaves) -> Any:
        """The update of the leaves that are given: all directions, all entries."""

        def tree(leaves):
            number = range(self._treedef.num_leaves)
            masked = optax.MaskedNode()
            return self._treedef.unflatten([leaves.get(i, masked) for i in number])

        state = self._layout.structure.unflatten(entries)
        new_updates, new_state = self._inner.update(
            tree(updates),
            self._layout.hide(state, updates),
            tree(params) if self._has_params else None,
            **self._extra,
        )
        return (
            self._treedef.flatten_up_to(new_updates),
            self._layout.structure.flatten_up_to(
                self._layout.unhide(new_state, updates)
            ),
        )


def _meeting(
    run: Callable[..., Any],
    where: Sequence[Where | None],
    updates: Leaves,
    entries: Sequence[Any],
    params: Leaves,
) -> tuple[list[list[int]], list[int | None]]:
    """Which leaves meet in some equation, and on which leaf each entry depends.

    Read from the program of one update, which is traced for its shapes alone.
    """
    args, structure = jax.tree.flatten((updates, entries, params))
    numbers = structure.unflatten(range(len(args)))
    owned = [*numbers[0].items(), *numbers[2].items()]
    owned += [(w[1], x) for w, x in zip(where, numbers[1], strict=True) if w]
    owners: dict[int, int] = {k: i for i, x in owned for k in jax.tree.leaves(x)}
    closed, shapes = jax.make_jaxpr(
        lambda *args: run(*structure.unflatten(args)), return_shape=True
    )(*args)
    group = {i: i for i in sorted(set(owners.values()))}
    owner = {x: owners[k] for k, x in enumerate(closed.jaxpr.invars) if k in owners}
    for equation in closed.jaxpr.eqns:
        read = [owner[x] for x in _variables(equation.invars) if x in owner]
        met = {group[i] for i in read}
        group |= {i: min(met) for i, g in group.items() if g in met}
        owner |= dict.fromkeys(equation.outvars, min(met)) if met else {}
    made = jax.tree.unflatten(jax.tree.structure(shapes), closed.jaxpr.outvars)[1]
    depends = []
    for entry in made:
        leaves = [owner[x] for x in _variables(jax.tree.leaves(entry)) if x in owner]
        depends.append(min(leaves, default=None))
    together = [
        [i for i in group if group[i] == g] for g in sorted(set(group.values()))
    ]
    return together, depends


def _variables(atoms: Iterable[Any]) -> Iterator[core.Var]:
    return (x for x in atoms if isinstance(x, core.Var))
