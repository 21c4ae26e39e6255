"""Arguments that many factories check alike."""

import operator
from typing import Any

import jax


def check_number(value: Any, name: str) -> None:
    """Refuse a schedule where a number belongs, and say where it is taken."""
    if callable(value):
        raise TypeError(
            f"`{name}` must be a number, got the function {value!r}. For a schedule "
            "use lowrank_optax.inject_hyperparams, as in "
            f"inject_hyperparams(galore_adamw)(learning_rate=0.01, {name}=schedule)."
        )


def check_rank(rank: Any, name: str = "rank") -> int:
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
    if number < 1:
        raise ValueError(f"`{name}` must be at least 1, got {number}.")
    return number
