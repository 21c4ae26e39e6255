"""Adam on moments in bytes, in passes of which none stores a moment.

Between codecs, an optimizer of any kind is given moments and returns them, and XLA
stores both. Of Adam, known by its numbers, every pass forms them again: scales, codes
and update are each made of the gradient and the old codes.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._src.engines.order import wait
from lowrank_optax._src.kernels.adam import Adam, adam_step
from lowrank_optax._src.kernels.dispatch import active
from lowrank_optax._src.leaves.matrix import MatrixView
from lowrank_optax._src.parts.codec import BlockInt8, BlockInt8Code
from lowrank_optax._src.parts.part import compiled

Array = jax.Array


def leaves_in_bytes(coded: Mapping[tuple[str, int], tuple[Any, MatrixView]]) -> dict:
    """The block of each leaf whose moments are both in bytes, as `adam_in_bytes` takes.

    Args:
      coded: the codec of each field of each leaf, and how it sees it.
    """
    found = {}
    for (name, i), (mu, view) in coded.items():
        nu, _ = coded.get(("nu", i), (None, None))
        if (
            name == "mu"
            and isinstance(mu, BlockInt8)
            and mu.signed
            and nu == BlockInt8(False, mu.block)
            and view.compute_dtype == jnp.float32
        ):
            found[i] = mu.block
    return found


@compiled
def adam_in_bytes(
    parts: tuple[Adam, int], grad: Array, mu: BlockInt8Code, nu: BlockInt8Code, count
) -> tuple[Array, BlockInt8Code, BlockInt8Code]:
    """Adam's direction, in the gradient's dtype, and the new codes of both moments.

    A block whose new moments are not finite keeps the old ones.

    Args:
      parts: `Adam`, and the block of the codes.
      grad: (*batch, m, n), float32 or narrower.
      mu, nu: a signed and an unsigned code.
      count: of Adam's updates before.
    """
    adam, block = parts
    if active():
        from lowrank_optax._src.kernels.int8 import adam_in_blocks

        return adam_in_blocks(adam, block, grad, mu, nu, count)
    codecs = BlockInt8(True, block), BlockInt8(False, block)

    def step(grad, mu, nu):
        moments = (c.decode(x) for c, x in zip(codecs, (mu, nu), strict=True))
        return adam_step(grad.astype(jnp.float32), *moments, *adam.numbers(count))

    def scales(grad, *codes):
        moments = step(grad, *codes)[1:]
        return [c.measure(x) for c, x in zip(codecs, moments, strict=True)]

    given = grad, mu, nu
    direction = step(*given)[0].astype(grad.dtype)
    largest = scales(*_again(given))
    given, largest = _again((given, largest))
    # On CPU the direction comes first, or codes could not take the place of the old.
    ok = wait((largest[0] < jnp.inf) & (largest[1] < jnp.inf), [direction])
    moments = step(*given)[1:]
    mu, nu = (
        codec.accept(ok, codec.encode_by(scale, x), old)
        for codec, scale, x, old in zip(
            codecs, largest, moments, given[1:], strict=True
        )
    )
    return direction, mu, nu


def _again(tree):
    """The same, of which XLA's GPU backend forms anew what it would store.

    On a v5e that makes 45 words of 35, as every pass cuts the matrix to blocks anew.
    """
    return jax.lax.platform_dependent(
        tree, cuda=jax.lax.optimization_barrier, default=lambda x: x
    )
