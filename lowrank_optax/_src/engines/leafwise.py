"""The one-matrix engine: a whole update rule on each matrix leaf."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._src.engines import batching
from lowrank_optax._src.engines.accept import accept_finite, increment
from lowrank_optax._src.engines.compress import CompressState
from lowrank_optax._src.leaves import matrix
from lowrank_optax._src.leaves.box import transformation
from lowrank_optax._src.leaves.choose import view_leaves
from lowrank_optax._src.leaves.fields import StateFields, field_name
from lowrank_optax._src.leaves.keys import leaf_keys
from lowrank_optax._src.leaves.matrix import MatrixView
from lowrank_optax._src.leaves.paths import flatten, full_precision
from lowrank_optax._src.linalg import random
from lowrank_optax._src.parts.laws import Rule
from lowrank_optax._src.parts.part import compiled


def leafwise(
    rule: Rule,
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
    fields = StateFields(dense)
    # What the rule's fields are, and which of them the dense optimizer has too.
    one = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    view = MatrixView("", one.shape, one.dtype, (0,), (1,), ())
    kind: Any = type(jax.eval_shape(lambda: rule.init(view)))
    shared = {field_name(name): name for name in fields.layout(one).names}
    own_fields = [f for f in kind._fields if f not in shared]

    def masked(leaves, at_matrix):
        return [
            optax.MaskedNode() if i in at_matrix else full_precision(x)
            for i, x in enumerate(leaves)
        ]

    def store(step, layout, inner_state, treedef, states):
        """The whole state: the rule's fields in their places."""
        placed = {
            (shared[f], i): getattr(state, f)
            for i, state in states.items()
            for f in kind._fields
            if f in shared
        }
        masks = [optax.MaskedNode()] * treedef.num_leaves
        own = {
            f: treedef.unflatten(
                [
                    getattr(states[i], f) if i in states else x
                    for i, x in enumerate(masks)
                ]
            )
            for f in own_fields
        }
        return CompressState(step, layout.set(inner_state, placed), own)

    def init(params):
        views = view_leaves(params, matrices, side, creating=True)
        _, leaves, treedef = flatten(params)
        states = {
            i: rule.init(v) for i, v in enumerate(views) if isinstance(v, MatrixView)
        }
        inner_state = dense.init(treedef.unflatten(masked(leaves, states)))
        layout = fields.layout(params)
        return store(jnp.zeros([], jnp.int32), layout, inner_state, treedef, states)

    def update(updates, state, params=None, **extra):
        treedef = jax.tree.structure(updates)
        views = view_leaves(updates, matrices, side)
        at_matrix = {i: v for i, v in enumerate(views) if isinstance(v, MatrixView)}
        grads = treedef.flatten_up_to(updates)
        layout = fields.layout(updates)
        moments = layout.get(state.inner_state)
        own = {f: treedef.flatten_up_to(x) for f, x in state.own.items()}

        def load(i):
            return kind(
                *(
                    own[f][i] if f in own else moments[shared[f], i]
                    for f in kind._fields
                )
            )

        old = {i: load(i) for i in at_matrix}
        keys = leaf_keys(key, [v.path for v in views], state.step)
        steps = []
        for i, view in at_matrix.items():
            here, dtype = rule, None
            if hasattr(rule, "at"):
                here, dtype = rule.at(view), grads[i].dtype
            grad = view.matrix(grads[i], dtype)
            own_keys = random.matrix_keys(keys[i], view.batch_shape)
            steps.append(_steps(here, own_keys, state.step, grad, old[i]))
        results = dict(
            zip(at_matrix, batching.drive(*steps, count=state.step), strict=True)
        )
        directions = {i: direction for i, (direction, _) in results.items()}
        new = {i: state for i, (_, state) in results.items()}

        masks = {w: optax.MaskedNode() for w in moments if w[1] in at_matrix}
        if params is not None:
            leaves = treedef.flatten_up_to(params)
            params = treedef.unflatten(masked(leaves, at_matrix))
        at_dense, inner_state = dense.update(
            treedef.unflatten(masked(grads, at_matrix)),
            layout.set(state.inner_state, masks),
            params,
            **extra,
        )
        out = [
            at_matrix[i].leaf(directions[i]) if i in at_matrix else d.astype(g.dtype)
            for i, (d, g) in enumerate(
                zip(treedef.flatten_up_to(at_dense), grads, strict=True)
            )
        ]
        step = increment(state.step)
        return treedef.unflatten(out), store(step, layout, inner_state, treedef, new)

    return transformation(init, update)


def _steps(rule: Rule, key, step, grad, old) -> batching.Steps:
    """A rule's update as a generator, whether it is one or not."""
    if inspect.isgeneratorfunction(rule.update):
        return (yield from rule.update(key, step, grad, old))
    direction, new = _update(rule, key, step, grad, batching.wait_turn(old))
    new = accept_finite(new, old, direction)
    batching.end_turn_of((direction, new))
    return direction, new


@compiled
def _update(rule, *args):
    return rule.update(*args)
