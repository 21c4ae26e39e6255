"""An optimizer's update, one group of leaves at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import optax
from jax.extend import core

from lowrank_optax._src.engines.decay import adds_weights
from lowrank_optax._src.leaves.fields import Layout, by_field, by_leaf

Leaves = Mapping[int, Any]  # by the number of the parameter's leaf
Moments = Mapping[int, Mapping[str, Any]]  # by leaf, and by field
Numbers = frozenset[int]


class ByLeaves:
    """An optimizer's update, whose leaves come and go one group after the other.

    The optimizer is traced once, on the whole tree, as it may ask how many leaves there
    are. Leaves that meet in an equation of its program, as in a norm of all, are one
    group. What needs no leaf, such as a count, is computed at once; the equations of a
    group only when its turn comes, so that its moments can come as late, and its
    results be used as early, as the caller likes.

    Args:
      inner: the optimizer.
      layout: of its state.
      treedef: of the updates.
      state: the old state; moments may stand there by their shapes.
      updates: all leaves that it sees, or their shapes.
      params: the same of the parameters; None if the optimizer is given none.
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
        def update(updates, entries, params):
            def tree(leaves):
                masked = optax.MaskedNode()
                number = range(treedef.num_leaves)
                return treedef.unflatten([leaves.get(i, masked) for i in number])

            state = layout.structure.unflatten(entries)
            params = None if params is None else tree(params)
            updates, state = inner.update(tree(updates), state, params, **extra)
            state = layout.structure.flatten_up_to(state)
            return treedef.flatten_up_to(updates), state

        self._layout = layout
        given = updates, layout.structure.flatten_up_to(state), params
        args, structure = jax.tree.flatten(given)
        closed, shapes = jax.make_jaxpr(
            lambda *args: update(*structure.unflatten(args)), return_shape=True
        )(*args)
        owners = self._owners(structure.unflatten(range(len(args))))
        closed = _open(closed, [owners.get(k, frozenset()) for k in range(len(args))])
        self._jaxpr = closed.jaxpr
        self._inputs = structure.unflatten(closed.jaxpr.invars)
        made = jax.tree.unflatten(jax.tree.structure(shapes), closed.jaxpr.outvars)
        self._results = jax.tree.structure(shapes)
        self._directions, self._entries = made
        self._group = self._meet()
        first = sorted(set(self._group.values()))
        self.groups = [[i for i, g in self._group.items() if g == f] for f in first]
        self._known: dict[core.Var, Any] = dict(
            zip(closed.jaxpr.constvars, closed.consts, strict=True)
        )
        for w, x, var in zip(layout.where, given[1], self._inputs[1], strict=True):
            if not w:
                self._know(var, x)
        self._compute(None)

    def _owners(self, inputs: Any) -> dict[Any, frozenset[int]]:
        """To which leaf each of the inputs belongs, if to any."""
        updates, entries, params = inputs
        owned = [*updates.items(), *(params or {}).items()]
        owned += [
            (w[1], x) for w, x in zip(self._layout.where, entries, strict=True) if w
        ]
        return {k: frozenset([i]) for i, x in owned for k in jax.tree.leaves(x)}

    def _meet(self) -> dict[int, int]:
        """The first leaf of each leaf's group; and the equations of each group."""
        owner = {x: min(i) for x, i in self._owners(self._inputs).items()}
        group = {i: i for i in sorted(set(owner.values()))}
        owners: list[int | None] = []
        for equation in self._jaxpr.eqns:
            read = [owner[x] for x in _variables(equation.invars) if x in owner]
            met = {group[i] for i in read}
            owners.append(min(met, default=None))
            group |= {i: min(met) for i, g in group.items() if g in met}
            owner |= dict.fromkeys(equation.outvars, min(met)) if met else {}
        self._equations: dict[int | None, list[Any]] = {}
        for i, equation in zip(owners, self._jaxpr.eqns, strict=True):
            key = None if i is None else group[i]
            self._equations.setdefault(key, []).append(equation)
        return group

    def adding_weights(self) -> list[int]:
        """The leaves to whose directions their weights are added, as by decay."""
        updates, entries, weights = self._inputs
        owned = [x for w, x in zip(self._layout.where, entries, strict=True) if w]
        found = adds_weights(
            self._jaxpr, jax.tree.leaves((updates, owned)), jax.tree.leaves(weights)
        )
        directions, _ = jax.tree.unflatten(self._results, found)
        return [i for i in updates if directions[i]]

    def step(
        self, updates: Leaves, moments: Moments, params: Leaves
    ) -> tuple[dict[int, Any], dict[int, dict[str, Any]]]:
        """The directions and the new moments of one group.

        Args:
          updates: those of the group.
          moments: those of the group.
          params: those of the group; empty if the optimizer is given none.
        """
        own = by_field(moments)
        for given, variables in ((updates, 0), (params, 2)):
            for i, x in given.items():
                self._know(self._inputs[variables][i], x)
        where = self._layout.where
        for w, var in zip(where, self._inputs[1], strict=True):
            if w in own:
                self._know(var, own[w])
        self._compute(self._group[min(updates)])
        entries = zip(where, self._entries, strict=True)
        found = {w: self._value(x) for w, x in entries if w in own}
        directions = {i: self._value(self._directions[i]) for i in updates}
        return directions, by_leaf(found, updates)

    def state(self, moments: Moments) -> optax.OptState:
        """The whole new state, with these moments in it."""
        entries = [
            None if w else self._value(x)
            for w, x in zip(self._layout.where, self._entries, strict=True)
        ]
        state = self._layout.structure.unflatten(entries)
        return self._layout.set(state, by_field(moments))

    def _know(self, variables: Any, values: Any) -> None:
        pairs = zip(jax.tree.leaves(variables), jax.tree.leaves(values), strict=True)
        self._known |= pairs

    def _value(self, made: Any) -> Any:
        """The values of some of the program's results."""
        return jax.tree.map(
            lambda x: self._known[x] if isinstance(x, core.Var) else x.val, made
        )

    def _compute(self, group: int | None) -> None:
        """The equations of one group, or those that need no leaf."""
        equations = self._equations.get(group, [])
        made = [x for equation in equations for x in equation.outvars]
        read = (x for equation in equations for x in _variables(equation.invars))
        given = [x for x in dict.fromkeys(read) if x in self._known]
        part = _part(self._jaxpr, given, made, equations)
        results = part(*(self._known[x] for x in given))
        self._known |= zip(made, results, strict=True)


def _part(jaxpr, given, made, equations) -> Callable[..., list[Any]]:
    """Some equations of a program as a function."""
    names = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    part = jaxpr.replace(
        constvars=[], invars=given, outvars=made, eqns=equations, debug_info=names
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(part, []))


def _open(closed: core.ClosedJaxpr, owners: list[Numbers]) -> core.ClosedJaxpr:
    """The program with the compiled functions in it written out that join leaves.

    Optax compiles some functions of whole trees, which newer releases of JAX keep apart
    in a program. Their leaves do not meet for that.
    """

    whose = dict(zip(closed.jaxpr.invars, owners, strict=True))
    joining = False
    for equation in closed.jaxpr.eqns:
        sets = [whose.get(x, frozenset()) for x in _variables(equation.invars)]
        joined = frozenset().union(*sets)
        joining |= len(joined) > 1 and _function(equation) is not None
        whose |= dict.fromkeys(equation.outvars, joined)
    if not joining:
        return closed

    def run(*args):
        return _evaluate(closed.jaxpr, closed.consts, args, owners)[0]

    return jax.make_jaxpr(run)(*closed.in_avals)


def _function(equation: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """The program of a compiled function that is called."""
    called = equation.primitive.name in ("jit", "pjit")
    return equation.params["jaxpr"] if called else None


def _evaluate(jaxpr, consts, args, owners) -> tuple[list[Any], list[Numbers]]:
    """The results of a program, and the leaves that each depends on."""
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= zip(jaxpr.invars, args, strict=True)
    whose = dict(zip(jaxpr.invars, owners, strict=True))

    def read(x):
        if isinstance(x, core.Var):
            return known[x], whose.get(x, frozenset())
        return x.val, frozenset()

    for equation in jaxpr.eqns:
        pairs = [read(x) for x in equation.invars]
        values, sets = [v for v, _ in pairs], [i for _, i in pairs]
        joined = frozenset().union(*sets)
        inner = _function(equation)
        if inner is not None and len(joined) > 1:
            results, of = _evaluate(inner.jaxpr, inner.consts, values, sets)
        else:
            given = dict.fromkeys(_variables(equation.invars))
            part = _part(jaxpr, list(given), equation.outvars, [equation])
            results = part(*(known[x] for x in given))
            of = [joined] * len(results)
        known |= zip(equation.outvars, results, strict=True)
        whose |= zip(equation.outvars, of, strict=True)
    pairs = [read(x) for x in jaxpr.outvars]
    return [v for v, _ in pairs], [i for _, i in pairs]


def _variables(atoms: Iterable[Any]) -> Iterator[core.Var]:
    return (x for x in atoms if isinstance(x, core.Var))
