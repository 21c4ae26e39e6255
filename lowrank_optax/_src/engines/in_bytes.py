"""Adam on moments in bytes, in passes of which none stores a moment.

Between codecs, an optimizer of any kind is given moments and returns them, and XLA
stores both. Of Adam, known by its numbers, every pass forms them again: scales, codes
and update are each made of the gradient and the old codes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax._src.engines.order import Order, wait
from lowrank_optax._src.kernels.adam import Adam, renewed, step_in_blocks
from lowrank_optax._src.kernels.dispatch import active
from lowrank_optax._src.leaves.matrix import MatrixView
from lowrank_optax._src.linalg.products import kept_apart
from lowrank_optax._src.linalg.slabs import in_slabs
from lowrank_optax._src.parts import int8_map
from lowrank_optax._src.parts.blocks import Blocks
from lowrank_optax._src.parts.codec import BlockInt8, BlockInt8Code
from lowrank_optax._src.parts.part import compiled


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


def step_in_bytes(
    adam: Adam,
    coded: Mapping[tuple[str, int], tuple[Any, MatrixView]],
    grads: Sequence[Array],
    codes: Mapping[int, Mapping[str, Any]],
    count: Array,
) -> tuple[dict[int, Array], dict[int, dict[str, BlockInt8Code]]]:
    """Directions and new codes of the leaves whose moments are both in bytes.

    Args:
      adam: the numbers of the optimizer.
      coded: as of `leaves_in_bytes`.
      grads: of all leaves.
      codes: of all leaves, by field.
      count: of Adam's updates before.
    """
    order, out, new = Order(), {}, {}
    for i, block in leaves_in_bytes(coded).items():
        view, own, grad = coded["mu", i][1], order.start(codes[i]), grads[i]
        parts, matrix = (adam, block), view.matrix(grad, grad.dtype)
        direction, mu, nu = adam_in_bytes(parts, matrix, own["mu"], own["nu"], count)
        out[i], new[i] = view.leaf(direction, grad.dtype), {"mu": mu, "nu": nu}
        order.end(new[i])
    return out, new


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
    blocks, signs = Blocks.of(grad, block), (True, False)
    codes = list(zip(signs, (mu, nu), strict=True))
    given = (
        blocks.cut(grad),
        *(blocks.cut(x.index, int8_map.zero(signed)) for signed, x in codes),
        *(blocks.load(x.largest) for _, x in codes),
    )
    numbers = adam.numbers(count)

    def plain():
        return _without_kernels(blocks, given, numbers)

    if active(grad):
        from lowrank_optax._src.kernels.int8 import adam_in_blocks

        cols = grad.shape[-1] if grad.shape[-1] % block == 0 else block
        results = adam_in_blocks(given, cols, numbers, plain)
    else:
        results = plain()
    direction, *index = map(blocks.join, results[:3])
    new_mu, new_nu = map(BlockInt8Code, index, map(blocks.store, results[3:]))
    return direction, new_mu, new_nu


def _without_kernels(
    blocks: Blocks, given: tuple[Array, ...], numbers: Sequence[Any]
) -> list[Array]:
    """Direction, bytes and scales, of what is cut to `Blocks`."""

    def passes(*given):
        return _in_passes(blocks, given, numbers)

    def slabs(*given):
        return _in_slabs(blocks, given, numbers)

    if blocks.shape[-1] % blocks.block:
        return passes(*given)
    return jax.lax.platform_dependent(*given, tpu=slabs, default=passes)


def _in_slabs(
    blocks: Blocks, given: tuple[Array, ...], numbers: Sequence[Any]
) -> list[Array]:
    """Some rows at a time, for TPU.

    A scale reaches its block there only by a copy of the matrix in another layout. In
    slabs, a matrix of LLaMA-7B moves 7 words a weight on a v5e instead of 33, with 172
    MiB of temporaries, its update, instead of 1,248.
    """

    def step(fixed, kept):
        (grad,), (_, *codes) = fixed, kept
        cut = dataclasses.replace(blocks, shape=grad.shape)
        old = [*map(cut.cut, codes[:2]), *map(cut.load, codes[2:])]
        each = *old[:2], *cut.spread(old[2:])
        direction, *moments = step_in_blocks(cut.cut(grad), *each, *numbers)
        new = renewed(moments, cut.largest(moments), old, cut.spread)
        direction = cut.join(direction).astype(grad.dtype)
        return [direction, *map(cut.join, new[:2]), *map(cut.store, new[2:])]

    grad, *bytes_ = map(blocks.join, given[:3])
    scales = map(blocks.store, given[3:])
    found = in_slabs(step, [grad], [jnp.zeros_like(grad), *bytes_, *scales])
    return [*map(blocks.cut, found[:3]), *map(blocks.load, found[3:])]


def _in_passes(
    blocks: Blocks, given: tuple[Array, ...], numbers: Sequence[Any]
) -> list[Array]:
    """A pass over the whole matrix for each result, and one for the scales."""

    def step(given):
        *cut, mu, nu = given
        return step_in_blocks(*cut, *blocks.spread([mu, nu]), *numbers)

    direction = step(given)[0].astype(given[0].dtype)
    # Moments would be stored for all passes. Not on TPU: every pass cuts the matrix to
    # blocks anew there, and a step moves 45 words a weight on a v5e instead of 35.
    moments = step(kept_apart(given))[1:]
    given, largest = kept_apart((given, blocks.largest(moments)))
    # On CPU the direction comes first, or codes could not take the place of the old.
    largest = wait(largest, [direction])
    new = renewed(step(given)[1:], largest, given[1:], blocks.spread)
    return [direction, *new]
