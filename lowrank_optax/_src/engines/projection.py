"""What the gradient-space engine does at one matrix, compiled once for equal shapes."""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._src import linalg
from lowrank_optax._src.engines import batching
from lowrank_optax._src.engines.accept import accept_finite, tree_where
from lowrank_optax._src.linalg import matmul, project, random
from lowrank_optax._src.parts.part import compiled


@compiled
def down(
    parts,
    key,
    step,
    phase,
    first,
    grad,
    basis,
    refresh_state,
    recovery_state,
    moments,
    turn,
):
    """Renew the basis if due, and project the gradient, once ``turn`` is known."""
    subspace, refresh, transfer, recovery, rank, turned = parts
    grad = recovery.prepare(grad, recovery_state)
    # As it lies in memory: a conditional copies a transposed view that it is given.
    lying = grad.mT if turned else grad
    basis = batching.after(basis, turn)
    # A basis that has not seen a usable gradient yet is zero: it is always due.
    unset = jnp.all(basis[..., 0] == 0)

    def project_to_old():
        coeff = project(basis, lying.mT if turned else lying)
        return coeff, jnp.linalg.norm(coeff)

    # Projected here only for a rule that asks for the size; else where it is needed.
    known = project_to_old() if getattr(refresh, "uses_size", True) else None
    due = refresh.due(refresh_state, step, phase, known and known[1])
    due = unset | (first & due)

    def renew():
        # A shrunk basis is renewed as a whole one is, and cut off again: its columns
        # stay those that it would have without.
        kept = basis.shape[-1]
        old = jnp.pad(basis, [(0, 0)] * (basis.ndim - 1) + [(0, rank - kept)])
        grad = lying.mT if turned else lying
        new, coeff = _safe_select(subspace, key, grad, old, step)
        new, coeff = new[..., :kept], coeff[..., :kept, :]
        overlap = matmul(new.mT, basis)
        used = jnp.sum(jnp.any(basis != 0, axis=-2))
        size = jnp.linalg.norm(grad)
        usable = jnp.isfinite(size) & (size > 0)  # else nothing was chosen
        share = jnp.where(usable, jnp.sum(overlap**2) / jnp.maximum(used, 1), 0.0)
        carried = transfer.carry(moments, overlap)
        return coeff, new, carried, share, size

    def keep():
        coeff, size = known or project_to_old()
        return coeff, basis, moments, jnp.ones([], basis.dtype), size

    coeff, basis, moments, share, size = jax.lax.cond(due, renew, keep)
    after = refresh.after(refresh_state, due, size, share)
    after = accept_finite(
        tree_where(unset | first, after, refresh_state), refresh_state
    )
    return coeff, basis, due, after, moments, size


@compiled
def draw(parts, key, known):
    """The basis of a subspace that is not stored, from the key of its refresh.

    Drawn once ``known`` is so, any array.
    """
    subspace, shape, dtype = parts
    key = batching.after(key, known)
    zeros = jnp.zeros(shape, dtype)
    return subspace.select(key, zeros, zeros, jnp.zeros([], jnp.int32))


@compiled
def project_param(parts, basis, param):
    return project(basis, param)


@compiled
def recover(parts, grad, coeff, direction, basis, state, moments):
    recovery, scale = parts
    grad = recovery.prepare(grad, state)
    new, state = recovery.recover(grad, coeff, direction, basis, scale, state)
    return new, state if moments is None else recovery.observe(basis, moments, state)


def is_stored(subspace: Any) -> bool:
    return getattr(subspace, "stored", True)


def _knows_projection(subspace: Any) -> bool:
    """Whether it has `select_and_project`, and no `select` from a derived class."""
    names = {"select", "select_and_project"}
    own = (names & vars(kind).keys() for kind in type(subspace).__mro__)
    return "select_and_project" in next(filter(None, own))


def _safe_select(subspace: Any, key, grad, old, step):
    """A new basis with the signs of the old one, and the gradient projected to it.

    Where there is no old one, the signs are those of a fixed matrix.

    An unusable gradient keeps the old one, and is projected to zero or to NaNs. So does
    a search that fails, whose gradient counts as zero for this step.
    """
    if not is_stored(subspace):
        new = subspace.select(key, grad, old, step)  # as it will be drawn again
        return new, project(new, grad)
    largest = jnp.max(jnp.abs(grad), axis=(-2, -1), keepdims=True)
    usable = jnp.isfinite(largest) & (largest > 0)
    inverse, scale = linalg.power_of_two(jnp.where(usable, largest, 0))
    scaled = jnp.where(usable, grad * inverse, 0)
    if _knows_projection(subspace):
        new, coeff = subspace.select_and_project(key, scaled, old, step)
    else:
        new = subspace.select(key, scaled, old, step)
        coeff = project(new, scaled)
    # Which signs a search ends with is a matter of rounding; at the start too.
    known = jnp.any(old != 0, axis=-2, keepdims=True)
    signs = jnp.where(known, old, random.filler(*old.shape[-2:]).astype(old.dtype))
    flipped = jnp.sum(new * signs, axis=-2, keepdims=True) < 0
    new = jnp.where(flipped, -new, new)
    coeff = jnp.where(flipped.mT, -coeff, coeff) * scale
    finite = jnp.all(jnp.isfinite(new), axis=(-2, -1), keepdims=True)
    usable &= finite
    # In a stack of which others start, a matrix without a usable gradient starts too,
    # anywhere: with a basis of zero it would stand still until the next refresh.
    unset = jnp.all(old == 0, axis=(-2, -1), keepdims=True)
    starts = unset & jnp.any(usable) & finite
    return jnp.where(usable | starts, new, old), jnp.where(usable, coeff, 0 * largest)
