"""What becomes of the inner optimizer's moments when the basis is renewed."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from lowrank_optax._src.leaves.fields import field_name, is_part_of_code
from lowrank_optax._src.leaves.roles import FIRST_MOMENTS, SECOND_MOMENTS
from lowrank_optax._src.linalg import matmul
from lowrank_optax._src.parts import compatible


@dataclasses.dataclass(frozen=True)
class Keep:
    """Moments stay as they are, as in the GaLore code.

    The engine gives each new basis vector the sign of the one that it replaces, which
    undoes the arbitrary signs of singular vectors, if not their order.

    >>> import optax, lowrank_optax as lro
    >>> tx = lro.galore_project(optax.scale_by_adam(), rank=4, transfer=lro.Keep())
    """

    requires: ClassVar[tuple[str, ...]] = (compatible.ALIGNED,)

    def carry(self, moments, overlap):
        return moments


@dataclasses.dataclass(frozen=True)
class Reset:
    """Moments start again from zero.

    >>> import optax, lowrank_optax as lro
    >>> tx = lro.galore_project(optax.trace(0.9), rank=4, transfer=lro.Reset())
    """

    def carry(self, moments, overlap):
        _refuse_codes(moments, self)
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
        known = isinstance(self.coverage, (int, float))
        if known and not 0 < self.coverage <= 1:
            raise ValueError(
                f"`coverage` must be above 0 and at most 1, got {self.coverage}."
            )

    def carry(self, moments, overlap):
        _refuse_codes(moments, self)
        r = overlap.shape[-1]
        square = overlap * overlap
        covered = jnp.sum(square, axis=-1, keepdims=True)
        square = square / jnp.maximum(covered, self.coverage)
        carried = {}
        widths = {
            x.shape[-1]
            for name, x in moments.items()
            if field_name(name) in FIRST_MOMENTS and x.ndim == overlap.ndim
        }
        for name, x in moments.items():
            rows = field_name(name) == "v_row" and x.shape[-1] == r
            if field_name(name) in FIRST_MOMENTS.union(self.first):
                carried[name] = matmul(overlap, x)
            elif field_name(name) in SECOND_MOMENTS.union(self.second):
                if rows:
                    carried[name] = matmul(square, x[..., None])[..., 0]
                elif x.ndim == overlap.ndim and x.shape[-2] == r:
                    carried[name] = matmul(square, x)
                elif widths and r not in widths and x.shape[-2:] == (1, r):
                    field = f"the state field '{name}' of shape {x.shape}"
                    need = "second moments whose rows are the basis vectors"
                    raise compatible.cannot_use("Rotate", field, "it", need, "that")
                else:
                    carried[name] = x
            elif x.ndim == overlap.ndim and x.shape[-2] == r:
                raise ValueError(
                    f"Cannot rotate the inner optimizer's state field '{name}' of "
                    f"shape {x.shape}: its name does not tell whether it is a first or "
                    "a second moment. Name it in Rotate(first=...) or "
                    "Rotate(second=...), or use Keep() or Reset()."
                )
            else:
                carried[name] = x
        return carried


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

    def carry(self, moments, overlap):
        names = {name for name in moments if field_name(name) not in SECOND_MOMENTS}
        return moments | Rotate().carry({k: moments[k] for k in names}, overlap)


def _refuse_codes(moments, transfer) -> None:
    for name in filter(is_part_of_code, moments):
        kind = type(transfer).__name__
        raise ValueError(
            f"Cannot use {kind} around compressed state: {kind} requires moments as "
            f"matrices, and '{name}' does not provide one. Put compress_state and its "
            "like outside: compress_state(project_gradients(...), ...)."
        )
