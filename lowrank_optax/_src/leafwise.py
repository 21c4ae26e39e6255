"""The one-matrix engine: a whole update rule on each matrix leaf."""

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._src import engine, matrix, trees
from lowrank_optax._src.compress import CompressState, accept
from lowrank_optax._src.matrix import MatrixView
from lowrank_optax._src.typing import Rule


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
      side: which side of a matrix comes first, see `project_gradients`.
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
    fields = engine.ParamFields(dense)
    place = {engine.last(name): name for name in fields.names}
    rule_update = jax.jit(rule.update)  # leaves of equal shape share one body

    def masked(views, leaves):
        return [
            optax.MaskedNode() if isinstance(v, MatrixView) else trees.full_precision(x)
            for v, x in zip(views, leaves, strict=True)
        ]

    def split(states):
        """Rule states by leaf number -> values by field name, shared and own."""
        names = next(iter(states.values()))._fields if states else ()
        by_field = {f: {i: getattr(s, f) for i, s in states.items()} for f in names}
        shared = {place[f]: x for f, x in by_field.items() if f in place}
        return shared, {f: x for f, x in by_field.items() if f not in place}

    def store(inner_state, treedef, states):
        shared, own = split(states)
        moments = fields.get(inner_state, treedef)
        for name, values in shared.items():
            for i, x in values.items():
                moments[name][i] = x
        size = treedef.num_leaves
        trees = {
            f: treedef.unflatten([x.get(i, optax.MaskedNode()) for i in range(size)])
            for f, x in own.items()
        }
        return fields.set(inner_state, treedef, moments), trees

    def init(params):
        views = trees.views(params, matrices, side, creating=True)
        _, leaves, treedef = trees.flatten(params)
        inner_state = dense.init(treedef.unflatten(masked(views, leaves)))
        states = {
            i: rule.init(v) for i, v in enumerate(views) if isinstance(v, MatrixView)
        }
        return CompressState(
            jnp.zeros([], jnp.int32), *store(inner_state, treedef, states)
        )

    def update(updates, state, params=None, **extra):
        views = trees.views(updates, matrices, side)
        treedef = jax.tree.structure(updates)
        grads = treedef.flatten_up_to(updates)
        moments = fields.get(state.inner_state, treedef)
        own = {f: treedef.flatten_up_to(x) for f, x in state.own.items()}
        out, states = list(grads), {}
        for i, view in enumerate(views):
            if not isinstance(view, MatrixView):
                continue
            with trees.quietly():
                kind = type(jax.eval_shape(lambda v=view: rule.init(v)))
            old = kind(
                *(own[f][i] if f in own else moments[place[f]][i] for f in kind._fields)
            )
            leaf_key = trees.leaf_key(key, view.path, state.step)
            direction, new = rule_update(
                leaf_key, state.step, view.matrix(grads[i]), old
            )
            out[i], states[i] = view.leaf(direction), accept(new, old)

        at_dense = masked(views, grads)
        masks = [x if isinstance(x, optax.MaskedNode) else None for x in at_dense]
        bare = {
            name: [
                x if mask is None else mask for x, mask in zip(xs, masks, strict=True)
            ]
            for name, xs in moments.items()
        }
        if params is not None:
            params = treedef.unflatten(masked(views, treedef.flatten_up_to(params)))
        directions, inner_state = dense.update(
            treedef.unflatten(at_dense),
            fields.set(state.inner_state, treedef, bare),
            params,
            **extra,
        )
        for i, d in enumerate(treedef.flatten_up_to(directions)):
            if not isinstance(views[i], MatrixView):
                out[i] = d.astype(grads[i].dtype)
        new = CompressState(
            engine.increment(state.step), *store(inner_state, treedef, states)
        )
        return treedef.unflatten(out), new

    return engine.transformation(init, update)
