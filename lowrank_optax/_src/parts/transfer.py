"""What becomes of the inner optimizer's moments when the basis is renewed."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from lowrank_optax._src.leaves.fields import field_name
from lowrank_optax._src.linalg import matmul
from lowrank_optax._src.parts import compatible
from lowrank_optax._src.parts.checks import check_range


@dataclasses.dataclass(frozen=True)
class Keep:
    """Moments stay as they are, as in the GaLore code.

    The engine gives each new basis vector the sign of the one that it replaces, which
    undoes the arbitrary signs of singular vectors, if not their order.

    >>> import optax, lowrank_optax as lro
    >>> tx = lro.galore_project(optax.scale_by_adam(), rank=4, transfer=lro.Keep())
    """

    requires: ClassVar[tuple[str, ...]] = (compatible.ALIGNED,)

    def carry(self, moments, overlap, known):
        return moments


@dataclasses.dataclass(frozen=True)
class Reset:
    """Moments start again from zero.

    >>> import optax, lowrank_optax as lro
    >>> tx = lro.galore_project(optax.trace(0.9), rank=4, transfer=lro.Reset())
    """

    def carry(self, moments, overlap, known):
        _refuse_codes(moments, known, self)
        return {name: jnp.zeros_like(x) for name, x in moments.items()}


@dataclasses.dataclass(frozen=True)
class Rotate:
    """Moments in the new basis: ``C m`` and ``(C o C) v / c``, with ``C = new^T old``.

    ``(C o C) v`` is the variance of ``C x`` under a diagonal covariance, hence never
    negative, where ``C v`` would be in a quarter of its entries. Of a new direction the
    old basis covers the share ``c``, the row sums of ``C o C``, and knows no more of
    its variance: divided by that, it does not pass for small, which would make the
    steps after a refresh large (AR-17).

    Args:
      coverage: the least share that is divided by; 1 for ``(C o C) v`` itself.
      first: names of further state fields that are linear in the gradient.
      second: names of further state fields that are quadratic in it.

    >>> import optax, lowrank_optax as lro
    >>> tx = lro.galore_project(optax.scale_by_adam(), rank=4, transfer=lro.Rotate())
    """

    coverage: float = 0.1
    first: tuple[str, ...] = ()
    second: tuple[str, ...] = ()
    requires: ClassVar[tuple[str, ...]] = (compatible.ORTHONORMAL,)

    def __post_init__(self):
        check_range(self.coverage, "coverage", 0, 1, above=True)

    def carry(self, moments, overlap, known):
        _refuse_codes(moments, known, self)
        square = overlap * overlap
        covered = jnp.sum(square, axis=-1, keepdims=True)
        square = square / jnp.maximum(covered, self.coverage)
        told = {name: self._role(name, known) for name in moments}
        _refuse_columns(moments, overlap, told)
        carried = dict(moments)
        for name, x in moments.items():
            by = {"first": overlap, "second": square}.get(told[name])
            if by is None:
                _refuse_unknown(name, x, overlap)
            elif _is_along(x, overlap):
                carried[name] = matmul(by, x)
            elif self._is_factor(name) and x.shape == overlap.shape[:-1]:
                carried[name] = matmul(by, x[..., None])[..., 0]
        return carried

    def _role(self, name, known):
        """What a field is, by what the user says or else by what is known."""
        field = field_name(name)
        if field in self.first:
            return "first"
        return "second" if field in self.second else known[name]

    def _is_factor(self, name):
        """Whether a field may have a number for each basis vector, and no more."""
        return field_name(name) in {"v_row", *self.first, *self.second}


@dataclasses.dataclass(frozen=True)
class RotateFirst:
    """First moments as `Rotate` has them, ``C m``; second moments stay.

    For random projections whose columns are not orthonormal: all of them see the same
    variance on average, which ``C o C`` would inflate.

    >>> import optax, lowrank_optax as lro
    >>> tx = lro.flora_project(
    ...     optax.scale_by_adam(), rank=4, transfer=lro.RotateFirst()
    ... )
    """

    def carry(self, moments, overlap, known):
        rest = {name: x for name, x in moments.items() if known[name] != "second"}
        return moments | Rotate().carry(rest, overlap, known)


def _is_along(x, overlap) -> bool:
    """Whether the rows of a moment, or of each of a stack, are the basis vectors."""
    return x.ndim == overlap.ndim and x.shape[-2] == overlap.shape[-1]


def _refuse_unknown(name, x, overlap) -> None:
    if _is_along(x, overlap) or x.shape == overlap.shape[:-1]:
        raise ValueError(
            f"Cannot rotate the inner optimizer's state field '{name}' of shape "
            f"{x.shape}: nothing tells whether it is a first or a second moment. Name "
            "it in Rotate(first=...) or Rotate(second=...), or use Keep() or Reset()."
        )


def _refuse_columns(moments, overlap, told) -> None:
    """Refuse second moments that are one number for each basis vector, in a row.

    Where moments have r columns as well, nothing tells them apart.
    """
    r = overlap.shape[-1]
    widths = {
        x.shape[-1]
        for name, x in moments.items()
        if told[name] == "first" and x.ndim == overlap.ndim
    }
    for name, x in moments.items():
        whole = _is_along(x, overlap) or told[name] != "second"
        if not whole and widths and r not in widths and x.shape[-2:] == (1, r):
            field = f"the state field '{name}' of shape {x.shape}"
            need = "second moments whose rows are the basis vectors"
            raise compatible.cannot_use("Rotate", field, "it", need, "that")


def _refuse_codes(moments, known, transfer) -> None:
    for name in (name for name in moments if known[name] == "code"):
        kind = type(transfer).__name__
        raise ValueError(
            f"Cannot use {kind} around compressed state: {kind} requires moments as "
            f"matrices, and '{name}' does not provide one. Put compress_state and its "
            "like outside: compress_state(project_gradients(...), ...)."
        )
