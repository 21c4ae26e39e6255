"""Arguments that many factories check alike."""

import math
import operator
from typing import Any, get_args

import jax
import numpy as np


def check_number(value: Any, name: str) -> None:
    """Refuse a schedule where a number belongs, and say where it is taken."""
    if callable(value):
        raise TypeError(
            f"`{name}` must be a number, got the function {value!r}. For a schedule "
            "use lowrank_optax.inject_hyperparams, as in "
            f"inject_hyperparams(galore_adamw)(learning_rate=0.01, {name}=schedule)."
        )


def check_range(
    value: Any,
    name: str,
    least: float,
    most: float = math.inf,
    *,
    above: bool = False,
    because: str = "",
) -> None:
    """Refuse a number outside of [least, most], or what is not ``above`` the least.

    What is traced is taken to be inside.
    """
    if isinstance(value, np.ndarray) and not value.ndim:
        value = value.item()
    if not isinstance(value, (int, float, np.number)):
        return
    if least <= value <= most and not (above and value == least):
        return
    if most < math.inf:
        bounds = f"in {'(' if above else '['}{least}, {most}]"
    else:
        bounds = f"above {least}" if above else f"at least {least}"
    raise ValueError(f"`{name}` must be {bounds}, got {value}{because}.")


def check_choice(value: Any, name: str, choices: Any) -> None:
    """Refuse what is none of the values of a Literal."""
    known = get_args(choices)
    if value not in known:
        raise ValueError(
            f"Unknown {name} {value!r}: it must be one of {', '.join(known)}."
        )


def check_rank(rank: Any, name: str = "rank", least: int = 1) -> int:
    """A rank as a positive int, or an error that says what would be right."""
    try:
        # An array of JAX would be concrete here, and not in an update.
        wrong = isinstance(rank, (bool, jax.Array))
        number = None if wrong else operator.index(rank)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(
            f"`{name}` must be a Python int, as it decides shapes; got {rank!r} of "
            f"type {type(rank).__name__}. To inject hyperparameters, use "
            "lowrank_optax.inject_hyperparams, which keeps it static."
        )
    check_range(number, name, least)
    return number
