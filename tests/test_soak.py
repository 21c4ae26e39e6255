"""Many steps of the optimizers, few of them: what the record would say of which."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import soak

FEW = soak.Settings(steps=300, period=20)
GOOD = {"finite": True, "counted": True, "skew": 1e-6, "loss": 1e-5} | {
    "smallest": 0.9,
    "largest": 1.1,
}


@pytest.mark.parametrize(
    ("change", "trouble"),
    [
        ({}, []),
        ({"finite": False}, ["not finite"]),
        ({"counted": False}, ["counters are wrong"]),
        ({"skew": 1e-2}, ["bases are not orthonormal"]),
        ({"loss": 0.5}, ["the loss is above its floor"]),
        ({"loss": float("nan")}, ["the loss is above its floor"]),
        ({"largest": 3.0}, ["the state drifts"]),
        ({"smallest": 0.1}, ["the state drifts"]),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(change, trouble):
    assert soak.troubles(GOOD | change) == trouble


def test_a_few_steps_are_recorded_once(tmp_path, monkeypatch):
    settings = dataclasses.replace(FEW, only="^galore_adamw$", out=tmp_path)
    with pytest.raises(SystemExit, match="'galore_adamw': .*above its floor"):
        soak.main(settings)
    (found,) = json.loads((tmp_path / "soak.json").read_text())["figures"].values()
    assert found["steps"] == 300 and found["counted"] and found["finite"]
    assert 0.1 < found["loss"] < found["middle"] < 1  # it has begun to fall
    assert 0 < found["skew"] < 1e-4
    page = (tmp_path / "soak.md").read_text()
    assert "1 optimizers, 300 steps; 1 with trouble" in page
    monkeypatch.setattr(soak, "soak", None)  # it is not called again
    with pytest.raises(SystemExit, match="galore_adamw"):
        soak.main(settings)


def test_troubles_are_seen():
    """Of an optimizer that counts wrongly, grows, and turns its basis askew."""

    def init(params):
        basis = jax.tree.map(lambda p: jnp.eye(len(p)), params)
        moments = {"m": jnp.eye(2), "zero": jnp.zeros((2, 2))}
        return {"count": jnp.zeros([], jnp.int32), "basis": basis, **moments}

    def update(updates, state, params=None):
        basis = jax.tree.map(lambda b: 1.001 * b, state["basis"])
        new = {"count": state["count"] + 2, "basis": basis, "m": 1.01 * state["m"]}
        return jax.tree.map(lambda g: -0.1 * g, updates), state | new

    tx = optax.GradientTransformation(init, update)
    rows = soak.soak(tx, {"w": (3, 4)}, FEW)
    found = soak.figures(rows, FEW, 1.0)
    np.testing.assert_allclose(rows["skew"][-1], 1.001 ** (2 * 300) - 1, rtol=1e-3)
    assert rows["counters"] == 600 and rows["loss"].shape == (100,)
    # From the middle of the one window to that of the other.
    assert found["largest"] == pytest.approx(1.01 ** (300 / 2), rel=0.01)
    assert found["smallest"] == 1  # of what is zero
    # Gradient descent of rate a, from noise s: a s^2 / (2 - a) an entry.
    target, _ = jax.random.split(jax.random.key(0))
    aim = jax.random.normal(jax.random.split(target, 1)[0], (3, 4))
    floor = 12 * 0.1 * FEW.noise**2 / 1.9 / jnp.sum(aim**2)
    assert 0.5 < found["loss"] / floor < 2
    troubles = ["counters are wrong", "bases are not orthonormal"]
    troubles += ["the loss is above its floor", "the state drifts"]
    assert soak.troubles(found) == troubles


def test_every_optimizer_is_soaked_and_those_in_bytes_are():
    made = soak.cases(FEW)
    for name, (tx, shapes) in made.items():
        params = {k: jnp.zeros(shape) for k, shape in shapes.items()}
        types = {x.dtype for x in jax.tree.leaves(jax.eval_shape(tx.init, params))}
        assert (jnp.dtype("uint8") in types) == ("8bit" in name), name
