"""What the gradient-space engine does at one matrix.

Gradients come as they lie in memory, and are seen as ``(*batch, m, n)`` inside of what
is compiled: a conditional would write out a transposed view that it is given.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax._src.engines import exchange
from lowrank_optax._src.engines.accept import accept_each, all_finite, tree_where
from lowrank_optax._src.engines.order import Order
from lowrank_optax._src.leaves.keys import Seed, matrix_keys
from lowrank_optax._src.leaves.matrix import MatrixView
from lowrank_optax._src.linalg import as_stored, project
from lowrank_optax._src.linalg.meshes import gathered
from lowrank_optax._src.linalg.products import Lying, power_of_two
from lowrank_optax._src.parts.laws import (
    Recovery,
    Refresh,
    Seen,
    Subspace,
    Transfer,
)
from lowrank_optax._src.parts.part import compiled

Moments = dict[str, Any]  # by the field of the inner optimizer's state


class Own(NamedTuple):
    """What the engine keeps of one matrix, as in `ProjectState`."""

    basis: jax.Array
    refresh: Any
    recovery: Any


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is static at one matrix; equal ones share a compiled body."""

    view: MatrixView
    subspace: Subspace
    transfer: Transfer
    recovery: Recovery
    rank: int

    def matrix(self, grad: jax.Array, own: Own) -> jax.Array:
        """The gradient that is projected."""
        return self.recovery.prepare(self.view.matrix(grad), own.recovery)

    def basis(self, own: Own, seed: Seed) -> jax.Array:
        """The basis as it is kept, or drawn again from the key of its step."""
        if is_stored(self.subspace):
            return own.basis
        view = self.view
        zeros = jnp.zeros((*view.batch_shape, view.m, self.rank), view.compute_dtype)
        key = matrix_keys(seed, own.basis, view.batch_shape)
        return self.subspace.select(key, zeros, zeros, jnp.zeros_like(own.basis))


class Renewal(NamedTuple):
    """What became of a basis.

    Attributes:
      basis: the new one if it was due, else the old one; of a subspace that is not
        stored, the step at which it was drawn.
      moments: of the inner optimizer, in this basis.
      share: of each matrix, see `Seen.overlap`.
      recovery: the recovery's state, once it has observed.
    """

    basis: jax.Array
    moments: Moments
    share: jax.Array
    recovery: Any


class Matrix(NamedTuple):
    """One matrix in an update.

    Attributes:
      parts: what is static.
      grad: as it lies in memory.
      own: what is kept of it; of this step once `renewed`.
      seed: of its keys.
      due: whether its basis was due, of a stack perhaps matrix by matrix.
      share: as of `Renewal`.
    """

    parts: Parts
    grad: jax.Array
    own: Own
    seed: Seed
    due: jax.Array | bool = False
    share: jax.Array | float = 1.0

    @property
    def low(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the projected gradient."""
        view, r = self.parts.view, self.parts.rank
        if is_stored(self.parts.subspace):
            r = self.own.basis.shape[-1]
        return jax.ShapeDtypeStruct((*view.batch_shape, r, view.n), view.compute_dtype)

    @property
    def unset(self) -> jax.Array:
        """Whether no usable gradient was seen yet: a stored basis is zero then."""
        stored = is_stored(self.parts.subspace)
        return jnp.all(self.own.basis[..., 0] == 0) if stored else jnp.array(False)

    def is_due(self, refresh: Refresh, step: jax.Array, first: Any) -> jax.Array:
        """Whether to renew, if this is the ``first`` gradient of a window.

        What has no basis yet is always due.
        """
        due = first & refresh.due(self.own.refresh, step)
        if not is_stored(self.parts.subspace):
            return any_of(due) | (first & (step == 0))
        return due | self.unset

    def renewed(self, now: Renewal, due: jax.Array) -> "Matrix":
        own = self.own._replace(basis=now.basis, recovery=now.recovery)
        return self._replace(own=own, due=due, share=now.share)

    def counted(self, refresh: Refresh, size: jax.Array, first: Any = True) -> Any:
        """The rule's state after a step whose projected gradients had these norms."""
        if not jax.tree.leaves(self.own.refresh):  # one that looks at nothing
            return self.own.refresh
        due, share = jnp.asarray(self.due), jnp.asarray(self.share)
        whole, chance = _looks(self.parts, self.grad, self.own, self.seed, size)
        seen = Seen(size, exchange.mean(whole), chance, share)
        after = refresh.after(self.own.refresh, due, seen)
        after = tree_where(due | first, after, self.own.refresh)
        # One by one: steps are counted whatever the norms are.
        return accept_each(after, self.own.refresh, len(self.parts.view.batch_shape))

    def in_turn(self, order: Order) -> "Matrix":
        """The same, not before the matrix stepped last has ended."""
        basis = order.start(self.own.basis)
        return self._replace(own=self.own._replace(basis=basis))

    def down(self) -> jax.Array:
        return _down(self.parts, self.grad, self.own, self.seed)

    def down_weight(self, weight: jax.Array) -> jax.Array:
        return _down_weight(self.parts, weight, self.own, self.seed)

    def up(
        self,
        scale: Any,
        coeff: jax.Array,
        direction: jax.Array,
        new: Moments,
        old: Moments,
    ) -> tuple[jax.Array, Any, Moments]:
        """The update, and of the recovery and the moments what is accepted."""
        parts = self.parts, scale
        return _up(parts, self.grad, self.own, self.seed, coeff, direction, new, old)


def any_of(due: jax.Array) -> jax.Array:
    """Whether a leaf is due, if one of its matrices is enough."""
    return jnp.any(due) if due.ndim else due


def is_stored(subspace: Subspace) -> bool:
    return getattr(subspace, "stored", True)


@compiled
def _looks(parts, grad, own, seed, size):
    """The norms of the gradients, and the share of noise in their bases.

    In units of the projected ones, as the largest number would take one more pass.
    """
    inverse, unit = power_of_two(jnp.where(size == 0, 1.0, size))
    scaled = parts.matrix(grad, own) * inverse[..., None, None]
    whole = jnp.sqrt(jnp.sum(scaled * scaled, axis=(-2, -1))) * unit
    return whole, used_columns(parts.basis(own, seed)) / parts.view.m


def used_columns(basis: jax.Array) -> jax.Array:
    """How many columns of each basis are not zero."""
    return jnp.sum(jnp.any(basis != 0, axis=-2), axis=-1)


@compiled
def _down(parts, grad, own, seed):
    return project(gathered(parts.basis(own, seed)), parts.matrix(grad, own))


@compiled
def _down_weight(parts, weight, own, seed):
    return project(parts.basis(own, seed), parts.view.matrix(weight))


@compiled
def _up(parts, grad, own, seed, coeff, direction, new, old):
    parts, scale = parts
    rule, basis = parts.recovery, gathered(parts.basis(own, seed))
    direction = gathered(direction)
    lying = parts.view.lying(grad)
    lying = lying.of(lying.order(rule.prepare(lying.matrix, own.recovery)))
    update, recovery = rule.recover(lying, coeff, direction, basis, scale, own.recovery)
    if isinstance(update, Lying):
        update = update.matrix
    # What is not finite must not stay in the state, and the moments of a leaf belong
    # together. The update itself is not looked at: nothing waits for it, so that it is
    # added to the weights where it is made.
    ok = all_finite((coeff, direction, new, recovery))
    recovery = tree_where(ok, recovery, own.recovery)
    update = as_stored(parts.view.leaf(update))
    return update, recovery, tree_where(ok, new, old)
