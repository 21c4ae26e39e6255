"""Warnings name the line that called the library, whatever stands between."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax._src.kernels.dispatch import interpreted

STACK = {"s": jnp.ones((3, 72, 96)), "w": jnp.ones((8, 9))}


def galore(rank=2):
    return lro.galore_project(optax.trace(0.9), rank=rank)


def masked():
    return optax.masked(optax.chain(galore(), optax.scale(1.0)), True)


def injected():
    return lro.inject_hyperparams(lro.galore_adamw)(1e-3, rank=2)


def without_tiles():
    tx, params = lro.adamw_8bit(1.0, block=100), {"w": jnp.ones((24, 256))}
    with interpreted("tpu"):
        jax.jit(tx.update)(params, tx.init(params), params)


# What is called, and a word of the warning.
CALLS = {
    "stacks": (lambda: galore().init(STACK), "three axes"),
    "compiled": (lambda: jax.jit(galore().init)(STACK), "three axes"),
    "abstract": (lambda: jax.eval_shape(galore().init, STACK), "three axes"),
    "wrapped": (lambda: masked().init(STACK), "three axes"),
    "injected": (lambda: injected().init(STACK), "three axes"),
    "coded": (lambda: lro.mlorc_lion(1.0, 2).init(STACK), "three axes"),
    "waste": (lambda: galore(10**6).init({"w": jnp.ones((8, 9))}), "saves nothing"),
    "nameless": (lambda: galore().init(2 * [jnp.ones((8, 9))]), "No name"),
    "kernels": (without_tiles, "no tiles"),
    "adapters": (
        lambda: lro.adapters.extract_lora({"b": jnp.ones(3)}, {"b": jnp.zeros(3)}),
        "differ from the base",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_warning_names_the_line_of_the_caller(name):
    call, word = CALLS[name]
    with pytest.warns(UserWarning, match=word) as told:
        call()
    lines, first = inspect.getsourcelines(call)
    (one,) = [x for x in told if word in str(x.message)]
    assert one.filename == __file__
    assert first <= one.lineno < first + len(lines)
