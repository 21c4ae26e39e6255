"""Adam, known by its numbers: what passes that know the optimizer need to see of it."""

import dataclasses
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
        decays = self.b1, self.b2
        # 1 - 0.999 has four digits in float32, if 0.999 is rounded to it before.
        fresh = (1 - b for b in decays)
        debias = (1 - b**t for b in decays)
        return *decays, *fresh, *debias, self.eps, self.eps_root


def adam_step(g, mu, nu, *numbers) -> tuple[Array, Array, Array]:
    """Direction and new moments, by `Adam.numbers`."""
    b1, b2, a1, a2, c1, c2, eps, eps_root = numbers
    mu = b1 * mu + a1 * g
    nu = b2 * nu + a2 * g * g
    return (mu / c1) / (jnp.sqrt(nu / c2 + eps_root) + eps), mu, nu
