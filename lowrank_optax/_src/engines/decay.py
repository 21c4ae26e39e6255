"""Whether an optimizer adds weights to its updates, as weight decay does."""

import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax.extend import core

from lowrank_optax._src.leaves.paths import flatten


class Kind(enum.IntEnum):
    """What a value is where gradients and all that was gathered of them are zero."""

    ZERO = 0
    OTHER = 1
    WEIGHTS = 2  # made of weights


# Results are zero where all operands are.
_KEEP_ZERO = frozenset(
    "abs add add_any broadcast_in_dim clamp concatenate conj convert_element_type copy "
    "dynamic_slice imag integer_pow max min neg pad real reduce_max reduce_min "
    "reduce_precision reduce_sum reshape select_n sign sin slice sqrt square squeeze "
    "stop_gradient sub tan tanh transpose".split()
)

# Results are zero where any operand is.
_PRODUCTS = frozenset(["mul", "dot_general"])


def adds_weights(
    jaxpr: core.Jaxpr, gradients: Iterable[core.Var], weights: Iterable[core.Var]
) -> list[bool]:
    """Which results of an update's program would be made of weights alone.

    A weight that only multiplies a gradient, as in a trust ratio, makes none.

    Args:
      jaxpr: the program of an update.
      gradients: what is zero: gradients and moments.
      weights: the parameters.
    """
    known = dict.fromkeys(gradients, Kind.ZERO) | dict.fromkeys(weights, Kind.WEIGHTS)
    return [kind is Kind.WEIGHTS for kind in _results(jaxpr, known)]


def check_no_decay(updates: Any, decayed: Sequence[int]) -> None:
    """Refuse weight decay that would see no more of the weights than is projected.

    Args:
      updates: a tree of gradients.
      decayed: the numbers of its leaves that are projected, and of whose weights the
        inner optimizer adds what it sees.
    """
    if not decayed:
        return
    paths, leaves, _ = flatten(updates)
    path, shape = "/".join(paths[decayed[0]]), leaves[decayed[0]].shape
    raise ValueError(
        f"Cannot decay the weights of '{path}' of shape {shape} in the inner "
        "optimizer: only their part in the subspace would shrink. Leave it out there, "
        "and chain optax.add_decayed_weights after the projection and before the "
        "learning rate, as the aliases with `weight_decay` do (lro.galore_adamw)."
    )


def _results(jaxpr: core.Jaxpr, known: Mapping[core.Var, Kind]) -> list[Kind]:
    kinds = dict(known)

    def kind(x: Any) -> Kind:
        if isinstance(x, core.Var):
            return kinds.get(x, Kind.OTHER)
        return Kind.OTHER if getattr(x.val, "ndim", 0) or x.val else Kind.ZERO

    for equation in jaxpr.eqns:
        read = [kind(x) for x in equation.invars]
        made = [_result(equation.primitive.name, read)] * len(equation.outvars)
        if programs := _programs(equation):
            branches = []
            for closed in programs:
                own = closed.jaxpr.invars
                # Before them, a conditional has what chooses the program.
                given = read[len(read) - len(own) :]
                found = _results(closed.jaxpr, dict(zip(own, given, strict=True)))
                branches.append(found)
            made = [max(same) for same in zip(*branches, strict=True)]
        kinds |= zip(equation.outvars, made, strict=True)
    return [kind(x) for x in jaxpr.outvars]


def _programs(equation: core.JaxprEqn) -> tuple[core.ClosedJaxpr, ...]:
    """The programs of which an equation runs one, once."""
    name, params = equation.primitive.name, equation.params
    if name == "cond":
        return tuple(params["branches"])
    if name in ("jit", "pjit"):
        return (params["jaxpr"],)
    return (params["call_jaxpr"],) if name == "custom_jvp_call" else ()


def _result(name: str, read: list[Kind]) -> Kind:
    if name in _PRODUCTS and Kind.ZERO in read:
        return Kind.ZERO
    if name == "div" and read[0] is Kind.ZERO:
        return Kind.ZERO
    if name == "select_n":
        read = read[1:]
    largest = max(read, default=Kind.OTHER)
    return largest if name in _KEEP_ZERO else max(largest, Kind.OTHER)
