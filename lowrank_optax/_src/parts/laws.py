"""The protocols of the parts, and their laws. A method is a choice of parts.

Every part is a frozen dataclass; its numbers may be arrays, which become arguments of
what is compiled. An engine owns ranks, sides, scales, signs, keys and the safety of the
state; a part owns only what is its own. Matrices arrive as ``(*batch, m, n)`` in
float32 at least, basis side on the left; write ``*b m n`` code with ``@``, ``.mT`` and
``...``, never ``vmap``. What a part requires of the others beyond their laws, or lacks
itself, it may say: see `compatible`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int, Key

from lowrank_optax._src.leaves.matrix import MatrixView
from lowrank_optax._src.leaves.roles import Known
from lowrank_optax._src.linalg.products import Lying

Step = Int[Array, ""]


@runtime_checkable
class Subspace(Protocol):
    """Which subspace the gradient is projected to.

    A class attribute ``stored = False`` says that the basis follows from the key alone:
    the state then keeps the step of its drawing, and the basis is drawn again wherever
    it is needed. Then only the shape and dtype of ``old`` may be used.

    One that has a true ``together`` chooses for many matrices at once, so that their
    small problems are common calls: by ``select_each(keys, grads, olds, step)``, lists
    with an entry for each matrix. It is asked so where they are due at the same steps,
    see `Refresh`.
    """

    def select(
        self,
        key: Key[Array, "*b"],
        grad: Float[Array, "*b m n"],
        old: Float[Array, "*b m r"],
        step: Step,
    ) -> Float[Array, "*b m r"]:
        """A new basis for ``grad``, which comes on its own scale.

        Law: columns orthonormal to 1e-5 or exactly zero, finite for any finite
        ``grad``; one that is not finite is never accepted. ``old`` is the basis to be
        replaced, zero at the start. ``key`` is one for each matrix; see
        `lowrank_optax.linalg.draw`.
        """
        ...


class Seen(NamedTuple):
    """What a step shows of the matrices of a leaf, of shape ``(*batch,)`` each.

    Attributes:
      size: the Frobenius norm of the projected gradient.
      whole: that of the gradient itself.
      chance: the share of ``whole**2`` that a basis of this rank has of noise that has
        no direction, r / m. r counts the columns of the basis that are not zero.
      overlap: ``||new^T old||_F^2 / r``, 1 if not due. It is 0 where there is nothing
        to compare: no old basis, or a gradient that is zero or not finite, which leaves
        the old one. r counts those of the old basis.
    """

    size: Array
    whole: Array
    chance: Array
    overlap: Array


@runtime_checkable
class Refresh(Protocol):
    """When the basis is renewed; step 0 is always due.

    A rule by which all leaves are due at the same steps may say so by
    ``in_step = True``: they are then renewed together. A leaf that has had no usable
    gradient yet is due besides.

    A rule that goes by the step alone has one scalar predicate for all matrices of a
    leaf; one that looks at gradients decides for each matrix of a stack by itself, with
    predicates and states of the batch's shape.
    """

    def init(self, view: MatrixView, phase: float) -> Any:
        """A NamedTuple of arrays, or ``optax.MaskedNode()`` for none.

        ``phase`` in [0, 1) spreads the leaves by cost.
        """
        ...

    def due(self, state: Any, step: Step) -> Bool[Array, "*b"]:
        """Whether to renew now."""
        ...

    def after(self, state: Any, due: Bool[Array, "*b"], seen: Seen) -> Any:
        """The next state, arrays shaped as before."""
        ...


@runtime_checkable
class Transfer(Protocol):
    """What becomes of the inner optimizer's moments when the basis is renewed."""

    def carry(
        self,
        moments: dict[str, Array],
        overlap: Float[Array, "*b r r"],
        known: Mapping[str, Known],
    ) -> dict[str, Array]:
        """The moments in the new basis, by ``overlap = new^T old``.

        ``moments`` maps state field paths to arrays of the leaf, (\\*b, r, n) or of
        another shape; ``known`` says what each field is, by the class of the state that
        it stands in: a "first" moment, linear in the gradient, a "second" one,
        quadratic in it, an array of a "code", or None where nothing tells. Law: second
        moments stay >= 0.
        """
        ...


@runtime_checkable
class Recovery(Protocol):
    """What is done with what the projection leaves out; it may be an `Observer`."""

    def init(self, view: MatrixView) -> Any:
        """A NamedTuple of arrays, or ``optax.MaskedNode()`` for none."""
        ...

    def prepare(self, grad: Float[Array, "*b m n"], state: Any) -> Array:
        """The gradient to project."""
        ...

    def recover(
        self,
        grad: Lying,
        coeff: Float[Array, "*b r n"],
        direction: Float[Array, "*b r n"],
        basis: Float[Array, "*b m r"],
        scale: Any,
        state: Any,
    ) -> tuple[Lying | Float[Array, "*b m n"], Any]:
        """The full update from ``coeff = basis^T grad`` and the inner's ``direction``.

        ``scale`` multiplies ``basis @ direction`` only. ``grad.matrix`` is the
        gradient; what is made of it number by number moves less memory if it is made of
        ``grad.array``, and returned as ``grad.of(...)``.
        """
        ...


@runtime_checkable
class Observer(Recovery, Protocol):
    """A recovery that looks at the inner optimizer's moments before some updates.

    As renewals are, these are meant to be rare: they share one conditional.
    """

    def ready(self, state: Any) -> Bool[Array, ""]:
        """Whether to look now."""
        ...

    def observe(
        self,
        basis: Float[Array, "*b m r"],
        moments: dict[str, Array],
        known: Mapping[str, Known],
        state: Any,
    ) -> Any:
        """The state after a look at the moments, told as in `Transfer.carry`."""
        ...


@runtime_checkable
class Codec(Protocol):
    """How a state matrix is stored between steps.

    A codec whose code needs numbers of the whole matrix first, such as scales, may have
    ``measure(x)`` for these and ``encode_by(measured, x)``. Whether to accept a code is
    then known before it is written. ``elementwise = True`` says that a codec needs no
    rows and columns.
    """

    def init(self, view: MatrixView) -> NamedTuple:
        """The code of zero. Law: ``decode(init)`` is zero, as moments start."""
        ...

    def encode(self, key: Key[Array, "*b"], x: Array, old: Any) -> NamedTuple:
        """The code of ``x``; ``old`` is the code that it replaces.

        ``key`` is one for each matrix, and another one for each field of a leaf, unless
        the codec has an attribute ``one_key = True``.
        """
        ...

    def decode(self, code: Any) -> Array:
        """The matrix of a code. Law: a non-negative codec decodes to >= 0."""
        ...


@runtime_checkable
class Rule(Protocol):
    """A whole update rule on one matrix, for `leafwise`.

    A rule whose state needs a first gradient may have ``unset(state)``, a scalar
    predicate, and ``begin(grad, state)``, what this gradient gives by field; one
    conditional a step asks all matrices. One that may save nothing at some matrices may
    have ``state_sizes(view)``: how many numbers the state of a matrix has, and how many
    at full rank. Where the first is not smaller, the dense optimizer takes the leaf.
    """

    def init(self, view: MatrixView) -> NamedTuple:
        """State by field; a field that the dense optimizer has too is kept there."""
        ...

    def update(
        self,
        key: Key[Array, "*b"],
        step: Step,
        grad: Float[Array, "*b m n"],
        state: Any,
    ) -> Any:
        """``(update, next state)``, shaped as ``grad`` and ``state``; ``step`` from 0.

        ``grad`` is in float32.
        """
        ...


@runtime_checkable
class StagedRule(Protocol):
    """A `Rule` in stages: thin factors, the matrix, thin factors, and so on.

    Thin stages see all matrices of a model at once, so that their small problems are
    solved in common; wide ones are all that reads a gradient, one matrix after the
    other. Each wide stage comes with the thin one behind it:

    * wide ``(step, grad, state, given) -> (update, found)`` of one matrix, with
      ``grad`` and the update as `Lying`, the update None in all but one of them;
    * thin ``(found, states, count) -> given``, lists with an entry for each matrix; the
      last gives the next states. Law: these are finite where the old ones are, as a
      leaf whose new state is not keeps the old one.
    """

    @property
    def stages(self) -> tuple[tuple[Callable[..., Any], Callable[..., Any]], ...]: ...

    def dense(self, grad: Array, given: Any) -> bool:
        """Whether a wide stage makes a matrix of full size and reads it twice.

        Such leaves are taken one after the other. ``grad`` is the leaf's own, of which
        no number may be looked at, and ``given`` what `start` made.
        """
        ...

    def init(self, view: MatrixView) -> NamedTuple:
        """As of `Rule`."""
        ...

    def start(
        self, keys: list[Array], states: list[Any], count: Step
    ) -> tuple[list[Any], list[Any]]:
        """The states as wide stages see them, and what the first one is given.

        ``count`` is of the steps before. Thin stages have the states as they are kept.
        """
        ...
