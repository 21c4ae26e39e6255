"""Products with thin matrices, and scales that keep squares in range."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def matmul(a: Array, b: Array) -> Array:
    """``a @ b`` at the highest precision of the device."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def project(basis: Array, a: Array, turned: bool = False) -> Array:
    """``basis^T a`` for a thin basis, which is transposed apart.

    XLA's CPU backend would leave that to the product, and there transpose ``a``, at two
    to five times the time where ``a`` is a transposed view.

    Args:
      turned: multiply ``a^T`` by the basis instead, which is faster for such a view,
        if the basis has a few columns only, and as slow as said for any other ``a``.
    """
    if turned:
        return sketch(a.mT, basis, turned=False).mT
    return matmul(jax.lax.optimization_barrier(basis.mT), a)


def sketch(a: Array, w: Array, turned: bool = True) -> Array:
    """``a w`` for a thin ``w``, by ``w^T a^T`` as `project` has it.

    Args:
      turned: whether ``a`` may be a transposed view; if not, ``a w`` as it stands is
        faster where ``w`` has a few columns only.
    """
    if turned:
        return jax.lax.optimization_barrier(project(w, a.mT)).mT
    return jax.lax.optimization_barrier(matmul(a, w))


def at_least_float32(x: Array) -> Array:
    """``x`` in float32, or in its own dtype where that is wider."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(jnp.float32, x.dtype))


def unit_scale(a: Array) -> tuple[Array, Array]:
    """``(a / s, s)`` with ``s`` the power of two at the largest magnitude of a matrix.

    Squares of entries near the ends of the range of floats under- and overflow; those
    of a matrix whose largest entry is about 1 do not. Nothing is rounded.
    """
    a = at_least_float32(a)
    inverse, scale = power_of_two(jnp.max(jnp.abs(a), axis=(-2, -1), keepdims=True))
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


def near_one(y: Array) -> tuple[Array, Array]:
    """``y / s`` with the power of two s at its largest magnitude, and the latter."""
    largest = jnp.max(jnp.abs(y), (-2, -1), keepdims=True)
    return y * power_of_two(largest)[0], largest


def unit_columns(y: Array) -> Array:
    """Columns of norm one; zero columns stay zero."""
    norm = jnp.linalg.norm(y, axis=-2, keepdims=True)
    return y / jnp.where(norm > 0, norm, 1.0)
