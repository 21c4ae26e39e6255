"""Adam, known by its numbers: what passes that know the optimizer need to see of it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax._src.parts import int8_map


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


def step_in_blocks(g, mu_index, nu_index, mu_largest, nu_largest, *numbers):
    """`adam_step` on blocks (..., block) of moments in bytes, their scales (..., 1)."""
    return adam_step(
        g.astype(jnp.float32),
        int8_map.decode(mu_index, True) * mu_largest,
        int8_map.decode(nu_index, False) * nu_largest,
        *numbers,
    )


def both_finite(largest: Sequence[Array]) -> Array:
    """Of which blocks both moments are finite, by their scales."""
    mu, nu = largest
    return (mu < jnp.inf) & (nu < jnp.inf)


def renewed(
    moments: Sequence[Array],
    largest: Sequence[Array],
    old: Sequence[Array],
    spread: Callable[[Sequence[Array]], Sequence[Array]] = lambda scales: scales,
) -> list[Array]:
    """New bytes and scales of both moments; of blocks that are not finite the old ones.

    Args:
      moments, largest: of blocks.
      old: bytes and scales.
      spread: brings what blocks have to their numbers.
    """
    each = spread(largest)
    signs = zip(moments, each, (True, False), strict=True)
    index = [int8_map.nearest(*x) for x in signs]
    masks = (both_finite(each),) * 2 + (both_finite(largest),) * 2
    new = zip(masks, (*index, *largest), old, strict=True)
    return [jnp.where(*x) for x in new]
