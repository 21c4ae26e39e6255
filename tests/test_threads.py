"""Transformations that several threads trace at once."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from running import random_like

import lowrank_optax as lro
from lowrank_optax._src.leaves import context


@pytest.fixture
def often():
    """Threads change places as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


SAYINGS = {
    "accumulation": (lambda: context.accumulation("add"), context.accumulating),
    "layers": (lambda: context.one_layer(3, 8), context.layer_depth),
    "place": (lambda: context.one_layer(3, 8), context.layer_place),
    "ranks": (lambda: context.limited_ranks({("w",): 2}), context.limits),
}


@pytest.mark.parametrize("name", SAYINGS)
def test_what_is_said_in_one_thread_is_not_heard_in_another(name):
    say, hear = SAYINGS[name]
    silence = hear()
    inside, heard = threading.Event(), threading.Event()
    found = {}

    def speak():
        with say():
            inside.set()
            assert heard.wait(30)
            found["self"] = hear()
        found["after"] = hear()

    thread = threading.Thread(target=speak)
    thread.start()
    assert inside.wait(30)
    found["other"] = hear()
    heard.set()
    thread.join()
    assert found["other"] == found["after"] == silence != found["self"]


def test_views_are_recorded_by_thread():
    tx = lro.galore_project(optax.trace(0.9), rank=1)

    def record(name):
        with context.record_views() as views:
            barrier.wait(30)
            tx.init({name: jnp.ones((4, 6))})
            barrier.wait(30)
        return [view.path for view in views]

    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(record, "ab")) == [["a"], ["b"]]


def transformations(i):
    adam = optax.scale_by_adam()
    every = lro.Every(3)
    galore = lro.project_gradients(adam, rank=2, refresh=every)
    return [
        lro.accumulate_gradients(galore, 2),
        lro.adam_mini(1e-2),
        lro.mlorc_scale_by_adam(2),
        galore,
        lro.compress_state(adam, {"mu": lro.LowRank(2)}),
        lro.ldadamw(1e-2, 2),
    ][i]


def trace_and_run(i, shape):
    """Three updates of one transformation, traced at a shape of its own."""
    tx = transformations(i)
    params = random_like({f"w{k}": shape for k in range(4)}, 0)
    state, update, found = tx.init(params), jax.jit(tx.update), []
    for _ in range(3):
        updates, state = update(params, state, params)
        found.append(updates)
    return jax.tree.map(np.asarray, (found, state))


def test_transformations_traced_at_once_do_not_mix(often):
    jobs = [(i, (6, 8 + i % 2)) for i in range(6)]
    jax.clear_caches()
    with ThreadPoolExecutor(len(jobs)) as pool:
        at_once = list(pool.map(lambda job: trace_and_run(*job), jobs))
    jax.clear_caches()
    for job, found in zip(jobs, at_once, strict=True):
        alone = trace_and_run(*job)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7),
            found,
            alone,
        )


def test_limits_of_ranks_are_those_of_the_thread(often):
    params = {"w": jnp.ones((8, 9))}

    def rank_of(limit):
        tx = lro.galore_project(optax.scale_by_adam(), rank=5)
        with context.limited_ranks({("w",): limit}):
            for _ in range(5):
                state = tx.init(params)
                assert state.basis["w"].shape == (8, limit)
                update = jax.jit(lambda *args: tx.update(*args))
                _, state = update(params, state)
        return state.inner_state.mu["w"].shape[0]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(rank_of, [1, 2, 3, 4])) == [1, 2, 3, 4]
