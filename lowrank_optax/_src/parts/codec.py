"""How a matrix of optimizer state is stored between steps."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from lowrank_optax._src import linalg
from lowrank_optax._src.leaves.matrix import Dim
from lowrank_optax._src.linalg import random
from lowrank_optax._src.parts import compatible, int8_map
from lowrank_optax._src.parts.blocks import Blocks
from lowrank_optax._src.parts.checks import check_rank


class CastCode(NamedTuple):
    """A matrix in another dtype.

    Attributes:
      value: (*batch, m, n).
    """

    value: Float[Array, "*b m n"]


@dataclasses.dataclass(frozen=True)
class Cast:
    """Storage in a narrower float dtype; arithmetic stays in float32.

    bfloat16 is rounded stochastically: to nearest, a moment that decays by 0.999 would
    never change, as the product rounds back to where it was.

    Args:
      dtype: such as ``jnp.bfloat16`` (other dtypes round to nearest). Dtypes of fewer
        exponents than float32, such as ``jnp.float16``, store no second moments:
        small squares would become zero.
    """

    dtype: Any
    elementwise: ClassVar[bool] = True

    @property
    def lacks(self) -> tuple[str, ...]:
        least = jnp.finfo(self.dtype).minexp
        return (compatible.ALL_SIZES,) if least > jnp.finfo(jnp.float32).minexp else ()

    def init(self, view):
        return CastCode(view.zeros("m", "n", dtype=self.dtype))

    def encode(self, key, x, old):
        if self.dtype == jnp.bfloat16:
            bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
            noise = random.bits(key, x.shape) >> 16
            down = (bits + noise) & jnp.uint32(0xFFFF0000)
            rounded = jax.lax.bitcast_convert_type(down, jnp.float32)
            x = jnp.where(jnp.isfinite(rounded), rounded, x)
        return CastCode(x.astype(self.dtype))

    def decode(self, code):
        return linalg.at_least_float32(code.value)


class BlockInt8Code(NamedTuple):
    """A matrix as bytes and the largest magnitude of each block.

    Attributes:
      index: (*batch, m, n), into the map.
      largest: (*batch, m, n / block) where blocks fit into rows, else (*batch, blocks).
    """

    index: UInt8[Array, "*b m n"]
    largest: Float[Array, "..."]


@dataclasses.dataclass(frozen=True)
class BlockInt8:
    """Block-wise dynamic quantization (Dettmers et al. 2022): a byte a number.

    Each block is divided by its largest magnitude and rounded to the nearest of 256
    numbers: 0, 1, and in each of seven decades the midpoints of a linear grid whose
    resolution doubles from decade to decade. Blocks run along the rows, over their
    ends only where ``block`` does not divide the row. A matrix takes ``m n`` bytes and
    4 for each started block.

    Args:
      signed: whether the map has negative numbers; without, it is twice as fine.
      block: numbers a block.
    """

    signed: bool
    block: int = 256
    elementwise: ClassVar[bool] = True

    def __post_init__(self):
        check_rank(self.block, "block")

    @property
    def nonnegative(self) -> bool:
        """Whether it decodes to non-negative numbers only."""
        return not self.signed

    @property
    def lacks(self) -> tuple[str, ...]:
        return () if self.signed else (compatible.SIGNS,)

    def init(self, view):
        index = view.zeros("m", "n", dtype=jnp.uint8)
        blocks: tuple[Dim, ...] = (-(-view.m * view.n // self.block),)
        if view.n % self.block == 0:
            blocks = ("m", ("n", view.n // self.block))
        return BlockInt8Code(index, view.zeros(*blocks, dtype=jnp.float32))

    def encode(self, key, x, old):
        return self.encode_by(self.measure(x), x)

    def measure(self, x: Array) -> Array:
        """The scales of a matrix, without which it cannot be encoded."""
        blocks = Blocks.of(x, self.block)
        (largest,) = blocks.largest([blocks.cut(x)])
        return blocks.store(largest)

    def encode_by(self, largest: Array, x: Array) -> BlockInt8Code:
        """`encode` with the scales known."""
        blocks = Blocks.of(x, self.block)
        (scales,) = blocks.spread([blocks.load(largest)])
        index = int8_map.nearest(blocks.cut(x), scales, self.signed)
        return BlockInt8Code(blocks.join(index), largest)

    def decode(self, code):
        blocks = Blocks.of(code.index, self.block)
        unit = int8_map.decode(blocks.cut(code.index), self.signed)
        (scales,) = blocks.spread([blocks.load(code.largest)])
        return blocks.join(unit * scales)


class PackedInt4Code(NamedTuple):
    """A matrix in half bytes and the largest magnitude of each block.

    Attributes:
      pairs: (*batch, m, ceil(n / 2)), two columns a byte, the first in its lower half.
      largest: (*batch, ceil(m / block), n), of the blocks of each column.
    """

    pairs: UInt8[Array, "*b m k"]
    largest: Float[Array, "*b k n"]


# Half bytes in two's complement, so that a byte of zero is two zeros. -8 is not used.
_INT4 = np.array([*range(8), *range(-8, 0)], np.float32) / 7


@dataclasses.dataclass(frozen=True)
class PackedInt4:
    """Block-wise linear quantization to the 15 numbers -7/7 ... 7/7: half a byte each.

    Blocks run down the columns, each divided by its largest magnitude, so that the
    columns of a basis are scaled one by one. What was decoded is encoded to the same
    code again: a basis that stays is not worn off from step to step. A matrix takes
    ``m ceil(n / 2)`` bytes and 4 for each started block of each column.

    Args:
      block: numbers a block.

    >>> import optax, lowrank_optax as lro
    >>> galore = lro.galore_project(optax.scale_by_adam(), rank=64)
    >>> tx = lro.compress_state(galore, {"basis": lro.PackedInt4()})
    """

    block: int = 256
    elementwise: ClassVar[bool] = True
    lacks: ClassVar[tuple[str, ...]] = (compatible.ALL_SIZES,)

    def __post_init__(self):
        check_rank(self.block, "block")

    def init(self, view):
        pairs = view.zeros("m", ("n", -(-view.n // 2)), dtype=jnp.uint8)
        blocks = -(-view.m // self.block)
        return PackedInt4Code(pairs, view.zeros(("m", blocks), "n", dtype=jnp.float32))

    def encode(self, key, x, old):
        *batch, m, n = x.shape
        even = [(0, 0)] * len(batch)
        blocks = jnp.pad(x, [*even, (0, -m % self.block), (0, 0)])
        blocks = blocks.reshape(*batch, -1, self.block, n)
        largest = linalg.magnitude(blocks, axis=-2)[..., 0, :]
        divisor = jnp.where(largest > 0, largest, 1.0)
        unit = x / self._spread(divisor, m)
        numbers = jnp.round(7 * unit).astype(jnp.int8).astype(jnp.uint8) & 15
        numbers = jnp.pad(numbers, [*even, (0, 0), (0, n % 2)])
        pairs = numbers[..., ::2] | numbers[..., 1::2] << 4
        return PackedInt4Code(pairs, largest.astype(jnp.float32))

    def decode(self, code):
        *_, m, half = code.pairs.shape
        halves = jnp.stack([code.pairs & 15, code.pairs >> 4], axis=-1)
        index = halves.reshape(*code.pairs.shape[:-1], 2 * half)
        index = index[..., : code.largest.shape[-1]]  # without what made n even
        return jnp.asarray(_INT4)[index] * self._spread(code.largest, m)

    def _spread(self, largest: Array, m: int) -> Array:
        """The number of its block for each entry, (*batch, m, n)."""
        return jnp.repeat(largest, self.block, axis=-2)[..., :m, :]
