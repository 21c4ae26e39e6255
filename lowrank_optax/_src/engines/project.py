"""The gradient-space engine: an optimizer that runs inside a low-rank subspace."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from lowrank_optax._src.engines import accumulation, exchange
from lowrank_optax._src.engines.accept import accept_leaf, increment
from lowrank_optax._src.engines.around import ByLeaves
from lowrank_optax._src.engines.decay import check_no_decay
from lowrank_optax._src.engines.one_matrix import (
    Matrix,
    Own,
    Parts,
    is_stored,
)
from lowrank_optax._src.engines.order import Order
from lowrank_optax._src.engines.project_state import Leaves, ProjectState
from lowrank_optax._src.engines.renew import renew_due
from lowrank_optax._src.leaves import matrix
from lowrank_optax._src.leaves.choose import view_leaves
from lowrank_optax._src.leaves.fields import (
    Layout,
    StateFields,
    by_field,
    by_leaf,
    fit_boxes,
)
from lowrank_optax._src.leaves.keys import leaf_seed
from lowrank_optax._src.leaves.matrix import MatrixView, nameless
from lowrank_optax._src.leaves.paths import flatten, full_precision
from lowrank_optax._src.leaves.saving import projected
from lowrank_optax._src.leaves.transformation import transformation
from lowrank_optax._src.parts import compatible
from lowrank_optax._src.parts.checks import check_number, check_rank
from lowrank_optax._src.parts.laws import (
    Recovery,
    Refresh,
    Subspace,
    Transfer,
)
from lowrank_optax._src.parts.recovery import Drop
from lowrank_optax._src.parts.refresh import Every, phases
from lowrank_optax._src.parts.subspace import TopSingular
from lowrank_optax._src.parts.transfer import Keep


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
    the parameters at matrix leaves; weight decay belongs outside, in full space, and is
    refused inside.

    Args:
      inner: any Optax transformation; it is called on one leaf after the other, or
        together on those that it joins, as a global norm does.
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
        moments to tell. In an update, for an inner optimizer that adds weights to the
        updates of matrices, as weight decay does.

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
    inner = optax.with_extra_args_support(inner)
    engine = _Projection(
        inner, StateFields(inner), rank, subspace, refresh, transfer, recovery, scale,
        side, matrices, key,
    )  # fmt: skip
    if not any(map(callable, (subspace, recovery, side))):
        engine.check(subspace, recovery, side)
    return transformation(engine.init, accumulation.stepwise(engine))


@dataclasses.dataclass(frozen=True)
class _Projection:
    """The arguments of `project_gradients`, and what is done with them."""

    inner: optax.GradientTransformationExtraArgs
    fields: StateFields
    rank: int
    subspace: Any
    refresh: Refresh
    transfer: Transfer
    recovery: Any
    scale: ArrayLike
    side: Any
    matrices: matrix.Matrices
    key: int | jax.Array

    def check(self, subspace: Any, recovery: Any, side: Any) -> None:
        """Refuse parts that do not go together."""
        compatible.check_fits(subspace, self.rank)
        for part in (self.refresh, recovery):
            compatible.check(part, subspace)
        accumulation.check(recovery)
        need = compatible.NAMED_SIDE
        if need in getattr(subspace, "requires", ()) and side not in ("left", "right"):
            user, other = compatible.name(subspace), f"side={side!r}"
            raise compatible.cannot_use(user, other, user, need, "that")

    def _views(self, tree: Any, creating: bool = False) -> list[Any]:
        def sizes(view):
            return projected(view, self.rank, is_stored(_at(view, self.subspace)))

        return view_leaves(tree, self.matrices, self.side, creating, sizes)

    def init(self, params):
        views = self._views(params, creating=True)
        treedef = flatten(params)[2]

        def tree(at_matrix, elsewhere=lambda view: optax.MaskedNode()):
            return treedef.unflatten(
                at_matrix(v) if isinstance(v, MatrixView) else elsewhere(v)
                for v in views
            )

        proxies = tree(
            lambda v: v.zeros(v.rank(self.rank), "n"),
            lambda v: full_precision(v.source),
        )
        inner_state = self.inner.init(proxies)
        layout = self.fields.layout(proxies)
        self._check_leaves(views, layout)
        sizes = [float(v.size) if isinstance(v, MatrixView) else 0.0 for v in views]
        state = ProjectState(
            step=jnp.zeros([], jnp.int32),
            basis=tree(
                lambda v: (
                    v.zeros("m", v.rank(self.rank))
                    if is_stored(_at(v, self.subspace))
                    else jnp.zeros([], jnp.int32)
                )
            ),
            refresh=treedef.unflatten(
                self.refresh.init(v, float(phase))
                if isinstance(v, MatrixView)
                else optax.MaskedNode()
                for v, phase in zip(views, phases(sizes), strict=True)
            ),
            recovery=tree(lambda v: _at(v, self.recovery).init(v)),
            inner_state=fit_boxes(layout, inner_state, proxies),
        )
        return accumulation.start(state, proxies)

    def _check_leaves(self, views: Sequence[Any], layout: Layout) -> None:
        """Refuse parts that do not go together at some leaf, with its moments."""
        cases = {}
        for i, v in enumerate(views):
            if isinstance(v, MatrixView):
                parts = _at(v, self.subspace), _at(v, self.recovery)
                self.check(
                    *parts, self.side(v.path) if callable(self.side) else self.side
                )
                compatible.check_matrix(parts[0], v)
                own = tuple((f, x) for (f, j), x in layout.abstract.items() if i == j)
                if own:
                    compatible.check(self.transfer, *parts)
                cases[own, v.m, v.rank(self.rank), type(parts[1])] = parts[1], v
        for (own, _, r, _), (part, view) in cases.items():
            view = dataclasses.replace(view, source=None)
            known = dict(layout.known)
            compatible.check_moments(self.transfer, part, view, r, dict(own), known)

    def _leaves(self, updates: Any, state: ProjectState) -> Leaves:
        """The leaves of an update, and what belongs to those that are matrices."""
        paths, grads, treedef = flatten(updates)
        views = self._views(updates)
        own = [
            treedef.flatten_up_to(x)
            for x in (state.basis, state.refresh, state.recovery)
        ]
        matrices = {
            i: Matrix(
                Parts(
                    nameless(v),
                    _at(v, self.subspace),
                    self.transfer,
                    _at(v, self.recovery),
                    v.rank(self.rank),
                ),
                grads[i],
                Own(*(x[i] for x in own)),
                leaf_seed(self.key, paths[i]),
            )
            for i, v in enumerate(views)
            if isinstance(v, MatrixView)
        }
        low = [
            matrices[i].low if i in matrices else exchange.mean(full_precision(x))
            for i, x in enumerate(grads)
        ]
        layout = self.fields.layout(treedef.unflatten(low))
        moments = by_leaf(layout.get(state.inner_state), range(len(grads)))
        return Leaves(treedef, layout, grads, low, matrices, moments)

    def _renew(self, leaves: Leaves, step: jax.Array, first: Any = True) -> None:
        """Renew the bases that are due, and carry their moments along."""
        matrices, moments = renew_due(
            leaves.matrices,
            self.refresh,
            step,
            leaves.moments,
            leaves.layout.known,
            first,
        )
        leaves.matrices.update(matrices)
        leaves.moments.update(moments)

    def add(
        self, updates: Any, state: ProjectState, first: jax.Array
    ) -> tuple[Any, ProjectState]:
        """The projected gradients; unless ``first``, in the bases that there are."""
        leaves = self._leaves(updates, state)
        self._renew(leaves, state.step, first)
        low, sizes = leaves.seen(range(len(leaves.grads)), leaves.matrices)
        own = {
            i: x.own._replace(refresh=x.counted(self.refresh, sizes[i], first))
            for i, x in leaves.matrices.items()
        }
        inner_state = leaves.layout.set(state.inner_state, by_field(leaves.moments))
        new_state = leaves.store(state, own, inner_state)
        return leaves.treedef.unflatten(low[i] for i in range(len(low))), new_state

    def update(
        self,
        updates: Any,
        state: ProjectState,
        params: Any = None,
        summed: Any = None,
        **extra: Any,
    ) -> tuple[Any, ProjectState]:
        """Renew the bases that are due; then leaf by leaf project, step, recover.

        Args:
          updates: gradients.
          state: of before.
          params: weights, or None.
          summed: projected gradients to step by, in the bases that there are; None for
            those of ``updates``.
          extra: for the inner optimizer.
        """
        leaves = self._leaves(updates, state)
        if summed is None:
            self._renew(leaves, state.step)
        else:
            summed = leaves.treedef.flatten_up_to(summed)
        weights = None if params is None else leaves.treedef.flatten_up_to(params)
        low = dict(enumerate(leaves.low))
        inner = ByLeaves(
            self.inner,
            leaves.layout,
            leaves.treedef,
            state.inner_state,
            low,
            None if weights is None else low,
            extra,
        )
        adding = inner.adding_weights()
        check_no_decay(updates, [i for i in adding if i in leaves.matrices])
        order, out, own, new = Order(), {}, {}, {}
        for group in inner.groups:
            # These wait for the group before. What is stored does not: it is that of
            # `leaves`.
            at = {i: leaves.matrices[i] for i in group if i in leaves.matrices}
            at = {i: x.in_turn(order) for i, x in at.items()}
            seen, sizes = leaves.seen(group, at, summed)
            given = {}
            if weights is not None:
                given = {i: full_precision(weights[i]) for i in group}
                given |= {i: x.down_weight(weights[i]) for i, x in at.items()}
            moments = {i: leaves.moments[i] for i in group}
            directions, found = inner.step(seen, moments, given)
            for i in set(group) - set(at):
                out[i] = directions[i].astype(leaves.grads[i].dtype)
                new[i] = accept_leaf(found[i], moments[i], out[i])
            for i, x in at.items():
                out[i], recovery, new[i] = x.up(
                    self.scale, seen[i], directions[i], found[i], moments[i]
                )
                kept = leaves.matrices[i]
                own[i] = kept.own._replace(recovery=recovery)
                if summed is None:
                    counted = kept.counted(self.refresh, sizes[i])
                    own[i] = own[i]._replace(refresh=counted)
                order.end(sizes[i])
        state = leaves.store(state, own, inner.state(new))
        state = state._replace(step=increment(state.step))
        return leaves.treedef.unflatten(out[i] for i in range(len(out))), state


def _at(view: MatrixView, part: Any) -> Any:
    """The part of one leaf; parts themselves are never callable."""
    return part(view) if callable(part) else part
