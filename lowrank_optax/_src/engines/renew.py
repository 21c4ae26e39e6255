"""New bases where they are due, and the moments carried to them."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._src.engines import exchange
from lowrank_optax._src.engines.accept import tree_where
from lowrank_optax._src.engines.one_matrix import (
    Matrix,
    Moments,
    Own,
    Parts,
    Renewal,
    any_of,
    is_stored,
)
from lowrank_optax._src.engines.order import Order
from lowrank_optax._src.leaves.keys import Seed, matrix_keys_each
from lowrank_optax._src.leaves.roles import Known
from lowrank_optax._src.linalg import magnitude, matmul, meshes, orthonormalize
from lowrank_optax._src.linalg.random import fixed_signs
from lowrank_optax._src.parts.joint import is_joint, is_phased, phases, select_each
from lowrank_optax._src.parts.laws import Observer, Refresh, Subspace
from lowrank_optax._src.parts.part import compiled, kind


def renew_due(
    matrices: Mapping[int, Matrix],
    refresh: Refresh,
    step: jax.Array,
    moments: Mapping[int, Moments],
    known: tuple[tuple[str, Known], ...],
    first: Any = True,
) -> tuple[dict[int, Matrix], dict[int, Moments]]:
    """The matrices with new bases where they are due, and moments carried to these.

    Before that, recoveries look at the moments where they are to. For ``known`` see
    `Layout`, for ``first`` see `Matrix.is_due`.
    """
    due = {i: x.is_due(refresh, step, first) for i, x in matrices.items()}
    # Not asked within the conditional: on a mesh it is a sum that has been taken.
    unset = {i: x.unset for i, x in matrices.items()}
    looks = {
        i: first & rule.ready(x.own.recovery)
        for i, x in matrices.items()
        if isinstance(rule := x.parts.recovery, Observer)
    }

    def leaf(i, grad):
        x, own = matrices[i], matrices[i].own
        if i in looks:
            own = _observe((x.parts, known), looks[i], own, x.seed, moments[i])
        return _Leaf(due[i], unset[i], grad, own, x.seed, moments[i])

    def renew_each():
        order, renewals = Order(), {}
        for group in _groups(matrices, getattr(refresh, "in_step", False)):
            grads = order.start([matrices[i].grad for i in group])
            leaves = list(map(leaf, group, grads))
            parts = tuple(matrices[i].parts for i in group)
            found = _renew((parts, known), step, leaves)
            renewals |= zip(group, found, strict=True)
            order.end([x.share for x in found])
        return renewals

    def keep_all():
        return {i: _kept(x.parts, x.own, moments[i]) for i, x in matrices.items()}

    if not matrices:
        return {}, {}
    # One conditional a step: on GPU, the host waits for the predicate of each.
    with jax.named_scope("refresh"):
        each = [*map(any_of, due.values()), *looks.values()]
        any_due = functools.reduce(jnp.logical_or, each)
        renewals = jax.lax.cond(any_due, renew_each, keep_all)
    found = {i: x.renewed(renewals[i], due[i]) for i, x in matrices.items()}
    return found, {i: x.moments for i, x in renewals.items()}


def _groups(matrices: Mapping[int, Matrix], in_step: bool) -> list[list[int]]:
    """The matrices that are renewed at once.

    Of those that are due at the same steps, in one subspace that chooses for many:
    alike ones beside one another, and as many as have thin arrays no larger together
    than the largest matrix. So a refresh makes few and large calls, and its temporaries
    do not grow with the model. (Of gradients in bfloat16 they do on a CPU, which stores
    a cast of each; a GPU has none.)
    """
    kinds: dict[object, list[int]] = {}
    for i in sorted(matrices, key=lambda i: (matrices[i].grad.shape, i)):
        subspace = matrices[i].parts.subspace
        # One that is drawn again for each use has nothing to be found in common.
        joint = in_step and is_stored(subspace) and all(map(is_joint, phases(subspace)))
        kinds.setdefault(kind(subspace) if joint else i, []).append(i)
    room = max(x.grad.size for x in matrices.values())
    found: list[list[int]] = []
    for members in kinds.values():
        used = room
        for i in members:
            thin = matrices[i].own.basis.size + math.prod(matrices[i].low.shape)
            if used + thin > room:
                found.append([])
                used = 0
            found[-1].append(i)
            used += thin
    return found


def _kept(parts: Parts, own: Own, moments: Moments) -> Renewal:
    share = jnp.ones(parts.view.batch_shape, jnp.float32)
    return Renewal(own.basis, moments, share, own.recovery)


@compiled
def _observe(parts, looks, own, seed, moments):
    parts, known = parts

    def look():
        basis = parts.basis(own, seed)
        return parts.recovery.observe(basis, moments, dict(known), own.recovery)

    return own._replace(recovery=jax.lax.cond(looks, look, lambda: own.recovery))


class _Leaf(NamedTuple):
    """The arrays of a matrix that may be renewed, see `Matrix`."""

    due: jax.Array
    unset: jax.Array
    grad: jax.Array
    own: Own
    seed: Seed
    moments: Moments


@compiled
def _renew(parts, step, leaves):
    group, known = parts
    due = [any_of(x.due) for x in leaves]
    old = [_kept(p, x.own, x.moments) for p, x in zip(group, leaves, strict=True)]
    # One that is due and is not searched has no usable gradient, and no overlap.
    old = [
        x._replace(share=jnp.where(d, 0.0, x.share))
        for d, x in zip(due, old, strict=True)
    ]

    def new(subspace):
        found = _new(group, subspace, known, step, leaves)
        each = zip(due, found, old, strict=True)
        return [tree_where(d, x, y) for d, x, y in each]

    called, subspace = _called(group, leaves, due), group[0].subspace
    if is_phased(subspace):
        each = [functools.partial(new, x) for x in phases(subspace)]
        which = jnp.where(called, 1 + subspace.phase(step), 0)
        found = jax.lax.switch(which, [lambda: old, *each])
    else:
        found = jax.lax.cond(called, lambda: new(subspace), lambda: old)
    # On a mesh the new is to lie where the old does. XLA's GPU compiler has what a
    # conditional returns whole on each device, unless it meets what is not.
    on_mesh = any(meshes.split_axes(x.grad) for x in leaves)
    return tree_where(called, found, old) if on_mesh else found


def _called(
    group: Sequence[Parts], leaves: Sequence[_Leaf], due: Sequence[jax.Array]
) -> jax.Array:
    """Whether a group is searched for those that are due.

    It is not where these wait for their first gradient, perhaps for ever, and there is
    none yet: all others would be searched with them at every step. While one waits, the
    gradients of its group are looked at.
    """
    if len(group) == 1:
        return due[0]

    def look():
        each = zip(group, leaves, strict=True)
        sizes = meshes.at_once(magnitude(p.matrix(x.grad, x.own)) for p, x in each)
        here = jnp.stack([jnp.any(_usable(x)) for x in sizes])
        # On one device is enough to look closer, at the mean.
        return list(exchange.mean(here.astype(jnp.float32)) > 0)

    with jax.named_scope("waits"):
        waits = [d & x.unset for d, x in zip(due, leaves, strict=True)]
        looks = functools.reduce(jnp.logical_or, waits)
        usable = jax.lax.cond(looks, look, lambda: due)
    each = zip(due, waits, usable, strict=True)
    return functools.reduce(jnp.logical_or, [d & (~w | u) for d, w, u in each])


def _usable(largest: jax.Array) -> jax.Array:
    """Whether there is something to choose by, of each matrix."""
    return jnp.isfinite(largest) & (largest > 0)


def _new(
    group: Sequence[Parts],
    subspace: Subspace,
    known: tuple[tuple[str, Known], ...],
    step: jax.Array,
    leaves: Sequence[_Leaf],
) -> list[Renewal]:
    """Each matrix with a new basis; of a stack, those that are due."""
    grads = [
        p.matrix(exchange.mean(x.grad), x.own)
        for p, x in zip(group, leaves, strict=True)
    ]
    olds = [p.basis(x.own, x.seed) for p, x in zip(group, leaves, strict=True)]
    usable = list(map(_usable, meshes.at_once(map(magnitude, grads))))
    if is_stored(group[0].subspace):
        chosen = _select(group, subspace, step, leaves, grads, olds)
        compared = _compared(chosen, olds)
        each = zip(chosen, olds, compared, usable, strict=True)
        kept = bases = [_fitting(*of_one) for of_one in each]
        used = [x.used for x in compared]
    else:
        kept = [jnp.asarray(step, x.own.basis.dtype) for x in leaves]
        bases = [
            p.basis(x.own._replace(basis=at), x.seed)
            for p, x, at in zip(group, leaves, kept, strict=True)
        ]
        used = [jnp.ones_like(old[..., :1, :], bool) for old in olds]
    found = []
    for p, x, at, basis, old, columns, fine in zip(
        group, leaves, kept, bases, olds, used, usable, strict=True
    ):
        overlap = matmul(basis.mT, old)
        # Where no gradient was usable nothing was chosen, and there is no overlap.
        count = jnp.maximum(jnp.sum(columns, axis=(-2, -1)), 1)
        share = jnp.sum(overlap**2, axis=(-2, -1)) / count
        share = jnp.where(fine[..., 0, 0], share, 0.0).astype(jnp.float32)
        carried = p.transfer.carry(x.moments, overlap, dict(known))
        # Carried in float32 and stored as they were.
        carried = {name: y.astype(x.moments[name].dtype) for name, y in carried.items()}
        now = Renewal(at, carried, share, x.own.recovery)
        if x.due.ndim:
            now = _of_due(x.due, now, _kept(p, x.own, x.moments))
        found.append(now)
    return found


def _of_due(due: jax.Array, new: Renewal, old: Renewal) -> Renewal:
    """Of a stack, what is new of the matrices that are due.

    A moment that has no entry for each matrix is that of the new bases.
    """

    def pick(x, y):
        return tree_where(due, x, y) if x.shape[: due.ndim] == due.shape else x

    return jax.tree.map(pick, new, old)


def _select(
    group: Sequence[Parts],
    subspace: Subspace,
    step: jax.Array,
    leaves: Sequence[_Leaf],
    grads: Sequence[jax.Array],
    olds: Sequence[jax.Array],
) -> list[jax.Array]:
    """New bases of a group, of arbitrary signs."""
    batches = [p.view.batch_shape for p in group]
    keys, wholes = matrix_keys_each([x.seed for x in leaves], step, batches), []
    for p, old in zip(group, olds, strict=True):
        # The subspace is asked for all columns and the first ones are used, so that a
        # shrunk basis has the same columns as a whole one.
        pad = [(0, 0)] * (old.ndim - 1) + [(0, p.rank - old.shape[-1])]
        wholes.append(jnp.pad(old, pad))
    found = select_each(subspace, keys, grads, wholes, step)
    return [new[..., : old.shape[-1]] for new, old in zip(found, olds, strict=True)]


class _Compared(NamedTuple):
    """What a new basis is beside the old one, (*batch, 1, r) each.

    Attributes:
      along: positive where a column has the sign of the old one, or of a fixed matrix
        where there is none. It is not finite where the column is not.
      used: whether the old column is not zero.
    """

    along: jax.Array
    used: jax.Array


def _compared(news: Sequence[jax.Array], olds: Sequence[jax.Array]) -> list[_Compared]:
    """Of all matrices of a group, by sums that are one collective on a mesh."""

    def sums(new, old):
        signs = fixed_signs(*old.shape[-2:]).astype(old.dtype)
        products = new * old, new * signs, old * old
        return jnp.stack([jnp.sum(x, axis=-2) for x in products])[..., None, :]

    found = []
    for with_old, with_signs, square in meshes.at_once(map(sums, news, olds)):
        used = square > 0
        found.append(_Compared(jnp.where(used, with_old, with_signs), used))
    return found


def _fitting(
    new: jax.Array, old: jax.Array, beside: _Compared, usable: jax.Array
) -> jax.Array:
    """A new basis with the signs of the old one, or of a fixed matrix at the start.

    An unusable gradient, ``(*batch, 1, 1)``, keeps the old basis, and so does a search
    that fails.
    """
    along = beside.along  # the signs of singular vectors are arbitrary
    new = jnp.where(along < 0, -new, new)
    usable &= jnp.all(jnp.isfinite(along), axis=-1, keepdims=True)
    if old.ndim > 2:
        # In a stack of which others start, a matrix without a usable gradient starts
        # too, anywhere: with a basis of zero it would stand still until the next
        # refresh.
        unset = jnp.all(old == 0, axis=(-2, -1), keepdims=True)
        anywhere = orthonormalize(jnp.zeros_like(old[(0,) * (old.ndim - 2)]))
        old = jnp.where(unset & jnp.any(usable), anywhere, old)
    return jnp.where(usable, new, old)
