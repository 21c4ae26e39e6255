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
    is_unset,
    used_columns,
)
from lowrank_optax._src.engines.order import Order
from lowrank_optax._src.leaves.keys import Seed, matrix_keys_each
from lowrank_optax._src.leaves.roles import Known
from lowrank_optax._src.linalg import magnitude, matmul, orthonormalize
from lowrank_optax._src.linalg.meshes import split_axes
from lowrank_optax._src.linalg.random import fixed_signs
from lowrank_optax._src.parts.joint import is_joint, select_each
from lowrank_optax._src.parts.laws import Observer, Refresh
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
    looks = {
        i: first & rule.ready(x.own.recovery)
        for i, x in matrices.items()
        if isinstance(rule := x.parts.recovery, Observer)
    }

    def leaf(i, grad):
        x, own = matrices[i], matrices[i].own
        if i in looks:
            own = _observe((x.parts, known), looks[i], own, x.seed, moments[i])
        return _Leaf(due[i], grad, own, x.seed, moments[i])

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
        joint = in_step and is_stored(subspace) and is_joint(subspace)
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

    def new():
        found = _new(group, known, step, leaves)
        each = zip(due, found, old, strict=True)
        return [tree_where(d, x, y) for d, x, y in each]

    calls = due if len(group) == 1 else list(map(_calls, group, leaves))
    called = functools.reduce(jnp.logical_or, calls)
    found = jax.lax.cond(called, new, lambda: old)
    return tree_where(called, found, old) if _tied(group, leaves) else found


def _tied(group: Sequence[Parts], leaves: Sequence[_Leaf]) -> bool:
    """Whether what is new is to lie on a mesh where the old is.

    XLA's GPU compiler has what a conditional returns whole on each device, and what
    that is made of, unless it meets what lies elsewhere. Stacks alone: what they
    exchange is much. A leaf by itself may have moments that are decoded, whole on each
    device; a gradient would be gathered for these.
    """
    stacked = any(p.view.batch_shape for p in group)
    return len(group) > 1 and stacked and any(split_axes(x.grad) for x in leaves)


def _calls(parts: Parts, leaf: _Leaf) -> jax.Array:
    """Whether a leaf that is due has a group searched.

    One that waits for its first gradient, perhaps for ever, must not have all others
    searched with it at every step. It alone is looked at for that.
    """
    due = any_of(leaf.due)

    def look():
        grad = parts.matrix(exchange.mean(leaf.grad), leaf.own)
        return jnp.any(_usable(magnitude(grad)))

    with jax.named_scope("waits"):
        waits = due & is_unset(leaf.own.basis)
        return jax.lax.cond(waits, look, lambda: due)


def _usable(largest: jax.Array) -> jax.Array:
    """Whether there is something to choose by, of each matrix."""
    return jnp.isfinite(largest) & (largest > 0)


def _new(
    group: Sequence[Parts],
    known: tuple[tuple[str, Known], ...],
    step: jax.Array,
    leaves: Sequence[_Leaf],
) -> list[Renewal]:
    """Each matrix with a new basis; of a stack, those that are due."""
    grads = [
        p.matrix(exchange.mean(x.grad), x.own)
        for p, x in zip(group, leaves, strict=True)
    ]
    usable = [_usable(magnitude(grad)) for grad in grads]
    olds = [p.basis(x.own, x.seed) for p, x in zip(group, leaves, strict=True)]
    if is_stored(group[0].subspace):
        kept = bases = _select(group, step, leaves, grads, olds, usable)
    else:
        kept = [jnp.asarray(step, x.own.basis.dtype) for x in leaves]
        bases = [
            p.basis(x.own._replace(basis=at), x.seed)
            for p, x, at in zip(group, leaves, kept, strict=True)
        ]
    found = []
    for p, x, at, basis, old, fine in zip(
        group, leaves, kept, bases, olds, usable, strict=True
    ):
        overlap = matmul(basis.mT, old)
        # Where no gradient was usable nothing was chosen, and there is no overlap.
        share = jnp.sum(overlap**2, axis=(-2, -1)) / jnp.maximum(used_columns(old), 1)
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
    step: jax.Array,
    leaves: Sequence[_Leaf],
    grads: Sequence[jax.Array],
    olds: Sequence[jax.Array],
    usable: Sequence[jax.Array],
) -> list[jax.Array]:
    """New bases of a group, see `_fitting`."""
    batches = [p.view.batch_shape for p in group]
    keys, wholes = matrix_keys_each([x.seed for x in leaves], step, batches), []
    for p, old in zip(group, olds, strict=True):
        # The subspace is asked for all columns and the first ones are used, so that a
        # shrunk basis has the same columns as a whole one.
        pad = [(0, 0)] * (old.ndim - 1) + [(0, p.rank - old.shape[-1])]
        wholes.append(jnp.pad(old, pad))
    found = select_each(group[0].subspace, keys, grads, wholes, step)
    return list(map(_fitting, found, wholes, olds, usable))


def _fitting(
    new: jax.Array, whole: jax.Array, old: jax.Array, usable: jax.Array
) -> jax.Array:
    """A new basis with the signs of the old one, or of a fixed matrix at the start.

    An unusable gradient keeps the old basis, and so does a search that fails.
    """
    # The signs of singular vectors are arbitrary.
    known = jnp.any(whole != 0, axis=-2, keepdims=True)
    signs = jnp.where(known, whole, fixed_signs(*whole.shape[-2:]).astype(old.dtype))
    flipped = jnp.sum(new * signs, axis=-2, keepdims=True) < 0
    new = jnp.where(flipped, -new, new)[..., : old.shape[-1]]
    usable &= jnp.all(jnp.isfinite(new), axis=(-2, -1), keepdims=True)
    if old.ndim > 2:
        # In a stack of which others start, a matrix without a usable gradient starts
        # too, anywhere: with a basis of zero it would stand still until the next
        # refresh.
        unset = jnp.all(old == 0, axis=(-2, -1), keepdims=True)
        anywhere = orthonormalize(jnp.zeros_like(old[(0,) * (old.ndim - 2)]))
        old = jnp.where(unset & jnp.any(usable), anywhere, old)
    return jnp.where(usable, new, old)
