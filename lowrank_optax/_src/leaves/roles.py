"""What the fields of an optimizer's state are: moments of the gradient, or else."""

from typing import Any, Literal

import jax

from lowrank_optax._src.leaves.matrix import MatrixView

# A first moment is linear in the gradient; a second one quadratic, so never negative.
Role = Literal["first", "second"]
# What is known of a field; "code" is an array of what is stored compressed.
Known = Role | Literal["code"] | None

# What these names mean in Optax's states, and in this library's.
FIRST_MOMENTS = frozenset({"mu", "trace", "ema", "m", "momentum", "exp_avg"})
SECOND_MOMENTS = frozenset({"nu", "v", "nu_max", "sum_of_squares", "v_row", "v_col"})

_FIRST: dict[str, Role] = {name: "first" for name in FIRST_MOMENTS}
_SECOND: dict[str, Role] = {name: "second" for name in SECOND_MOMENTS}

# Optax's states of which fields have other names, or names that mean something else.
_EXCEPTIONS: dict[str, dict[str, Role]] = {
    # The mean difference of gradients has a sign, the mean square is called n.
    "ScaleByAdanState": {"v": "first", "n": "second"},
    "ScaleByAdaDeltaState": {"e_g": "second", "e_x": "second"},
    "ScaleByAdemamixState": {"m1": "first", "m2": "first"},
    "ScaleBySimplifiedAdEMAMixState": {"n": "second"},
    "ScaleBySM3State": {"nu": "first"},
    # Curvature as it is estimated may be negative.
    "SophiaState": {"nu": "first"},
    "DAdaptAdamWState": {"exp_avg_sq": "second"},
    "MomoAdamState": {"exp_avg_sq": "second"},
    "ProdigyState": {"exp_avg_sq": "second"},
    "MadgradState": {"grad_sum_sq": "second"},
}


def role_of(holder: type | None, field: str) -> Role | None:
    """The role of a field of this name in a state of this class.

    Where a state is neither Optax's nor this library's, no name makes sure that the
    field is never negative.

    Args:
      holder: None for a field without entries.
      field: its own name.
    """
    role = (_FIRST | _SECOND).get(field)
    if holder is None or is_own(holder):
        return role
    if _package(holder) == "optax":
        return _EXCEPTIONS.get(holder.__name__, {}).get(field, role)
    return role if role == "first" else None


def is_own(holder: type) -> bool:
    """Whether a state is one of this library."""
    return _package(holder) == _package(MatrixView)


def _package(holder: type) -> str:
    return holder.__module__.partition(".")[0]


def holder_of(state: Any, key_path: tuple[Any, ...], field: str = "") -> type:
    """The class of the state in which a field of this name stands, on a path.

    Without a name, of the last one on the path.
    """
    holder = type(state)
    for key in key_path:
        if isinstance(key, jax.tree_util.GetAttrKey):
            holder = type(state)
            name, state = key.name, getattr(state, key.name)
        elif isinstance(key, jax.tree_util.SequenceKey):
            name, state = None, state[key.idx]
        else:  # that of a rule's fields in a dict is the state around
            name, state = key.key, state[key.key]
        if name == field:
            break
    return holder
