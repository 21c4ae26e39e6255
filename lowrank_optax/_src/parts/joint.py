"""Subspaces that choose for many matrices at once, or are others by the step."""

import functools
from collections.abc import Sequence
from typing import Protocol, TypeGuard

import jax
from jaxtyping import Array

from lowrank_optax._src.parts.laws import Step, Subspace


class Joint(Subspace, Protocol):
    """A subspace that chooses for many matrices at once, where it is ``together``."""

    @property
    def together(self) -> bool:
        # What is derived and has a ``select`` of its own is asked for that.
        return type(self).select is Joint.select

    def select(self, key, grad, old, step):
        return self.select_each([key], [grad], [old], step)[0]

    def select_each(
        self,
        keys: Sequence[Array],
        grads: Sequence[Array],
        olds: Sequence[Array],
        step: Step,
    ) -> list[Array]:
        """As ``select`` of each matrix, with an entry for each in all lists."""
        ...


def is_joint(subspace: Subspace) -> TypeGuard[Joint]:
    """Whether many matrices may be asked for at once."""
    # By the type: what wraps a subspace may pass all other attributes on.
    has = hasattr(type(subspace), "select_each")
    return has and getattr(subspace, "together", False)


class Phased(Subspace, Protocol):
    """A subspace that is one of several ``phases``, by the step.

    An engine decides which before anything is made of a gradient: what a conditional
    takes is stored.
    """

    @property
    def phases(self) -> tuple[Subspace, ...]: ...

    def phase(self, step: Step) -> Array:
        """Which of them it is, an integer."""
        ...

    def select(self, key, grad, old, step):
        each = [functools.partial(x.select, key, grad, old, step) for x in self.phases]
        return jax.lax.switch(self.phase(step), each)


def is_phased(subspace: Subspace) -> TypeGuard[Phased]:
    # What is derived and has a ``select`` of its own is asked for that.
    return getattr(type(subspace), "select", None) is Phased.select


def phases(subspace: Subspace) -> tuple[Subspace, ...]:
    """What a subspace is at one step or another; one of these may be phased again."""
    return subspace.phases if is_phased(subspace) else (subspace,)


def select_each(
    subspace: Subspace,
    keys: Sequence[Array],
    grads: Sequence[Array],
    olds: Sequence[Array],
    step: Step,
) -> list[Array]:
    """New bases of many matrices: at once where the subspace does that, else each."""
    if is_joint(subspace):
        return subspace.select_each(keys, grads, olds, step)
    each = zip(keys, grads, olds, strict=True)
    return [subspace.select(key, g, old, step) for key, g, old in each]
