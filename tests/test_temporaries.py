"""The memory of a step: a few leaves beside the state, however many there are."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro

METHODS = {
    "adamw_8bit": lambda: lro.adamw_8bit(1e-3),
    "adam_mini": lambda: lro.adam_mini(1e-3),
    "apollo_adamw": lambda: lro.apollo_adamw(1e-3, rank=128),
    "galore_adamw": lambda: lro.galore_adamw(1e-3, rank=4),
    "ldadamw": lambda: lro.ldadamw(1e-3, rank=4),
    "mlorc_adamw": lambda: lro.mlorc_adamw(1e-3),
    "cast": lambda: lro.compress_state(
        optax.adam(1e-3), {"mu": lro.Cast(jnp.bfloat16), "nu": lro.Cast(jnp.bfloat16)}
    ),
}
SHAPE = (256, 384)
LEAF = 4 * SHAPE[0] * SHAPE[1]


def temporaries(tx, leaves):
    params = {f"w{i}": jax.ShapeDtypeStruct(SHAPE, jnp.float32) for i in range(leaves)}

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    step = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    return step.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", METHODS)
def test_they_do_not_grow_with_the_leaves(name):
    tx = METHODS[name]()
    few, many = temporaries(tx, 3), temporaries(tx, 9)
    assert few < 8 * LEAF
    assert many - few < 2 * LEAF  # of six more: factors and sketches


@pytest.mark.parametrize("name", ["adamw_8bit", "adam_mini", "ldadamw"])
def test_empty_leaves_take_no_turn(name):
    tx = METHODS[name]()
    params = {"a": jnp.ones((64, 96)), "b": jnp.zeros((0,)), "c": jnp.ones((64, 96))}
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["b"].shape == (0,)
    assert jnp.isfinite(updates["c"]).all() and updates["c"].any()


def test_on_gpu_no_order_waits_for_an_update():
    # A barrier on an update would have it stored before it is added to the weights.
    tx = METHODS["mlorc_adamw"]()
    params = {f"w{i}": jax.ShapeDtypeStruct(SHAPE, jnp.float32) for i in range(3)}
    state = jax.eval_shape(tx.init, params)
    export = jax.export.export(jax.jit(tx.update), platforms=["cuda"])
    lines = export(params, state, params).mlir_module().splitlines()
    barriers = [x for x in lines if "optimization_barrier" in x]
    assert barriers and not [x for x in barriers if "256x384xf32" in x]
