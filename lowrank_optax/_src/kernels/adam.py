"""Adam, known by its numbers: what kernels of an optimizer need to see of it."""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Adam:
    """The numbers of `optax.scale_by_adam`, which may be traced."""

    b1: Any
    b2: Any
    eps: Any
    eps_root: Any

    def numbers(self, count: Array) -> tuple[Any, ...]:
        """What `adam_step` needs beside arrays; ``count`` updates were made before."""
        t = optax.safe_increment(count)
        debias = 1 - self.b1**t, 1 - self.b2**t
        return self.b1, self.b2, self.eps, self.eps_root, *debias


def adam_step(g, mu, nu, b1, b2, eps, eps_root, c1, c2) -> tuple[Array, Array, Array]:
    """Direction and new moments."""
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g * g
    return (mu / c1) / (jnp.sqrt(nu / c2 + eps_root) + eps), mu, nu


def recognize(inner: optax.GradientTransformation) -> Adam | None:
    """The numbers of ``optax.scale_by_adam(...)``; None for anything else.

    An Optax transformation is a pair of functions that says nothing of itself. This
    reads the variables that the update function closes over, if it is Adam's function;
    should Optax name them otherwise one day, nothing is recognized and XLA is used.
    """
    update = inner.update
    if getattr(update, "__code__", None) is not _ADAM:
        return None
    names = inspect.getclosurevars(update).nonlocals
    fields = [field.name for field in dataclasses.fields(Adam)]
    if not {*fields, "nesterov", "mu_dtype"} <= set(names):
        return None
    if names["nesterov"] or names["mu_dtype"] is not None:
        return None
    return Adam(*(names[name] for name in fields))


_ADAM = getattr(optax.scale_by_adam().update, "__code__", object())
