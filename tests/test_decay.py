"""Weight decay inside a projection, which would see but a part of the weights."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from optax import contrib
from registry import GALORE, METHODS, example_params
from running import assert_close

import lowrank_optax as lro

PROJECTING = {
    m.name: m
    for m in METHODS
    if m.kwargs.get("inner") not in (None, GALORE)
    and hasattr(jax.eval_shape(m.tx.init, example_params()), "basis")
}

ADDING = {
    "adamw": optax.adamw(0.1),
    "begins at zero": optax.adamw(optax.linear_schedule(0.0, 1.0, 10)),
    "lion": optax.lion(0.1, weight_decay=0.1),
    "lamb": optax.lamb(0.1, weight_decay=0.1),
    "adafactor": optax.adafactor(0.1, weight_decay_rate=0.1),
    "in a conditional": optax.apply_if_finite(optax.adamw(0.1), 3),
    "after all": optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1)),
    "iterates": contrib.schedule_free_adamw(0.1),
    "a quotient": optax.stateless(
        lambda updates, params: jax.tree.map(lambda u, p: u + p / 7, updates, params)
    ),
}

MULTIPLYING = {
    "no decay": optax.adamw(0.1, weight_decay=0.0),
    "masked": optax.adamw(
        0.1, mask=lambda tree: jax.tree.map(lambda x: x.ndim < 2, tree)
    ),
    "trust ratio": optax.lamb(0.1),
    "lars": optax.lars(0.1),
    "size of the weights": optax.adafactor(0.1),
    "clipped by weights": optax.chain(
        optax.adaptive_grad_clip(0.1), optax.scale_by_adam()
    ),
    "in a conditional": optax.MultiSteps(
        optax.lamb(0.1), every_k_schedule=2
    ).gradient_transformation(),
    "distances": contrib.prodigy(),
    "nothing by a number": optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda u, p: u + (0.0 * p) / (1 + p * p), updates, params
        )
    ),
}


def project(inner):
    return lro.galore_project(inner, rank=2)


@pytest.mark.parametrize("name", ADDING)
def test_what_adds_weights_is_refused(name):
    params = example_params()
    tx = project(ADDING[name])
    state = jax.eval_shape(tx.init, params)
    match = r"decay.* of '(up|down)/kernel' of shape \(., .\).*add_decayed_weights"
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(tx.update, params, state, params)


@pytest.mark.parametrize("name", MULTIPLYING)
def test_weights_may_be_factors(name):
    params = example_params()
    tx = project(MULTIPLYING[name])
    state = jax.eval_shape(tx.init, params)
    updates, new = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


@pytest.mark.parametrize("name", PROJECTING)
def test_no_projection_takes_weight_decay(name):
    inner = PROJECTING[name].kwargs["inner"]
    tx = PROJECTING[name].make(inner=optax.chain(inner, optax.add_decayed_weights(0.1)))
    params = example_params()
    state = jax.eval_shape(tx.init, params)
    with pytest.raises(ValueError, match="add_decayed_weights after the projection"):
        jax.eval_shape(tx.update, params, state, params)


def test_leaves_that_are_not_projected_may_decay():
    params = example_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = project(MULTIPLYING["masked"])
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert_close(updates["up"]["bias"], -0.1 * 1e-4 * params["up"]["bias"])
