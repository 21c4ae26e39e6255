"""One leaf's large temporaries at a time, where a backend needs to be told so."""

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from lowrank_optax._src.linalg.meshes import split_axes

T = TypeVar("T")


class Order:
    """Leaves one after the other: what `start` returns waits for the last `end`.

    XLA's CPU backend orders by depth: it would first make the large temporaries of all
    leaves, and then use them. Measured there on the 56 matrices of LLaMA-60M, 96 MiB:
    GaLore has 6 MiB of temporaries with an order and 146 without, MLorc 13 and 105.
    GPU and TPU order by memory themselves, and a dependence would cost a fusion there,
    on a mesh a collective. But where a leaf has a dense temporary that is read twice,
    as the second moment of MLorc is, XLA's GPU backend makes those of several leaves in
    one launch: 521 MiB instead of 192 for a layer of LLaMA-7B. An order must not wait
    for an update either: it would be stored (364 MiB, and a word more).
    """

    def __init__(self) -> None:
        self._last: list[jax.Array] = []

    def start(self, tree: Any, dense: bool = False) -> Any:
        """The leaf's arrays and keys; they wait for the last `end`.

        Args:
          tree: the arrays.
          dense: whether the leaf has such a temporary.
        """
        return wait(tree, self._last, dense) if self._last else tree

    def end(self, tree: Any) -> None:
        """The leaf has ended once these arrays are known."""
        last = [x for x in jax.tree.leaves(tree) if x.size]
        self._last = last or self._last


def wait(tree: T, arrays: list[jax.Array], dense: bool = False) -> T:
    """``tree``, of arrays and keys, only once other arrays are known, see `Order`."""
    leaves, structure = jax.tree.flatten(tree)
    if not leaves:
        return tree

    def added(leaves, arrays):
        if any(map(split_axes, (*leaves, *arrays))):
            return leaves  # a sum over devices, for a mesh that is only simulated
        # The sum of all numbers: XLA would compute a single one on its own, and not
        # wait for the others.
        sums = [jnp.sum(y.real, dtype="float32") for y in arrays]
        return [functools.reduce(after, sums, x) for x in leaves]

    def behind(leaves, arrays):
        return jax.lax.optimization_barrier((leaves, arrays))[0] if dense else leaves

    waited = jax.lax.platform_dependent(
        [_data(x) for x in leaves],
        arrays,
        cpu=added,
        cuda=behind,
        default=lambda leaves, arrays: leaves,
    )
    return structure.unflatten(map(_like, leaves, waited))


def _data(x: jax.Array) -> jax.Array:
    """The numbers of keys; any other array is its own."""
    return jax.random.key_data(x) if _is_key(x) else x


def _like(x: jax.Array, data: jax.Array) -> jax.Array:
    """The inverse of `_data`, of keys like ``x``."""
    if not _is_key(x):
        return data
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def after(x: jax.Array, dependency: jax.Array) -> jax.Array:
    """``x``, an array or keys, only once ``dependency`` is known, on any backend.

    Adds a zero made of it. A data dependence is the one thing that XLA neither merges
    nor reorders: what is computed from the result is not kept alive from before. On CPU
    an optimization barrier does not do this.
    """
    if not dependency.size:
        return x
    # Of a float: the product of an integer and zero is folded, and with it the wait.
    zero = dependency[(0,) * dependency.ndim] * 0.0
    data = _data(x)
    return _like(x, data + jnp.where(zero == 0, zero, 0.0).astype(data.dtype))
