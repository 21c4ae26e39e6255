"""The gradient-space engine: an optimizer that runs inside a low-rank subspace."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from lowrank_optax._src.engines import batching, projection
from lowrank_optax._src.engines.accept import all_finite, increment, tree_where
from lowrank_optax._src.kernels.adam import recognize
from lowrank_optax._src.kernels.dispatch import active
from lowrank_optax._src.leaves import matrix
from lowrank_optax._src.leaves.box import transformation
from lowrank_optax._src.leaves.choose import view_leaves
from lowrank_optax._src.leaves.fields import StateFields, fit_boxes
from lowrank_optax._src.leaves.keys import leaf_keys
from lowrank_optax._src.leaves.matrix import MatrixView
from lowrank_optax._src.leaves.paths import flatten, full_precision
from lowrank_optax._src.linalg import random
from lowrank_optax._src.parts import compatible
from lowrank_optax._src.parts.checks import check_number, check_rank
from lowrank_optax._src.parts.laws import Recovery, Refresh, Subspace, Transfer
from lowrank_optax._src.parts.recovery import Drop
from lowrank_optax._src.parts.refresh import Every, spread
from lowrank_optax._src.parts.subspace import TopSingular
from lowrank_optax._src.parts.transfer import Keep
from lowrank_optax._src.training import accumulate
from lowrank_optax._src.training.phases import accumulating


class ProjectState(NamedTuple):
    """State of `project_gradients`; trees mirror the parameters'.

    Attributes:
      step: updates made so far, int32.
      basis: (*batch, m, r) at matrices, ``MaskedNode()`` elsewhere; set at a refresh.
        Of a subspace that is not stored, the step at which it was drawn, int32.
      refresh: scalars of the refresh rule at matrices.
      recovery: state of the recovery at matrices.
      inner_state: of the inner optimizer, on (*batch, r, n) at matrices and on the
        parameter's own shape elsewhere.
    """

    step: jax.Array
    basis: Any
    refresh: Any
    recovery: Any
    inner_state: Any


def project_gradients(
    inner: optax.GradientTransformation,
    *,
    rank: int,
    subspace: Subspace | Callable[[MatrixView], Subspace] = TopSingular(),
    refresh: Refresh = Every(200),
    transfer: Transfer = Keep(),
    recovery: Recovery | Callable[[MatrixView], Recovery] = Drop(),
    scale: ArrayLike = 1.0,
    side: matrix.Side | Callable[[str], matrix.Side] = "short",
    matrices: matrix.Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Run an optimizer on gradients projected to a low-rank subspace.

    For each matrix leaf with gradient G (m, n), basis P (m, r) and inner optimizer rho:

    .. math::
      P \leftarrow \mathrm{select}(G) \text{ when due},\quad R = P^\top G,\quad
      N = \rho(R),\quad \Delta = \mathrm{recover}(G, R, N, P) = s\,P N

    Leaves that are not matrices go through the same inner optimizer at full rank. The
    inner optimizer stands inside because it must see R: what is chained after this
    transformation sees full-size updates and saves no memory. It is given ``P^T W`` as
    the parameters at matrix leaves; weight decay belongs outside, in full space.

    Args:
      inner: any Optax transformation, called once on the whole tree.
      rank: r; the effective rank of a leaf is ``min(rank, m, n)``.
      subspace: which subspace, or a function from a `MatrixView` to it.
      refresh: when it is renewed; step 0 always is.
      transfer: what becomes of the inner moments at a renewal.
      recovery: what is done with the part of the gradient outside the subspace, or a
        function from a `MatrixView` to it.
      scale: s, multiplies ``P N``; a number or a traced scalar.
      side: the basis spans the "short" side of a matrix (as the GaLore paper and code
        do), the "long" one (least Adam state, as optax.contrib does), or always the
        "left" (rows) or the "right" one. Or a function from a leaf's path to these.
      matrices: which leaves are matrices, see `default_matrices`.
      key: a seed or a key for randomized parts.

    Returns:
      A transformation from full-shape updates to full-shape updates.

    Raises:
      TypeError, ValueError: for a rank below 1 or not an int, a scale that is a
        function (see `inject_hyperparams`), an unknown side, or
        ``matrices`` that do not fit the parameters; for parts that do not go
        together, at init where it takes the parameters or the inner optimizer's
        moments to tell.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = lro.project_gradients(optax.scale_by_adam(), rank=2)
    >>> params = {"w": jnp.ones((6, 8))}
    >>> state = tx.init(params)
    >>> state.basis["w"].shape, state.inner_state.mu["w"].shape
    ((6, 2), (2, 8))
    >>> updates, state = tx.update(params, state, params)
    >>> updates["w"].shape
    (6, 8)
    >>> tx = lro.project_gradients(  # all parts
    ...     optax.scale_by_adam(),
    ...     rank=2,
    ...     subspace=lro.TopSingular("warm"),
    ...     refresh=lro.Staggered(100),
    ...     transfer=lro.Rotate(),
    ...     recovery=lro.Drop(),
    ... )
    """
    rank = check_rank(rank)
    check_number(scale, "scale")
    adam = recognize(inner)
    inner = optax.with_extra_args_support(inner)
    fields = StateFields(inner)
    stored = projection.is_stored(subspace)

    def check(subspace, recovery, side):
        compatible.check_rank(subspace, rank)
        for part in (refresh, recovery):
            compatible.check(part, subspace)
        accumulate.check(recovery)
        need = compatible.NAMED_SIDE
        if need in getattr(subspace, "requires", ()) and side not in ("left", "right"):
            user, other = compatible.name(subspace), f"side={side!r}"
            raise compatible.cannot_use(user, other, user, need, "that")

    if not any(map(callable, (subspace, recovery, side))):
        check(subspace, recovery, side)

    def load(views, kept):
        """For each matrix a function to its basis: as it is kept, or drawn again.

        Drawn once what the function is given is known: else those of all leaves would
        be drawn first, and alive at once.
        """
        if stored:
            return {i: lambda known, i=i: kept[i] for i in views}
        paths = [view.path for view in views.values()]
        keys = leaf_keys(key, paths, [kept[i] for i in views])
        shapes = ((*v.batch_shape, v.m, v.rank(rank)) for v in views.values())
        drawn = {}
        for (i, view), shape, own in zip(views.items(), shapes, keys, strict=True):
            parts = subspace, shape, view.compute_dtype
            own = random.matrix_keys(own, view.batch_shape)
            drawn[i] = functools.partial(projection.draw, parts, own)
        return drawn

    def init(params):
        views = view_leaves(params, matrices, side, creating=True)
        treedef = flatten(params)[2]

        def tree(at_matrix, elsewhere=lambda view: optax.MaskedNode()):
            return treedef.unflatten(
                [
                    at_matrix(v) if isinstance(v, MatrixView) else elsewhere(v)
                    for v in views
                ]
            )

        proxies = tree(
            lambda v: v.zeros(v.rank(rank), "n"),
            lambda v: full_precision(v.source),
        )
        inner_state = inner.init(proxies)
        layout = fields.layout(proxies)
        cases = {}
        for i, v in enumerate(views):
            if isinstance(v, MatrixView):
                parts = _at(v, subspace), _at(v, recovery)
                check(*parts, side(v.path) if callable(side) else side)
                own = tuple((f, x) for (f, j), x in layout.abstract.items() if i == j)
                if own:
                    compatible.check(transfer, *parts)
                cases[own, v.m, v.rank(rank), type(parts[1])] = parts[1], v
        for (own, _, r, _), (part, view) in cases.items():
            view = dataclasses.replace(view, source=None)
            _check_moments(transfer, part, view, r, dict(own))
        state = ProjectState(
            step=jnp.zeros([], jnp.int32),
            basis=tree(
                (lambda v: v.zeros("m", v.rank(rank)))
                if stored
                else (lambda v: jnp.zeros([], jnp.int32))
            ),
            refresh=tree(refresh.init),
            recovery=tree(lambda v: _at(v, recovery).init(v)),
            inner_state=fit_boxes(layout, inner_state, proxies),
        )
        return accumulate.start(state, proxies)

    def in_one_pass(at_matrix):
        """The kernels that stand for the inner optimizer and what is around it."""
        if adam is None or accumulating() or not active():
            return {}
        from lowrank_optax._src.kernels.projected_adam import projected_adam, suits

        return {
            i: functools.partial(projected_adam, (adam, scale, v.turned))
            for i, v in at_matrix.items()
            if suits(_at(v, recovery), v)
        }

    def down(updates, state, first):
        """The projected gradients, and the state with the bases for them."""
        treedef = jax.tree.structure(updates)
        views = view_leaves(updates, matrices, side)
        at_matrix = {i: v for i, v in enumerate(views) if isinstance(v, MatrixView)}
        phases = spread([getattr(view, "size", 0.0) for view in views])
        keys = leaf_keys(key, [v.path for v in views], state.step)
        grads = treedef.flatten_up_to(updates)
        bases, refreshes, recoveries = (
            treedef.flatten_up_to(x)
            for x in (state.basis, state.refresh, state.recovery)
        )
        low = [full_precision(g) for g in grads]
        for i, view in at_matrix.items():
            r = bases[i].shape[-1] if stored else view.rank(rank)
            shape = (*view.batch_shape, r, view.n)
            low[i] = jax.ShapeDtypeStruct(shape, view.compute_dtype)
        layout = fields.layout(treedef.unflatten(low))
        moments = layout.get(state.inner_state)

        basis_at = load(at_matrix, bases)
        # Leaf by leaf: XLA's CPU backend orders by depth, and would first project all
        # gradients and last project all directions back, with all of them alive.
        in_one, turn = in_one_pass(at_matrix), jnp.zeros([])
        for i, view in at_matrix.items():
            own = {name: x for (name, j), x in moments.items() if j == i}
            low[i], basis, due, refreshes[i], own, size = projection.down(
                (
                    _at(view, subspace),
                    refresh,
                    transfer,
                    _at(view, recovery),
                    view.rank(rank),
                    view.turned,
                ),
                random.matrix_keys(keys[i], view.batch_shape),
                state.step,
                phases[i],
                first,
                view.matrix(grads[i]),
                basis_at[i](turn),
                refreshes[i],
                recoveries[i],
                own,
                turn,
            )
            if i not in in_one:  # which does without the projection made here
                turn = size
            bases[i] = basis if stored else jnp.where(due, state.step, bases[i])
            moments |= {(name, i): x for name, x in own.items()}
        return treedef.unflatten(low), state._replace(
            basis=treedef.unflatten(bases),
            refresh=treedef.unflatten(refreshes),
            inner_state=layout.set(state.inner_state, moments),
        )

    def up(updates, low, state, params, **extra):
        """The update by the projected gradients, in the bases of the state."""
        treedef = jax.tree.structure(updates)
        views = view_leaves(updates, matrices, side)
        at_matrix = {i: v for i, v in enumerate(views) if isinstance(v, MatrixView)}
        grads, coeffs, bases, recoveries = (
            treedef.flatten_up_to(x)
            for x in (updates, low, state.basis, state.recovery)
        )
        layout = fields.layout(low)
        moments = layout.get(state.inner_state)
        recovery_at = {i: _at(view, recovery) for i, view in at_matrix.items()}

        # Drawn once more, and not kept from where the gradients were projected.
        basis_at = load(at_matrix, bases)
        in_one = in_one_pass(at_matrix)
        masks = {w: optax.MaskedNode() for w in moments if w[1] in in_one}
        if params is not None:
            weights = [full_precision(w) for w in treedef.flatten_up_to(params)]
            for i, view in at_matrix.items():
                weight = view.matrix(weights[i])
                weights[i] = projection.project_param(
                    None, basis_at[i](coeffs[i]), weight
                )
            params = treedef.unflatten(weights)
        with batching.at_once():
            directions, inner_state = inner.update(
                treedef.unflatten(
                    optax.MaskedNode() if i in in_one else x
                    for i, x in enumerate(coeffs)
                ),
                layout.set(state.inner_state, moments | masks),
                params,
                **extra,
            )

        directions = treedef.flatten_up_to(directions)
        new_moments = layout.get(inner_state)
        out = [
            d if i in at_matrix else d.astype(g.dtype)
            for i, (d, g) in enumerate(zip(directions, grads, strict=True))
        ]
        for i, view in at_matrix.items():
            own = [w for w in new_moments if w[1] == i]
            if i in in_one:
                new, new_moments["mu", i], new_moments["nu", i] = in_one[i](
                    view.matrix(grads[i], grads[i].dtype),
                    basis_at[i](grads[i]),
                    moments["mu", i],
                    moments["nu", i],
                    state.inner_state.count,
                )
                recovery_state = recoveries[i]
                out[i] = view.leaf(new)
                ok = all_finite([new_moments[w] for w in own])
            else:
                seen = hasattr(recovery_at[i], "observe")
                new, recovery_state = projection.recover(
                    (recovery_at[i], scale),
                    view.matrix(grads[i]),
                    coeffs[i],
                    directions[i],
                    basis_at[i](directions[i]),
                    recoveries[i],
                    {name: new_moments[name, i] for name, _ in own} if seen else None,
                )
                # Told by the gradient, not by each of the moments: the choice is then
                # made while they are computed, and costs no pass; but after the
                # directions, which are made of the old ones too.
                out[i] = view.leaf(new)
                size = jnp.linalg.norm(coeffs[i])
                ok = jnp.isfinite(batching.after(size, out[i]))
                ok &= all_finite(recovery_state)
            # What is not finite must not stay in the state for good; the moments of a
            # leaf belong together.
            recoveries[i] = tree_where(ok, recovery_state, recoveries[i])
            new_moments |= {w: tree_where(ok, new_moments[w], moments[w]) for w in own}
        new_state = state._replace(
            step=increment(state.step),
            recovery=treedef.unflatten(recoveries),
            inner_state=layout.set(inner_state, new_moments),
        )
        return treedef.unflatten(out), new_state

    return transformation(init, accumulate.stepwise(down, up))


def _check_moments(transfer, recovery, view, rank, moments) -> None:
    """Let parts refuse the moments now, by a run on shapes alone."""

    def use(moments):
        transfer.carry(moments, jnp.zeros((*view.batch_shape, rank, rank)))
        if hasattr(recovery, "observe"):
            basis = view.zeros("m", rank)
            recovery.observe(basis, moments, recovery.init(view))

    jax.eval_shape(use, moments)


def _at(view: MatrixView, part: Any) -> Any:
    """The part of one leaf; parts themselves are never callable."""
    return part(view) if callable(part) else part
