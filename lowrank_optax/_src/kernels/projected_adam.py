"""Adam in a subspace as one pass: project, Adam, project back.

Each program owns some columns of the matrix and walks twice along its rows, first to
sum up ``R = P^T G``, then, after Adam on those columns, to write ``s P N``. The
gradient is read once; R and N never leave the program.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lowrank_optax._src.kernels import gpu, tpu
from lowrank_optax._src.kernels.adam import adam_step
from lowrank_optax._src.kernels.dispatch import by_platform
from lowrank_optax._src.kernels.plan import Plan, plan, sizes_of, upright
from lowrank_optax._src.kernels.tiles import dot, flat, same_batch
from lowrank_optax._src.leaves.matrix import MatrixView
from lowrank_optax._src.parts.part import compiled
from lowrank_optax._src.parts.recovery import Drop

Array = jax.Array
INS = ("mn", "mk", "kn", "kn", *["11"] * 9)  # gradient, basis, moments, numbers
OUTS = ("mn", "kn", "kn")


def suits(recovery: Any, view: MatrixView) -> bool:
    """Whether the pass stands for Adam and a recovery at a leaf."""
    return type(recovery) is Drop and view.compute_dtype == jnp.float32


@compiled
def projected_adam(parts: Any, grad: Array, basis: Array, mu: Array, nu: Array, count):
    """``scale P Adam(P^T G)`` and the new moments.

    Args:
      parts: `Adam`, the scale, and whether the gradient lies transposed in memory.
      grad: (*batch, m, n), float32 or narrower.
      basis, mu, nu: (*batch, m, r) and (*batch, r, n).
      count: of Adam's updates before.

    Returns:
      ``(update, mu, nu)``, the update in the gradient's dtype.
    """
    adam, scale, turned = parts
    batch = grad.shape[:-2]
    numbers = (*adam.numbers(count), scale)
    if turned:  # which cancels with how the gradient became so
        grad = grad.mT
    arrays = [flat(x) for x in (grad, basis, mu, nu, *numbers)]

    def on(platform, interpret, *arrays):
        return _on(platform, interpret, "nm" if turned else "mn", *arrays)

    results = by_platform(on, *arrays)
    update, mu, nu = (x.reshape(*batch, *x.shape[1:]) for x in results)
    return update.mT if turned else update, mu, nu


def cut_for(platform: str, sizes: Mapping[str, int], dtype: Any) -> Plan | None:
    """The tiles of the pass, for sizes of "m", "n", "k" (the rank) and "1"."""
    return plan(platform, INS, (*OUTS, "kn"), "m", sizes, dtype)  # with the sum


def _on(platform: str, interpret: bool, full: str, *arrays: Array) -> Sequence[Array]:
    """The pass on one platform; ``full`` are the axes of gradient and update."""
    sizes, dtype = sizes_of((full, *INS[1:]), arrays), arrays[0].dtype
    cut = cut_for(platform, sizes, dtype)
    if cut is None:
        grad, *rest = same_batch(arrays)
        update, *moments = jax.vmap(_whole)(upright(full, grad), *rest)
        return upright(full, update), *moments
    walk = _on_gpu if platform == "cuda" else _on_tpu
    return walk(cut, interpret, full, arrays)


def _whole(g, basis, mu, nu, *numbers):
    r = dot(basis, g.astype(jnp.float32), (0, 0))
    direction, mu, nu = adam_step(r, mu, nu, *numbers[:-1])
    return (numbers[-1] * dot(basis, direction)).astype(g.dtype), mu, nu


def _shapes(grad: Array, basis: Array, mu: Array, nu: Array, *_: Array) -> list[Any]:
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (grad, mu, nu)]


def _on_tpu(cut: Plan, interpret: bool, full: str, arrays: Any) -> list[Array]:
    steps = cut.steps("m")  # of each walk; the second makes as many after the first

    def both_walks(i, j):
        return {"n": i, "m": j % steps}

    def first_walk(i, j):  # then stays: what does not change is not fetched again
        return {"n": i, "m": jnp.minimum(j, steps - 1)}

    def second_walk(i, j):
        return {"n": i, "m": jnp.maximum(j - steps, 0)}

    def kernel(*refs):
        sources, (update, mu_out, nu_out, low) = refs[: len(INS)], refs[len(INS) :]
        step = pl.program_id(2)
        at = {
            "n": pl.program_id(1) * cut.block["n"],
            "m": step % steps * cut.block["m"],
        }
        basis = tpu.load(cut, sources[1], "mk", at)

        @pl.when(step == 0)
        def _():
            low[...] = jnp.zeros_like(low)

        @pl.when(step < steps)
        def _():
            g = tpu.load(cut, sources[0], full, at).astype(jnp.float32)
            low[...] += dot(basis, g, (0, 0))

        @pl.when(step == steps)
        def _():
            mu, nu, *numbers = (ref[...] for ref in sources[2:])
            low[...], mu_out[...], nu_out[...] = adam_step(
                low[...], mu, nu, *numbers[:-1]
            )

        @pl.when(step >= steps)
        def _():
            new = sources[-1][...] * dot(basis, low[...])
            update[...] = upright(full, new).astype(update.dtype)

    walks = [first_walk, *[both_walks] * (len(INS) - 1)]
    return pl.pallas_call(
        kernel,
        grid=(len(arrays[0]), cut.steps("n"), 2 * steps),
        in_specs=[
            tpu.block_spec(cut, axes, walk, len(x) > 1)
            for axes, x, walk in zip((full, *INS[1:]), arrays, walks, strict=True)
        ],
        out_specs=[
            tpu.block_spec(cut, axes, second_walk) for axes in (full, *OUTS[1:])
        ],
        out_shape=_shapes(*arrays),
        scratch_shapes=[pltpu.VMEM((cut.sizes["k"], cut.block["n"]), jnp.float32)],
        compiler_params=tpu.PARAMS,
        interpret=interpret,
        name="projected_adam",
    )(*arrays)


def _on_gpu(cut: Plan, interpret: bool, full: str, arrays: Any) -> list[Array]:
    access, steps = gpu.Access(cut), cut.steps("m")

    def kernel(*refs):
        (g, basis, *sources), results = refs[: len(INS)], refs[len(INS) :]
        here = {"n": pl.program_id(1) * cut.block["n"]}

        def at(i):
            return here | {"m": i * cut.block["m"]}

        def project(i, low):
            grad = access.load(g, full, at(i)).astype(jnp.float32)
            return low + dot(access.load(basis, "mk", at(i)), grad, (0, 0))

        zeros = jnp.zeros((cut.taken("k"), cut.block["n"]), jnp.float32)
        low = jax.lax.fori_loop(0, steps, project, zeros)
        mu, nu, *numbers = (
            access.load(ref, axes, here)
            for ref, axes in zip(sources, INS[2:], strict=True)
        )
        direction, mu, nu = adam_step(low, mu, nu, *numbers[:-1])
        access.store(results[1], "kn", here, mu)
        access.store(results[2], "kn", here, nu)

        def back(i, _):
            new = numbers[-1] * dot(access.load(basis, "mk", at(i)), direction)
            access.store(results[0], full, at(i), new.astype(results[0].dtype))

        jax.lax.fori_loop(0, steps, back, None)

    shapes = _shapes(*arrays)
    return pl.pallas_call(
        kernel,
        grid=(len(arrays[0]), cut.steps("n")),
        in_specs=[gpu.matrix_of(x) for x in arrays],
        out_specs=[gpu.matrix_of(x) for x in shapes],
        out_shape=shapes,
        compiler_params=gpu.PARAMS,
        interpret=interpret,
        name="projected_adam",
    )(*arrays)
