"""An optimizer's update, taken apart into groups of leaves that need no others."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.extend import core

from lowrank_optax._src.leaves.fields import Layout, Where
from lowrank_optax._src.leaves.paths import full_precision


class UpdateInGroups:
    """An update whose results are computed one group of leaves at a time.

    Leaves that meet in an equation, as in a norm of all, are one group. What needs no
    leaf, such as a count, is computed at once. Each group can be given its moments as
    late, and its results used as early, as the caller likes.

    Args:
      inner: the optimizer.
      layout: of its state.
      treedef: of the updates.
      updates: the leaves of the updates, some of them masked.
      state: moments that come later stand there by their shapes.
      params: a tree, or None.
      extra: its other arguments.

    Attributes:
      leaves: those of each group.
    """

    def __init__(
        self,
        inner: optax.GradientTransformationExtraArgs,
        layout: Layout,
        treedef: Any,
        updates: Sequence[Any],
        state: Any,
        params: Any,
        extra: Mapping[str, Any],
    ):
        if params is not None:
            leaves = treedef.flatten_up_to(params)
            params = [
                g if isinstance(g, optax.MaskedNode) else full_precision(p)
                for g, p in zip(updates, leaves, strict=True)
            ]
        self._args, structure = jax.tree.flatten((list(updates), state, params))

        def update(*flat):
            updates, state, params = structure.unflatten(flat)
            params = None if params is None else treedef.unflatten(params)
            updates, state = inner.update(
                treedef.unflatten(updates), state, params, **extra
            )
            return treedef.flatten_up_to(updates), state

        numbers = structure.unflatten(range(len(self._args)))
        self._place = layout.get(numbers[1])
        owners: list[int | None] = [None] * len(self._args)
        owned = [*enumerate(numbers[0]), *enumerate(numbers[2] or ())]
        owned += [(i, k) for (_, i), k in self._place.items()]
        for i, own in owned:
            for k in jax.tree.leaves(own):
                owners[k] = i
        closed, shapes = jax.make_jaxpr(update, return_shape=True)(*self._args)
        self._jaxpr, self._structure = closed.jaxpr, jax.tree.structure(shapes)
        self._known = dict(zip(self._jaxpr.constvars, closed.consts, strict=True))
        group = {i: i for i in sorted({i for i in owners if i is not None})}
        owner = dict(zip(self._jaxpr.invars, owners, strict=True))
        own: list[int | None] = []  # of each equation, the first of its leaves
        for eqn in self._jaxpr.eqns:
            read = (owner.get(x) for x in eqn.invars if isinstance(x, core.Var))
            met = {group[i] for i in read if i is not None}
            own.append(min(met) if met else None)
            if len(met) > 1:
                group |= {i: min(met) for i, g in group.items() if g in met}
            owner |= dict.fromkeys(eqn.outvars, own[-1])
        self._equations: dict[int | None, list[Any]] = {}
        for i, eqn in zip(own, self._jaxpr.eqns, strict=True):
            self._equations.setdefault(None if i is None else group[i], []).append(eqn)
        self.leaves: list[list[int]] = [
            [i for i in group if group[i] == g] for g in dict.fromkeys(group.values())
        ]
        self._owners = owners
        self._compute([None], None, {})

    def __call__(
        self, leaves: Sequence[int], moments: Mapping[Where, Any]
    ) -> tuple[list[Any], Any]:
        """Compute one group.

        Args:
          leaves: one of `leaves`.
          moments: those of them that were to come later.

        Returns:
          As `results`.
        """
        later = {self._place[w]: x for w, x in moments.items()}
        self._compute(leaves, leaves[0], later)
        return self.results()

    def results(self) -> tuple[list[Any], Any]:
        """Leaves of the updates, and the state; None for what is not known yet."""
        return self._structure.unflatten(map(self._read, self._jaxpr.outvars))

    def _read(self, x: Any) -> Any:
        return self._known.get(x) if isinstance(x, core.Var) else x.val

    def _compute(
        self, leaves: Sequence[Any], group: int | None, later: Mapping[int, Any]
    ) -> None:
        for k, (x, i) in enumerate(zip(self._args, self._owners, strict=True)):
            if i in leaves:
                self._known[self._jaxpr.invars[k]] = later.get(k, x)
        equations = self._equations.get(group, [])
        made = [x for eqn in equations for x in eqn.outvars]
        read = (x for eqn in equations for x in eqn.invars if isinstance(x, core.Var))
        given = [x for x in dict.fromkeys(read) if x in self._known]
        part = self._jaxpr.replace(
            constvars=[], invars=given, outvars=made, eqns=equations
        )
        part = core.jaxpr_as_fun(core.ClosedJaxpr(part, []))
        results = part(*(self._known[x] for x in given))
        self._known |= zip(made, results, strict=True)
