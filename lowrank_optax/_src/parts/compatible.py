"""Which parts go together: what one requires of the others, and what these lack.

A part may have three attributes, tuples of the names below: ``requires``, what it needs
of the parts beside it; ``lacks``, what it does not have although others of its kind do;
``provides``, what none beside it need have. A subspace may have a ``least_rank``, a
``largest_rank`` and a ``check_matrix(view)``, which raises ValueError for a matrix that
it is not meant for. A part without these keeps its protocol's laws and requires no
more.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._src.leaves.matrix import MatrixView
from lowrank_optax._src.leaves.roles import Known
from lowrank_optax._src.parts.laws import Observer, Recovery, Transfer

ORTHONORMAL = "a basis with orthonormal columns"
CHOSEN = "a subspace that is chosen by the gradient"
ALIGNED = "basis vectors with the signs of those that they replace"
NAMED_SIDE = "side='left' or 'right', that of the input whatever its length"
SIGNS = "numbers of both signs"
NONNEGATIVE = "numbers that are never negative"
COEFFICIENTS = "a recovery that needs the projected gradient alone"
ALL_SIZES = "small numbers beside large ones"
INDEPENDENT = "columns that stay independent"


def check(part: Any, *others: Any) -> None:
    """Refuse a part beside others of which one lacks what it requires."""
    provided = {need for other in others for need in getattr(other, "provides", ())}
    for need in getattr(part, "requires", ()):
        for other in others:
            if need in getattr(other, "lacks", ()) and need not in provided:
                raise cannot_use(name(part), name(other), name(part), need, name(other))


def check_fits(subspace: Any, rank: int) -> None:
    """Refuse a subspace, or one inside of it, that is not meant for this rank."""
    for part in _nested(subspace):
        least, most = (getattr(part, f"{x}_rank", None) for x in ("least", "largest"))
        if not (least or 1) <= rank <= (most or rank):
            bound = f"most {most}" if most and rank > most else f"least {least}"
            need = f"a rank of at {bound}"
            raise cannot_use(name(part), f"rank {rank}", name(part), need, "that")


def check_matrix(subspace: Any, view: MatrixView) -> None:
    """Let a subspace, or one inside of it, refuse a matrix."""
    for part in _nested(subspace):
        if hasattr(type(part), "check_matrix"):
            part.check_matrix(view)


def check_moments(
    transfer: Transfer,
    recovery: Recovery,
    view: MatrixView,
    rank: int,
    moments: Mapping[str, Any],
    known: Mapping[str, Known],
) -> None:
    """Let parts refuse an inner optimizer's moments, by a run on shapes alone."""

    def use(moments):
        transfer.carry(moments, jnp.zeros((*view.batch_shape, rank, rank)), known)
        if isinstance(recovery, Observer):
            basis = view.zeros("m", rank)
            recovery.observe(basis, moments, known, recovery.init(view))

    jax.eval_shape(use, moments)


def cannot_use(
    part: str, other: str, user: str, need: str, lacking: str, remedy: str = ""
) -> ValueError:
    """The error of every combination without meaning."""
    return ValueError(
        f"Cannot use {part} with {other}: {user} requires {need}, {lacking} does not "
        f"provide it. {remedy}".rstrip()
    )


def name(part: Any) -> str:
    return type(part).__name__


def _nested(part: Any) -> Iterator[Any]:
    yield part
    if dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            yield from _nested(getattr(part, field.name))
