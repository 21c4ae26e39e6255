"""The one-matrix engine: a whole update rule on each matrix leaf."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._src.engines.accept import (
    accept_finite,
    accept_leaf,
    accept_together,
    increment,
)
from lowrank_optax._src.engines.compress import CompressState
from lowrank_optax._src.engines.order import Order
from lowrank_optax._src.leaves import matrix
from lowrank_optax._src.leaves.choose import view_leaves
from lowrank_optax._src.leaves.fields import StateFields, by_field, by_leaf, field_name
from lowrank_optax._src.leaves.keys import leaf_seed, matrix_keys_each
from lowrank_optax._src.leaves.matrix import MatrixView, nameless
from lowrank_optax._src.leaves.paths import flatten, full_precision
from lowrank_optax._src.leaves.transformation import transformation
from lowrank_optax._src.parts.laws import Rule, StagedRule
from lowrank_optax._src.parts.part import compiled


def leafwise(
    rule: Rule | StagedRule,
    *,
    dense: optax.GradientTransformation,
    side: matrix.Side = "short",
    matrices: matrix.Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Apply a rule to each matrix leaf, and another optimizer to all other leaves.

    For algorithms that are neither "an optimizer in a subspace" nor "an optimizer with
    compressed state": the rule sees one gradient ``(*batch, m, n)``, the leaf's own
    state and the step, and returns the update. A field of the rule's state that the
    dense optimizer has too (``mu``, ``nu``) is kept in the dense optimizer's state, so
    that each such field is one tree over all parameters.

    Args:
      rule: see `Rule`.
      dense: for the leaves that are not matrices.
      side: which side of a matrix comes first, see `project_gradients`; "short_left"
        is "short" with square matrices left as they are.
      matrices: which leaves are matrices, see `default_matrices`.
      key: a seed or a key for randomized rules.

    Returns:
      A transformation from full-shape updates to full-shape updates.

    >>> import typing, jax.numpy as jnp, optax, lowrank_optax as lro
    >>> class SignState(typing.NamedTuple):
    ...     trace: typing.Any
    >>> class RowSign:
    ...     def init(self, view):
    ...         return SignState(view.zeros("m", 1))
    ...     def update(self, key, step, grad, state):
    ...         mean = 0.9 * state.trace + 0.1 * grad.mean(-1, keepdims=True)
    ...         return jnp.sign(mean) * jnp.ones_like(grad), SignState(mean)
    >>> tx = lro.leafwise(RowSign(), dense=optax.trace(0.9))
    >>> state = tx.init({"w": jnp.ones((4, 6)), "b": jnp.ones(3)})
    >>> state.inner_state.trace["w"].shape, state.inner_state.trace["b"].shape
    ((4, 1), (3,))
    """
    dense = optax.with_extra_args_support(dense)
    fields = StateFields(dense, whole=True)  # masked as a whole at matrices
    engine = _Leafwise(rule, dense, fields, side, matrices, key)
    return transformation(engine.init, engine.update)


@dataclasses.dataclass(frozen=True)
class _Leafwise:
    """The arguments of `leafwise`, and what is done with them."""

    rule: Rule | StagedRule
    dense: optax.GradientTransformationExtraArgs
    fields: StateFields
    side: matrix.Side
    matrices: matrix.Matrices
    key: int | jax.Array

    @functools.cached_property
    def kind(self) -> Any:
        """The class of the rule's state."""
        view = MatrixView("", (8, 8), jnp.float32, (0,), (1,), ())
        return type(jax.eval_shape(lambda: self.rule.init(view)))

    @functools.cached_property
    def shared(self) -> dict[str, str]:
        """Where the dense optimizer keeps a field, of those that both have."""
        one = jax.ShapeDtypeStruct((8, 8), jnp.float32)
        names = {field_name(name): name for name in self.fields.layout(one).names}
        return {f: names[f] for f in self.kind._fields if f in names}

    def _views(self, tree, creating=False):
        sizes = getattr(self.rule, "state_sizes", None)
        return view_leaves(tree, self.matrices, self.side, creating, sizes)

    def init(self, params):
        views = self._views(params, creating=True)
        _, leaves, treedef = flatten(params)
        found = enumerate(views)
        states = {i: self.rule.init(v) for i, v in found if isinstance(v, MatrixView)}
        inner_state = self.dense.init(treedef.unflatten(_masked(leaves, states)))
        layout = self.fields.layout(params)
        step = jnp.zeros([], jnp.int32)
        return self._store(step, layout, inner_state, treedef, states)

    def _store(self, step, layout, inner_state, treedef, states) -> CompressState:
        """The whole state: the rule's fields in their places."""
        placed = {
            (name, i): getattr(state, f)
            for i, state in states.items()
            for f, name in self.shared.items()
        }
        own = {}
        for f in self.kind._fields:
            if f not in self.shared:
                masks = [optax.MaskedNode()] * treedef.num_leaves
                for i, state in states.items():
                    masks[i] = getattr(state, f)
                own[f] = treedef.unflatten(masks)
        return CompressState(step, layout.set(inner_state, placed), own)

    def _load(self, state, layout, treedef, numbers) -> dict[int, Any]:
        """The rule's state of each matrix."""
        moments = layout.get(state.inner_state)
        own = {f: treedef.flatten_up_to(x) for f, x in state.own.items()}

        def load(i, f):
            return own[f][i] if f in own else moments[self.shared[f], i]

        fields = self.kind._fields
        return {i: self.kind(*(load(i, f) for f in fields)) for i in numbers}

    def update(self, updates, state, params=None, **extra):
        treedef = jax.tree.structure(updates)
        seen = enumerate(self._views(updates))
        views = {i: v for i, v in seen if isinstance(v, MatrixView)}
        grads, layout = treedef.flatten_up_to(updates), self.fields.layout(updates)
        old = self._load(state, layout, treedef, views)
        paths = flatten(updates)[0]
        seeds = {i: leaf_seed(self.key, paths[i]) for i in views}
        at_matrix, new = self._rule(views, grads, seeds, state.step, old)

        moments = layout.get(state.inner_state)
        masks = {w: optax.MaskedNode() for w in moments if w[1] in views}
        if params is not None:
            leaves = treedef.flatten_up_to(params)
            params = treedef.unflatten(_masked(leaves, views))
        at_dense, inner_state = self.dense.update(
            treedef.unflatten(_masked(grads, views)),
            layout.set(state.inner_state, masks),
            params,
            **extra,
        )
        out = [
            at_matrix[i] if i in views else d.astype(grads[i].dtype)
            for i, d in enumerate(treedef.flatten_up_to(at_dense))
        ]
        found = by_leaf(layout.get(inner_state), range(len(grads)))
        given = by_leaf(moments, range(len(grads)))
        kept = {
            i: accept_leaf(x, given[i], out[i])
            for i, x in found.items()
            if i not in views and x
        }
        inner_state = layout.set(inner_state, by_field(kept))
        step = increment(state.step)
        new_state = self._store(step, layout, inner_state, treedef, new)
        return treedef.unflatten(out), new_state

    def _rule(self, views, grads, seeds, step, old) -> tuple[dict[int, Any], Any]:
        """The rule at each matrix: the updates, and the states that are accepted."""
        batches = [v.batch_shape for v in views.values()]
        drawn = matrix_keys_each([seeds[i] for i in views], step, batches)
        keys = dict(zip(views, drawn, strict=True))
        if hasattr(self.rule, "begin"):
            old = _begun(self.rule, views, grads, old)
        if isinstance(self.rule, StagedRule):
            return self._staged(self.rule, views, grads, step, old, keys)
        order, out, new = Order(), {}, {}
        for i, v in views.items():
            with jax.named_scope(v.path):
                parts, state = (self.rule, nameless(v)), order.start(old[i])
                out[i], new[i] = _whole(parts, keys[i], step, grads[i], state)
            order.end((out[i], new[i]))
        return out, new

    def _staged(self, rule: StagedRule, views, grads, step, old, keys) -> Any:
        """Thin and wide stages in turn; an order among the wide ones."""
        order, out = Order(), {}
        states = list(old.values())
        seen, given = rule.start(list(keys.values()), states, step)
        each = zip(views, given, strict=True)
        dense = [rule.dense(grads[i], own) for i, own in each]
        for k, (_, finish) in enumerate(rule.stages):
            found = {}
            each = zip(views.items(), seen, dense, given, strict=True)
            for (i, v), state, is_dense, own in each:
                with jax.named_scope(v.path):
                    parts, state = (rule, k, nameless(v)), order.start(state, is_dense)
                    direction, found[i] = _wide(parts, step, grads[i], state, own)
                if direction is not None:
                    out[i] = direction
                order.end(found[i])
            given = finish(list(found.values()), states, step) if found else []
        return out, dict(zip(views, given, strict=True))


def _begun(rule, views, grads, states) -> dict[int, Any]:
    """The states, of which those that are still unset have begun."""
    unset = {i: rule.unset(x) for i, x in states.items()}
    if not unset:
        return states

    def begin():
        return {
            i: _begin((rule, nameless(v)), unset[i], grads[i], states[i])
            for i, v in views.items()
        }

    def keep():
        # Only what changes: all that passes through a conditional may be copied.
        return {i: _fields(states[i], x) for i, x in jax.eval_shape(begin).items()}

    with jax.named_scope("refresh"):
        any_unset = functools.reduce(jnp.logical_or, unset.values())
        begun = jax.lax.cond(any_unset, begin, keep)
    return {i: states[i]._replace(**x) for i, x in begun.items()}


def _fields(state: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(state, name) for name in names}


@compiled
def _begin(parts, unset, grad, state):
    rule, view = parts

    def begin():
        new = rule.begin(view.matrix(grad), state)
        return accept_finite(new, _fields(state, new))

    names = jax.eval_shape(begin)
    return jax.lax.cond(unset, begin, lambda: _fields(state, names))


@compiled
def _wide(parts, step, grad, state, given):
    rule, k, view = parts
    wide, _ = rule.stages[k]
    direction, found = wide(step, view.lying(grad), state, given)
    if direction is not None:  # which one of the stages makes
        direction = view.leaf(direction.matrix)
    return direction, found


@compiled
def _whole(parts, key, step, grad, state):
    rule, view = parts
    direction, new = rule.update(key, step, view.matrix(grad), state)
    direction = view.leaf(direction)
    return direction, accept_together(new, state, direction)


def _masked(leaves: Sequence[Any], at_matrix: Mapping[int, Any]) -> list[Any]:
    return [
        optax.MaskedNode() if i in at_matrix else full_precision(x)
        for i, x in enumerate(leaves)
    ]
