"""The numerics record: its gradients, and errors of the size that a dtype has."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import numerics

FEW = numerics.Settings(steps=3, conditions=(1e1, 1e4))


@pytest.mark.parametrize("condition", [1e1, 1e4])
def test_gradients_have_their_condition_and_turn(condition):
    grads = numerics.gradients(FEW, condition, np.float64)
    assert grads.keys() == numerics.SHAPES.keys()
    for name, shape in numerics.SHAPES.items():
        assert grads[name].shape == (3, *shape)
        for g in grads[name]:
            assert np.linalg.cond(g) == pytest.approx(condition, rel=1e-6)
        cosine = np.vdot(grads[name][0], grads[name][1])
        cosine /= np.linalg.norm(grads[name][0]) * np.linalg.norm(grads[name][1])
        assert 0.2 < cosine < 0.999
    rounded = numerics.gradients(FEW, condition, jnp.bfloat16)["wide"]
    np.testing.assert_array_equal(rounded, rounded.astype(jnp.bfloat16))


def test_errors_are_those_of_the_dtype(tmp_path):
    found = numerics.errors("optax.adamw", "XLA", FEW)
    assert found.keys() == {"float32", "bfloat16"}
    # 1 - 0.999 has a thousandth of float32's digits, and Adam its root.
    for error in found["float32"].values():
        assert 1e-8 < error < 1e3 * 2.0**-24
    for error in found["bfloat16"].values():  # of one rounding of each number
        assert 2.0**-12 < error < 2.0**-8
    numerics.plot({"optax.adamw, XLA": found}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
    assert "| optax.adamw, XLA |" in numerics.page({"optax.adamw, XLA": found})


def test_a_record_is_gone_on_with(tmp_path, monkeypatch):
    made = {"float32": {"1e+01": 0.5}, "bfloat16": {"1e+01": 0.25}}
    calls = []
    monkeypatch.setattr(numerics, "errors", lambda *x: calls.append(x[:2]) or made)
    settings = dataclasses.replace(FEW, only="^(mlorc_adamw|flora)$", out=tmp_path)
    numerics.main(settings)
    assert calls == [("flora", "XLA"), *(("mlorc_adamw", x) for x in numerics.TIERS)]
    numerics.main(settings)
    assert len(calls) == 4
    assert "5.0e-01" in (tmp_path / "numerics.md").read_text()
