"""Adam in a subspace as one pass: project, Adam, project back.

Each program owns some columns of the matrix and walks twice along its rows, first to
sum up ``R = P^T G``, then, after Adam on those columns, to write ``s P N``. The
gradient is read once; R and N never leave the program.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lowrank_optax._src import engine
from lowrank_optax._src.kernels import gpu, tpu
from lowrank_optax._src.kernels.adam import Adam, adam_step
from lowrank_optax._src.kernels.dispatch import active, by_platform
from lowrank_optax._src.kernels.plan import Plan, batch_of, plan, sizes_of
from lowrank_optax._src.kernels.tiles import dot, flat
from lowrank_optax._src.matrix import MatrixView
from lowrank_optax._src.recovery import Drop

Array = jax.Array
_AXES = ("mn", "mk", "kn", "kn")  # gradient, basis, moments; then numbers
_NUMBERS = 7


def suits(adam: Adam | None, recovery: Any, view: MatrixView) -> bool:
    """Whether the pass stands for an inner optimizer and a recovery at a leaf."""
    return (
        adam is not None
        and active()
        and type(recovery) is Drop
        and view.compute_dtype == jnp.float32
    )


@engine.compiled
def projected_adam(parts: Any, grad: Array, basis: Array, mu: Array, nu: Array, count):
    """``scale P Adam(P^T G)`` and the new moments.

    Args:
      parts: `Adam` and the scale.
      grad: (*batch, m, n), float32 or narrower.
      basis, mu, nu: (*batch, m, r) and (*batch, r, n).
      count: of Adam's updates before.

    Returns:
      ``(update, mu, nu)``, the update in the gradient's dtype.
    """
    adam, scale = parts
    batch = grad.shape[:-2]
    numbers = (*adam.numbers(count), scale)
    arrays = [flat(x) for x in (grad, basis, mu, nu, *numbers)]
    results = by_platform(_on, *arrays)
    return tuple(x.reshape(*batch, *x.shape[1:]) for x in results)


def cut_for(platform: str, ins: Any) -> Plan | None:
    """Tiles of the pass, for axes and stacks of matrices."""
    specs = [(axes, x.dtype) for axes, x in ins]
    moments = [("kn", jnp.float32)] * 3  # with the sum
    outs = [("mn", ins[0][1].dtype), *moments]
    return plan(platform, specs, outs, sizes_of(ins), over="m")


def _on(platform: str, interpret: bool, *arrays: Array) -> list[Array]:
    ins = list(zip((*_AXES, *["11"] * _NUMBERS), arrays, strict=True))
    cut = None if platform == "xla" else cut_for(platform, ins)
    if cut is None:
        return list(jax.vmap(_whole)(*_broadcast(arrays)))
    walk = _on_gpu if platform == "cuda" else _on_tpu
    return list(walk(cut, interpret, ins))


def _whole(g, basis, mu, nu, *numbers):
    r = dot(basis, g.astype(jnp.float32), (0, 0))
    direction, mu, nu = adam_step(r, mu, nu, *numbers[:-1])
    return (numbers[-1] * dot(basis, direction)).astype(g.dtype), mu, nu


def _broadcast(arrays):
    return [jnp.broadcast_to(x, (len(arrays[0]), *x.shape[1:])) for x in arrays]


def _shapes(cut: Plan, ins: Any) -> list[Any]:
    batch, dtype = batch_of(ins), ins[0][1].dtype
    m, n, k = (cut.sizes[axis] for axis in "mnk")
    moment = jax.ShapeDtypeStruct((batch, k, n), jnp.float32)
    return [jax.ShapeDtypeStruct((batch, m, n), dtype), moment, moment]


def _on_tpu(cut: Plan, interpret: bool, ins: Any) -> list[Array]:
    steps = cut.steps("m")  # of each walk; the second makes as many after the first

    def both_walks(i, j):
        return {"n": i, "m": j % steps}

    def first_walk(i, j):  # then stays: what does not change is not fetched again
        return {"n": i, "m": jnp.minimum(j, steps - 1)}

    def second_walk(i, j):
        return {"n": i, "m": jnp.maximum(j - steps, 0)}

    def kernel(*refs):
        sources, (update, mu_out, nu_out, low) = refs[: len(ins)], refs[len(ins) :]
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
            g = tpu.load(cut, sources[0], "mn", at).astype(jnp.float32)
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
            update[...] = new.astype(update.dtype)

    walks = [first_walk, *[both_walks] * (len(ins) - 1)]
    return pl.pallas_call(
        kernel,
        grid=(batch_of(ins), cut.steps("n"), 2 * steps),
        in_specs=[
            tpu.block_spec(cut, axes, walk, len(x) > 1)
            for (axes, x), walk in zip(ins, walks, strict=True)
        ],
        out_specs=[
            tpu.block_spec(cut, axes, second_walk) for axes in ("mn", "kn", "kn")
        ],
        out_shape=_shapes(cut, ins),
        scratch_shapes=[pltpu.VMEM((cut.sizes["k"], cut.block["n"]), jnp.float32)],
        compiler_params=tpu.PARAMS,
        interpret=interpret,
        name="projected_adam",
    )(*(x for _, x in ins))


def _on_gpu(cut: Plan, interpret: bool, ins: Any) -> list[Array]:
    access, steps = gpu.Access(cut), cut.steps("m")

    def kernel(*refs):
        (g, basis, *sources), results = refs[: len(ins)], refs[len(ins) :]
        here = {"n": pl.program_id(1) * cut.block["n"]}

        def at(i):
            return here | {"m": i * cut.block["m"]}

        def project(i, low):
            grad = access.load(g, "mn", at(i)).astype(jnp.float32)
            return low + dot(access.load(basis, "mk", at(i)), grad, (0, 0))

        zeros = jnp.zeros((cut.taken("k"), cut.block["n"]), jnp.float32)
        low = jax.lax.fori_loop(0, steps, project, zeros)
        mu, nu, *numbers = (
            access.load(ref, axes, here)
            for ref, (axes, _) in zip(sources, ins[2:], strict=True)
        )
        direction, mu, nu = adam_step(low, mu, nu, *numbers[:-1])
        access.store(results[1], "kn", here, mu)
        access.store(results[2], "kn", here, nu)

        def back(i, _):
            new = numbers[-1] * dot(access.load(basis, "mk", at(i)), direction)
            access.store(results[0], "mn", at(i), new.astype(results[0].dtype))

        jax.lax.fori_loop(0, steps, back, None)

    shapes = _shapes(cut, ins)
    return pl.pallas_call(
        kernel,
        grid=(batch_of(ins), cut.steps("n")),
        in_specs=[gpu.matrix_of(x) for _, x in ins],
        out_specs=[gpu.whole(x.shape, lambda b, i: (b, 0, 0)) for x in shapes],
        out_shape=shapes,
        compiler_params=gpu.PARAMS,
        interpret=interpret,
        name="projected_adam",
    )(*(x for _, x in ins))
