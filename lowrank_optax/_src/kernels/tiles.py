"""A pass over the tiles of a matrix, described once for GPU and TPU.

A pass is a function of one tile. Its operands and results are arrays of two axes, named
by letters: "m" and "n" are cut into tiles, any other is taken whole; "11" is a number.
The pass walks along "m" or "n", and sums its results over it: nothing of the matrix's
size is written.

    Pass(tile, ins=("mn", "nl"), outs=("ml",), over="n")("tpu", False, grad, thin)

On TPU the steps of a walk are a grid axis, executed in order, and sums stay in VMEM; on
GPU programs run in any order, so that a walk is a loop within one, with the sums in
registers, and several programs share a long walk by partial sums.

Found on jax 0.10.2 with no device: both lower through `jax.export`. For CUDA it is
Triton, chosen by its `CompilerParams`: Mosaic GPU has no `dot_general` on plain values
and holds each whole block of a ref in shared memory. Triton wants array sizes that are
powers of two, slices refs but no values, and checks no bounds, hence the masks; JAX
promises no stability of its serialized form, so that an export must allow the custom
call. Mosaic for TPU fills edge blocks with anything, hence masks there too.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax._src.kernels import gpu, tpu
from lowrank_optax._src.kernels.dispatch import warn_of_xla
from lowrank_optax._src.kernels.plan import Plan, plan, sizes_of, upright


@dataclasses.dataclass(frozen=True)
class Pass:
    """A pass over one matrix, see the module.

    Attributes:
      tile: from the blocks of all operands to those of all results. What lies beyond
        the edges of a matrix arrives as zero, and must add nothing to a sum.
      ins: axes of the operands; the first is the gradient, "mn", or "nm" if it lies
        transposed in memory: the tiles are turned then.
      outs: axes of the results, in float32.
      over: the axis of the walk, which no result has.
    """

    tile: Callable[..., tuple[Array, ...]]
    ins: tuple[str, ...]
    outs: tuple[str, ...]
    over: str

    @property
    def turned(self) -> "Pass":
        """The same pass over a matrix that lies transposed in memory."""
        ins = tuple("nm" if axes == "mn" else axes for axes in self.ins)
        return dataclasses.replace(self, ins=ins)

    def plan(self, platform: str, sizes: Mapping[str, int], dtype: Any) -> Plan | None:
        return plan(platform, self.ins, self.outs, self.over, sizes, dtype)

    def __call__(
        self, platform: str, interpret: bool, *arrays: Any, turned: bool = False
    ) -> list[Array]:
        """The results, ``(*batch, ., .)``.

        Args:
          platform: "cuda" or "tpu"; where no tile fits, XLA takes the matrix whole.
          interpret: whether to interpret the kernel.
          arrays: operands ``(*batch, ., .)``, or numbers.
          turned: whether to transpose the gradient here, which cancels with a
            transposition outside: nothing is moved in memory.
        """
        if turned:
            other = self.turned
            return other(platform, interpret, *map(upright, other.ins, arrays))
        batch = arrays[0].shape[:-2]
        results = self._on(platform, interpret, *map(flat, arrays))
        return [x.reshape(*batch, *x.shape[1:]) for x in results]

    def _on(self, platform: str, interpret: bool, *arrays: Array) -> list[Array]:
        sizes, dtype = sizes_of(self.ins, arrays), arrays[0].dtype
        cut = self.plan(platform, sizes, dtype)
        if cut is None:
            warn_of_xla(platform, self.tile.__name__, arrays[0].shape[1:])
            return self.at_once(*arrays)
        walk = gpu.walk if platform == "cuda" else tpu.walk
        # By JAX, so that they vary within a `jax.shard_map` as the operands do.
        shapes = jax.eval_shape(self.at_once, *arrays)
        return walk(cut, interpret, self.tile, self.ins, arrays, self.outs, shapes)

    def at_once(self, *arrays: Array) -> list[Array]:
        """The pass in plain XLA, each matrix as a single tile: where no other fits."""

        def whole(*matrices):
            return list(self.tile(*map(upright, self.ins, matrices)))

        return jax.vmap(whole)(*same_batch(arrays))


def flat(x: Any) -> Array:
    """A stack of matrices; of a number, of one."""
    x = jnp.asarray(x)
    if x.ndim == 0:
        x = x.astype(jnp.float32)[None, None]
    return x.reshape(-1, *x.shape[-2:])


def same_batch(arrays: tuple[Array, ...]) -> list[Array]:
    return [jnp.broadcast_to(x, (len(arrays[0]), *x.shape[1:])) for x in arrays]


def product(left: Any, right: Any) -> Array:
    """``left @ right``; of thin factors as they are loaded, lists of their vectors."""
    if not isinstance(left, list):
        return dot(left, right)
    terms = (a * b for a, b in zip(left, right, strict=True))
    return functools.reduce(jnp.add, terms)


def dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """A product at the highest precision, over one axis of each."""
    axes = ((contract[0],), (contract[1],)), ((), ())
    return jax.lax.dot_general(
        a,
        b,
        axes,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
