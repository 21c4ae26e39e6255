"""Products with thin matrices, and scales that keep squares in range."""

import dataclasses
import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array

from lowrank_optax._src.linalg.meshes import gathered, split_axes

T = TypeVar("T")


def matmul(a: Array, b: Array) -> Array:
    """``a @ b`` at the highest precision of the device."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


# Up to here, products of factors are formed entry by entry inside the loop that uses
# them instead of by a matrix product that has to be stored.
OUTER_MAX_RANK = 16


def outer_product(left: Array, right: Array) -> Array:
    """``left @ right``; at small rank as a sum of outer products, which fuses."""
    r = right.shape[-2]
    if r > OUTER_MAX_RANK:
        return matmul(left, right)
    terms = (left[..., :, i, None] * right[..., i, None, :] for i in range(r))
    return functools.reduce(jnp.add, terms)


def gram(y: Array) -> Array:
    """``y^T y``."""
    return matmul(y.mT, y)


def project(basis: Array, a: Array) -> Array:
    """``basis^T a`` for a thin basis.

    XLA merges two products that share an operand, and copies the other two for it: on
    GPU a gradient. A barrier on the thin operand keeps this product by itself.
    """
    return matmul(jax.lax.optimization_barrier(basis.mT), a)


def sketch(a: Array, w: Array) -> Array:
    """``a w`` for a thin ``w``, by itself as in `project`."""
    return matmul(a, jax.lax.optimization_barrier(w))


def kept_apart(tree: T) -> T:
    """The same arrays; on GPU, XLA fuses nothing before them with anything behind.

    So it stores what it would make anew for each use, or makes anew what it would store
    for all. In MLorc it saves ten of 286 launches for a layer of LLaMA-7B, and 127 of
    1,085 for LLaMA-60M.
    """
    apart = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(tree, cuda=apart, default=lambda x: x)


def as_stored(x: Array) -> Array:
    """``x``, on a TPU with its last axis closest in memory, as parameters have it.

    Else XLA for a v6e turns the weights before it adds a product of thin factors to
    them, and turns the sum back: GaLore's step moves 7.2 words a weight instead of 3.2.
    """
    if split_axes(x):
        return x

    def row_major(x):
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    return jax.lax.platform_dependent(x, tpu=row_major, default=lambda x: x)


def by_columns(y: Array) -> Array:
    """``y``, (*b, m, k), on a TPU with its columns close in memory.

    Rows of eight numbers are padded to 128 there, and a sketch is sixteen times as
    large: kernels write it so, and those of all leaves wait for one another.
    """
    if split_axes(y):
        return y
    *batch, m, k = range(y.ndim)

    def columns(y):
        return with_layout_constraint(y, Layout((*batch, k, m)))

    return jax.lax.platform_dependent(y, tpu=columns, default=lambda y: y)


def wide(dtype: DTypeLike) -> np.dtype:
    """float32, or the dtype where it is wider."""
    # JAX promotes floats of eight bits to nothing.
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.promote_types(jnp.float32, jnp.float32 if narrow else dtype)


def at_least_float32(x: Array) -> Array:
    """``x`` in float32, or in its own dtype where that is wider."""
    x = jnp.asarray(x)
    return x.astype(wide(x.dtype))


def magnitude(a: Array, axis: int | tuple[int, ...] = (-2, -1)) -> Array:
    """The largest magnitude, axes kept, to scale by: it has no derivative.

    What is scaled by it does not depend on it. Its derivative looks for the entry that
    it is equal to, and XLA may compute that a second time with another rounding: there
    is none then, and 0 / 0.
    """
    return jnp.max(jnp.abs(jax.lax.stop_gradient(a)), axis=axis, keepdims=True)


def unit_scale(a: Array, largest: Array | None = None) -> tuple[Array, Array]:
    """``(a / s, s)`` with ``s`` the power of two at the largest magnitude of a matrix.

    Squares of entries near the ends of the range of floats under- and overflow; those
    of a matrix whose largest entry is about 1 do not. Nothing is rounded.
    """
    a = at_least_float32(a)
    largest = magnitude(a) if largest is None else largest
    # A zero matrix is not scaled: its derivative would be the inverse of nothing.
    inverse, scale = power_of_two(jnp.where(largest == 0, 1.0, largest))
    return a * inverse, scale


def power_of_two(x: Array) -> tuple[Array, Array]:
    """``(1 / s, s)`` for a power of two with ``x / s`` in [1/2, 1); finite for zero.

    By the bits of its exponent, which costs next to nothing and is fused where a
    division would not be.
    """
    kind = jnp.finfo(x.dtype)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{kind.bits}"))
    exponent = (bits >> kind.nmant).astype(jnp.int32)
    top = 2 * kind.maxexp - 1  # all ones: not a number
    inverse = jnp.maximum(top - 2 - exponent, 1)

    def power(exponent):
        return jax.lax.bitcast_convert_type(
            exponent.astype(bits.dtype) << kind.nmant, x.dtype
        )

    # What is not a number stays so: 0 * inf.
    broken = jnp.where(exponent == top, x - x, 0.0).astype(x.dtype)
    return power(inverse) + broken, power(top - 1 - inverse)


def norms(x: Array) -> Array:
    """Of each matrix, whose squares may be out of the range of floats."""
    x, scale = unit_scale(x)
    return jnp.sqrt(jnp.sum(x * x, axis=(-2, -1))) * scale[..., 0, 0]


def sums_from_end(x: Array) -> Array:
    """The sum of each entry and those behind it, along the last axis.

    A total minus a cumulative sum would lose small ones to rounding.
    """
    return jnp.flip(jnp.cumsum(jnp.flip(x, -1), axis=-1), -1)


def near_one(y: Array) -> Array:
    """``y`` with its largest magnitude near one, so that its squares are in range."""
    return unit_scale(y)[0]


def unit_columns(y: Array) -> Array:
    """Columns of norm one; zero columns stay zero."""
    return of_unit_length(y, jnp.sum(y * y, axis=-2, keepdims=True))


def of_unit_length(y: Array, square: Array) -> Array:
    """Rows or columns over their lengths, by the squares of these."""
    # The root only of what is not zero, where it has no derivative.
    return y / jnp.sqrt(jnp.where(square > 0, square, 1.0))


@dataclasses.dataclass(frozen=True)
class Lying:
    """A matrix A by an array that is A, or its transpose, as it lies in memory.

    Arithmetic on the array reads and writes memory in its order; products contract the
    axis that they need, and transpose thin factors only.

    Attributes:
      array: ``(*batch, m, n)``, or ``(*batch, n, m)`` if turned.
      turned: whether it is the transpose.
      dtype: a type that has all of its numbers, as that of the leaf does.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> lying = lro.laws.Lying(jnp.ones((8, 3)), turned=True)
    >>> lying.matrix.shape, lying.of(2 * lying.array).matrix.shape
    ((3, 8), (3, 8))
    """

    array: Array
    turned: bool
    dtype: DTypeLike = jnp.float32

    @property
    def matrix(self) -> Array:
        """A, which may be a transposed view."""
        return self.order(self.array)

    def order(self, x: Array) -> Array:
        """An array of A's order in this array's, or the other way round."""
        return x.mT if self.turned else x

    def of(self, array: Array) -> "Lying":
        """Another matrix that lies like this one."""
        return dataclasses.replace(self, array=array)

    def column_norms(self) -> Array:
        """``(*batch, 1, n)``."""
        return self.order(jnp.linalg.norm(self.array, axis=self._rows, keepdims=True))

    def column_means(self) -> Array:
        """``(*batch, 1, n)``."""
        return self.order(jnp.mean(self.array, axis=self._rows, keepdims=True))

    @property
    def _rows(self) -> int:
        return -1 if self.turned else -2

    def sketch(self, w: Array) -> Array:
        """``A w^T``: the rows of ``w`` lie as those of A do, long on every device.

        On a mesh thin arrays are whole on each device, or XLA would move A to where
        these are, and every small problem made of them would be a sum over devices.
        """
        w = gathered(w)
        if self.turned:
            return project(w.mT, self.array).mT
        return matmul(self.array, jax.lax.optimization_barrier(w).mT)

    def project(self, q: Array) -> Array:
        """``q^T A``; see `sketch` for what is done on a mesh."""
        q = gathered(q)
        return sketch(self.array, q).mT if self.turned else project(q, self.array)
