"""How a matrix is cut to blocks of numbers that share a scale."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lowrank_optax._src.linalg import meshes
from lowrank_optax._src.parts import int8_map


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of a matrix: along its rows, over their ends if they do not fit.

    On a mesh a block may lie on two devices, and a matrix cut to blocks would be
    gathered. There the matrix stays as it is; scales are found of parts of blocks, and
    brought to its numbers.

    Attributes:
      shape: (*batch, m, n).
      block: numbers of a block.
      part: so many of a block are on one device, wherever the columns are split; 0 if
        the matrix is cut.
    """

    shape: tuple[int, ...]
    block: int
    part: int = 0

    @classmethod
    def of(cls, x: Array, block: int) -> "Blocks":
        """Of an array of matrices."""
        devices, n = meshes.devices(x), x.shape[-1]
        part = math.gcd(block, n // math.gcd(n, devices))
        fits = part == block  # each device has whole blocks
        # Of tiny parts, each is compared with the blocks of a row for too long.
        tiny = n > 4 * block * part
        return cls(x.shape, block, 0 if devices == 1 or fits or tiny else part)

    def cut(self, x: Array, fill: int = 0) -> Array:
        """``(..., block)``, the last one filled; or the matrix as it is."""
        *batch, m, n = self.shape
        if self.part:
            return x
        if n % self.block == 0:  # no row is left, so no axis need be gathered
            return x.reshape(*batch, m, n // self.block, self.block)
        pad = [(0, 0)] * len(batch) + [(0, -m * n % self.block)]
        x = jnp.pad(x.reshape(*batch, m * n), pad, constant_values=fill)
        return x.reshape(*batch, -1, self.block)

    def join(self, blocks: Array) -> Array:
        """The inverse of `cut`."""
        *batch, m, n = self.shape
        if self.part:
            return blocks
        if n % self.block == 0:
            return blocks.reshape(self.shape)
        return blocks.reshape(*batch, -1)[..., : m * n].reshape(self.shape)

    def largest(self, arrays: Sequence[Array]) -> list[Array]:
        """The largest magnitude of each block of some arrays that `cut` gives.

        ``(..., blocks, 1)`` of each, or without the last axis if they are not cut. On a
        mesh they are exchanged at once.
        """
        if self.part:
            return self._largest_by_parts(arrays)
        return list(map(int8_map.largest_of, arrays))

    def spread(self, scales: Sequence[Array]) -> list[Array]:
        """What `largest` gives, for each number of what `cut` gives."""
        if not self.part:
            return list(scales)
        *batch, m, n = self.shape
        each = jnp.stack(list(scales))
        if n % self.block == 0:
            # Of parts first: at once, a TPU stores both (6.1 words on a v5e for 4.0).
            parts = jnp.repeat(each, self.block // self.part, axis=-1)
            return [jnp.repeat(x, self.part, axis=-1) for x in parts]
        each = jnp.repeat(each, self.block, axis=-1)
        return [x[..., : m * n].reshape(self.shape) for x in each]

    def load(self, largest: Array) -> Array:
        """Scales as `largest` gives them, of those that are kept."""
        return largest if self.part else largest[..., None]

    def store(self, scales: Array) -> Array:
        """The inverse of `load`."""
        return scales if self.part else scales[..., 0]

    def _largest_by_parts(self, arrays: Sequence[Array]) -> list[Array]:
        """Each part is compared with the blocks that begin in its row, or before it.

        So what is known of rows that are split is one maximum over the devices.
        """
        *batch, m, n = self.shape
        parts, blocks = n // self.part, self.block // self.part
        cut = [x.reshape(*batch, m, parts, self.part) for x in arrays]
        found = jnp.stack([int8_map.largest_of(x)[..., 0] for x in cut])
        row = jnp.arange(m, dtype=jnp.int32)[:, None]
        number = row * parts + jnp.arange(parts, dtype=jnp.int32)
        place = number // blocks - row * parts // blocks
        fit = n % self.block == 0
        columns = parts // blocks if fit else (parts - 1) // blocks + 2
        here = place[..., None] == jnp.arange(columns, dtype=jnp.int32)
        found = _largest(jnp.where(here, found[..., None], 0.0), -2)
        return list(found if fit else self._over_ends(found))

    def _over_ends(self, found: Array) -> Array:
        """The largest of each block, of which a few rows have a part each."""
        m, n = self.shape[-2:]
        parts, blocks = n // self.part, self.block // self.part
        first = np.arange(-(-m * n // self.block)) * blocks
        last = np.minimum(first + blocks, m * parts) - 1
        rows = first // parts + np.arange((blocks - 1) // parts + 2)[:, None]
        place = first // blocks - rows * parts // blocks
        held = rows <= last // parts
        flat = np.where(held, rows * found.shape[-1] + place, 0)
        each = found.reshape(*found.shape[:-2], -1)[..., flat]
        return _largest(jnp.where(held, each, 0.0), -2)


def _largest(x: Array, axis: int) -> Array:
    """By the bits, as `int8_map.largest_of` does: no number is the largest."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.max(bits, axis=axis), jnp.float32)
