"""Parameters in boxes, as Flax has them: what is made of them is as without boxes."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from registry import METHODS
from running import assert_close, random_grads

import lowrank_optax as lro

BY_NAME = {method.name: method for method in METHODS}


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(4, 6, rngs=rngs)
        self.down = nnx.Linear(6, 4, use_bias=False, rngs=rngs)
        self.embed = nnx.Embed(5, 4, rngs=rngs)


# Masks and labels by functions


def is_wide(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def kinds(params):
    return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", params)


def partition(tx):
    return optax.partition({"matrix": tx, "vector": optax.sgd(0.1)}, kinds)


WRAPPERS = {"masked": lambda tx: optax.masked(tx, is_wide), "partition": partition}
ADAM = optax.masked(optax.scale_by_adam(), is_wide)
AROUND = {
    "galore_project": lro.galore_project(ADAM, rank=1),
    "quantize_state": lro.quantize_state(ADAM),
    "mlorc_compress": lro.mlorc_compress(ADAM, rank=1),
    "leafwise": lro.leafwise(BY_NAME["leafwise"].kwargs["rule"], dense=ADAM),
    "galore of 8 bits": lro.galore_project(lro.quantize_state(ADAM), rank=1),
    "partition": lro.galore_project(partition(optax.scale_by_adam()), rank=1),
}
FUNCTIONAL = {
    f"{kind} {method.name}": (wrap, method.tx)
    for kind, wrap in WRAPPERS.items()
    for method in METHODS
} | {f"inside {name}": (lambda tx: tx, tx) for name, tx in AROUND.items()}


@pytest.fixture(params=FUNCTIONAL)
def masked(request):
    wrap, tx = FUNCTIONAL[request.param]
    return wrap(tx)


def test_a_function_masks_an_nnx_state_as_a_dict(masked):
    boxed = nnx.state(Model(), nnx.Param)
    plain = nnx.to_pure_dict(boxed)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    report = lro.memory_report(masked, boxed, mesh)
    assert report == lro.memory_report(masked, plain, mesh)
    assert report[2].bytes == lro.state_bytes(masked, plain)
    assert lro.describe(masked, boxed) == lro.describe(masked, plain)
    shardings = lro.state_shardings(masked, boxed, mesh)
    state = jax.eval_shape(jax.jit(masked.init, out_shardings=shardings), boxed)
    updates, after = jax.eval_shape(masked.update, boxed, state, boxed)
    assert jax.tree.structure((updates, after)) == jax.tree.structure((boxed, state))


@pytest.mark.parametrize(
    "tx",
    [
        *(wrap(BY_NAME["galore_adamw"].tx) for wrap in WRAPPERS.values()),
        *AROUND.values(),
    ],
    ids=[*WRAPPERS, *AROUND],
)
def test_masks_by_functions_train_an_nnx_model(tx):
    model = Model()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    grads = random_grads(params, 1)[0]
    want, _ = tx.update(grads, tx.init(params), params)
    into = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(into, grads)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))(
        model, optimizer, into
    )
    change = jax.tree.map(jnp.subtract, nnx.to_pure_dict(nnx.state(model)), params)
    assert_close(change, want, rtol=1e-4, atol=1e-5)


def test_a_spec_may_name_what_a_function_masks():
    boxed = nnx.state(Model(), nnx.Param)
    specs = {"up": {"kernel": lro.MatrixAxes(), "bias": lro.MatrixAxes()}}
    tx = optax.masked(lro.mlorc_scale_by_lion(1, matrices=specs), is_wide)
    ranks = {row.path: row.rank for row in lro.describe(tx, boxed)}
    assert ranks["up/kernel"] == 1 and ranks["up/bias"] is None
