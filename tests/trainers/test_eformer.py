"""eformer's factory makes low-rank methods: docs/trainers.md."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eformer.optimizers import OptimizerFactory, SchedulerConfig
from page import run_sections

import lowrank_optax as lro


@pytest.fixture(scope="module", autouse=True)
def registered():
    run_sections("trainers.md", "What trainers ask for", "eformer and EasyDeL")


def test_the_factory_takes_the_fields_and_chains_the_rest():
    schedule = SchedulerConfig("linear", 1e-2, learning_rate_end=0.0, steps=10)
    tx, rate = OptimizerFactory.create(
        "galore", schedule, clip_grad=1.0, rank=4, update_every=3
    )
    expected = optax.chain(
        optax.clip_by_global_norm(1.0), lro.galore_adamw(rate, rank=4, update_every=3)
    )
    rng = np.random.default_rng(0)
    params = {"up": jnp.asarray(rng.standard_normal((16, 48)), jnp.float32)}
    state, other = tx.init(params), expected.init(params)
    for _ in range(5):
        updates, state = jax.jit(tx.update)(params, state, params)
        wanted, other = jax.jit(expected.update)(params, other, params)
        np.testing.assert_allclose(updates["up"], wanted["up"], rtol=1e-6)
    assert optax.tree.get(state, "mu")["up"].shape == (4, 48)
    mesh = jax.make_mesh((2,), ("fsdp",))
    lro.state_shardings(tx, params, mesh)
