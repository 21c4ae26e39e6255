"""A pass over the tiles of a matrix, described once for XLA, GPU and TPU.

A pass is a function of one tile. Its operands and results are arrays of two axes, named
by letters: "m" and "n" are cut into tiles, any other is taken whole. The pass walks
along one of the two axes; results without it are summed over it.

    run(tile, [("mn", g), ("mr", left), ("rn", right)], [("mn", dtype)], over="n")

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

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax._src.kernels import gpu, tpu
from lowrank_optax._src.kernels.dispatch import by_platform
from lowrank_optax._src.kernels.plan import Spec, batch_of, plan, sizes_of

Array = jax.Array


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


def run(
    tile: Callable[..., tuple[Array, ...]],
    ins: Sequence[tuple[str, Any]],
    outs: Sequence[Spec],
    over: str,
) -> list[Array]:
    """Run a pass on what is compiled for; see the module.

    Args:
      tile: from the blocks of all operands to those of all results. What lies beyond
        the edges of a matrix arrives as zero, and must add nothing to a sum.
      ins: axes and array of each operand, ``(*batch, ., .)`` or a number for "11"; the
        first has all batch axes.
      outs: axes and dtype of each result.
      over: the axis of the walk, "m" or "n".

    Returns:
      The results, ``(*batch, ., .)``.
    """
    batch = ins[0][1].shape[:-2]
    arrays = [flat(x) for _, x in ins]

    def on(platform, interpret, *arrays):
        named = [(axes, x) for (axes, _), x in zip(ins, arrays, strict=True)]
        return list(sweep(platform, interpret, tile, named, outs, over))

    results = by_platform(on, *arrays)
    return [x.reshape(*batch, *x.shape[1:]) for x in results]


def flat(x: Any) -> Array:
    """A stack of matrices; of a number, of one."""
    x = jnp.asarray(x)
    if x.ndim == 0:
        x = x.astype(jnp.float32)[None, None]
    return x.reshape(-1, *x.shape[-2:])


def sweep(
    platform: str,
    interpret: bool,
    tile: Callable[..., tuple[Array, ...]],
    ins: Sequence[tuple[str, Array]],
    outs: Sequence[Spec],
    over: str,
) -> list[Array]:
    """`run` on one platform, with arrays ``(batch or 1, ., .)``.

    Args:
      platform: "cuda", "tpu", or "xla" for one tile that is the whole matrix, as also
        where no tile fits.
      interpret: whether to interpret the kernel.
    """
    cut = None
    if platform != "xla":
        specs = [(axes, x.dtype) for axes, x in ins]
        cut = plan(platform, specs, outs, sizes_of(ins), over)
    if cut is None:
        batch = batch_of(ins)
        arrays = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for _, x in ins)
        return list(jax.vmap(tile)(*arrays))
    walk = gpu.walk if platform == "cuda" else tpu.walk
    return walk(cut, interpret, tile, ins, outs)
