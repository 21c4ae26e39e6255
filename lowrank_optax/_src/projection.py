"""What the gradient-space engine does at one matrix, compiled once for equal shapes."""

from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._src import batching, engine, linalg
from lowrank_optax._src.linalg import matmul, project
from lowrank_optax._src.typing import Subspace


@engine.compiled
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
    coeff = project(batching.after(basis, turn), grad)
    size = jnp.linalg.norm(coeff)
    # A basis that has not seen a usable gradient yet is zero: it is always due.
    unset = jnp.all(basis[..., 0] == 0)
    due = unset | (first & refresh.due(refresh_state, step, phase, size))

    def renew():
        # A shrunk basis is renewed as a whole one is, and cut off again: its columns
        # stay those that it would have without.
        missing = rank - basis.shape[-1]
        old = jnp.pad(basis, [(0, 0)] * (basis.ndim - 1) + [(0, missing)])
        grad = lying.mT if turned else lying
        new = _safe_select(subspace, key, grad, old, step)[..., : basis.shape[-1]]
        overlap = matmul(new.mT, basis)
        used = jnp.sum(jnp.any(basis != 0, axis=-2))
        size = jnp.linalg.norm(grad)
        usable = jnp.isfinite(size) & (size > 0)  # else nothing was chosen
        share = jnp.where(usable, jnp.sum(overlap**2) / jnp.maximum(used, 1), 0.0)
        carried = transfer.carry(moments, overlap)
        return project(new, grad), new, carried, share, size

    def keep():
        return coeff, basis, moments, jnp.ones([], basis.dtype), size

    coeff, basis, moments, share, size = jax.lax.cond(due, renew, keep)
    after = refresh.after(refresh_state, due, size, share)
    after = engine.accept(
        engine.where(unset | first, after, refresh_state), refresh_state
    )
    return coeff, basis, due, after, moments, size


@engine.compiled
def draw(parts, key):
    """The basis of a subspace that is not stored, from the key of its refresh."""
    subspace, shape, dtype = parts
    zeros = jnp.zeros(shape, dtype)
    return subspace.select(key, zeros, zeros, jnp.zeros([], jnp.int32))


@engine.compiled
def project_param(parts, basis, param):
    return project(basis, param)


@engine.compiled
def recover(parts, grad, coeff, direction, basis, state, moments):
    recovery, scale = parts
    grad = recovery.prepare(grad, state)
    new, state = recovery.recover(grad, coeff, direction, basis, scale, state)
    return new, state if moments is None else recovery.observe(basis, moments, state)


def is_stored(subspace: Any) -> bool:
    return getattr(subspace, "stored", True)


def _safe_select(subspace: Subspace, key, grad, old, step):
    """A new basis with the signs of the old one, which an unusable gradient keeps."""
    if not is_stored(subspace):
        return subspace.select(key, grad, old, step)  # as it will be drawn again
    largest = jnp.max(jnp.abs(grad), axis=(-2, -1), keepdims=True)
    usable = jnp.isfinite(largest) & (largest > 0)
    inverse, _ = linalg.power_of_two(jnp.where(usable, largest, 0))
    new = subspace.select(key, jnp.where(usable, grad * inverse, 0), old, step)
    inner_product = jnp.sum(new * old, axis=-2, keepdims=True)
    new = jnp.where(inner_product < 0, -new, new)
    # In a stack of which others start, a matrix without a usable gradient starts too,
    # anywhere: with a basis of zero it would stand still until the next refresh.
    unset = jnp.all(old == 0, axis=(-2, -1), keepdims=True)
    usable |= unset & jnp.any(usable)
    usable &= jnp.all(jnp.isfinite(new), axis=(-2, -1), keepdims=True)
    return jnp.where(usable, new, old)
