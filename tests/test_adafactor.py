"""Adafactor against Optax's on matrices, against its formulas on other axes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from running import random_grads, random_like, relative_error, run

import lowrank_optax as lro
from lowrank_optax._src.methods.adafactor import clip_by_matrix_rms

SHAPES = {"wide": (6, 9), "tall": (9, 6), "square": (5, 5), "bias": (9,), "scalar": ()}


def optax_adafactor(decay_rate, threshold):
    """With factors for matrices of any size, which Optax has from 128 on."""
    parts = [
        optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=1)
    ]
    if threshold is not None:
        parts.append(optax.clip_by_block_rms(threshold))
    return optax.chain(*parts)


@pytest.mark.parametrize(("decay_rate", "threshold"), [(0.8, 1.0), (0.5, None)])
def test_on_two_axes_it_is_that_of_optax(decay_rate, threshold):
    params = random_like(SHAPES, 0)
    # One large gradient, so that the clip is met.
    grads = random_grads(params, 6)
    grads[4] = optax.tree.scale(20.0, grads[4])
    updates, state = run(
        lro.scale_by_adafactor(decay_rate=decay_rate, clipping_threshold=threshold),
        params,
        grads,
    )
    expected, theirs = run(optax_adafactor(decay_rate, threshold), params, grads)
    for u, want in zip(updates, expected, strict=True):
        for name in SHAPES:
            assert relative_error(u[name], want[name]) < 1e-6
    sizes = [np.sqrt(np.mean(np.square(u["wide"]))) for u in updates]
    assert (max(sizes) > 1.2) == (threshold is None)
    for field, name in {"v": "bias", "v_row": "wide", "v_col": "wide"}.items():
        kept = getattr(state, field)[name]
        assert kept.shape == {"v": (9,), "v_row": (6,), "v_col": (9,)}[field]
        assert relative_error(kept, optax.tree.get(theirs, field)[name]) < 1e-6


def test_rows_and_columns_can_be_named():
    """A query kernel by its embedding and its heads; what is not named as it was."""
    params = random_like({"query": (5, 2, 3), "w": (4, 6)}, 0)
    grads = random_grads(params, 3)
    matrices = {"query": lro.MatrixAxes(rows=0, cols=(1, 2))}
    updates, state = run(lro.scale_by_adafactor(matrices=matrices), params, grads)
    assert state.v_row["query"].shape == (5,) and state.v_col["query"].shape == (6,)
    flat = [{**g, "query": g["query"].reshape(5, 6)} for g in grads]
    expected, _ = run(optax_adafactor(0.8, 1.0), flat[0], flat)
    for u, want in zip(updates, expected, strict=True):
        assert relative_error(u["query"].reshape(5, 6), want["query"]) < 1e-6
        assert relative_error(u["w"], want["w"]) < 1e-6


@pytest.mark.parametrize(
    "tx",
    [
        lro.scale_by_adafactor(clipping_threshold=0.5),
        lro.galore_adafactor(0.1, 2, clipping_threshold=0.5, matrices=lro.MatrixAxes()),
        lro.flora(0.1, 2, clipping_threshold=0.1, matrices=lro.MatrixAxes()),
    ],
    ids=["adafactor", "galore", "flora"],
)
def test_of_a_stack_one_matrix_does_not_clip_another(tx):
    params = {"w": jnp.zeros((3, 4, 6))}
    grads = random_grads(params, 4)
    jumping = [
        {"w": g["w"].at[1].multiply(factor)}
        for g, factor in zip(grads, [1, 10, 1, 100], strict=True)
    ]
    calm, _ = run(tx, params, grads)
    other, _ = run(tx, params, jumping)
    for a, b in zip(calm, other, strict=True):
        assert relative_error(b["w"][0], a["w"][0]) < 1e-6
        assert relative_error(b["w"][2], a["w"][2]) < 1e-6
    assert relative_error(other[1]["w"][1], calm[1]["w"][1]) > 0.01


def in_float64(grads, decay_rate=0.8, threshold=1.0):
    """The formulas of Shazeer and Stern on one matrix."""
    row = col = 0.0
    for t, g in enumerate(np.asarray(grads, np.float64), 1):
        b2, square = 1 - t**-decay_rate, g**2 + 1e-30
        row = b2 * row + (1 - b2) * square.mean(-1)
        col = b2 * col + (1 - b2) * square.mean(-2)
        u = g / np.sqrt(row[:, None] / row.mean() * col)
        yield u / max(1.0, np.sqrt(np.mean(u**2)) / threshold)


ADAFACTOR = lro.scale_by_adafactor()  # one for all cases: they share its compilation


@pytest.mark.parametrize("zero", ["nothing", "row", "column", "both", "all"])
@pytest.mark.parametrize(
    "scales",
    [*([10.0**k] * 3 for k in range(-15, 19, 3)), [1e18, 1e-15, 1e15], [1e-15, 1e18]],
    ids=lambda scales: "-".join(f"{s:.0e}" for s in scales),
)
def test_gradients_of_any_size_with_zeros(scales, zero):
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(len(scales), 8, 16)) * np.reshape(scales, (-1, 1, 1))
    if zero in ("row", "both"):
        grads[:, 3] = 0
    if zero in ("column", "both"):
        grads[:, :, 5] = 0
    if zero == "all":
        grads[:] = 0
    grads = grads.astype(np.float32)
    each = [{"w": jnp.array(g)} for g in grads]
    updates, _ = run(ADAFACTOR, each[0], each)
    for u, want in zip(updates, in_float64(grads), strict=True):
        np.testing.assert_allclose(u["w"], want, rtol=1e-5)


@pytest.mark.parametrize(
    "tx",
    [lro.galore_adafactor(0.1, 2), lro.flora(0.1, 2)],
    ids=["galore", "flora"],
)
@pytest.mark.parametrize("scale", [2.0**-30, 2.0**14, 2.0**50])
def test_a_zero_row_spoils_no_size_of_gradients(tx, scale):
    """Nothing in these knows the size of a gradient; one leaf is not projected."""
    params = random_like({"w": (24, 32), "small": (3, 4)}, 0)
    grads = random_grads(params, 3)
    grads = [{name: g.at[2].set(0) for name, g in step.items()} for step in grads]
    scaled = [optax.tree.scale(scale, step) for step in grads]
    expected, _ = run(tx, params, grads)
    updates, _ = run(tx, params, scaled)
    for u, want in zip(updates, expected, strict=True):
        for name in params:
            assert relative_error(u[name], want[name]) < 1e-5


@pytest.mark.parametrize("outlier", [1e3, 1e20, 1e30])
@pytest.mark.parametrize("threshold", [1.0, 0.25])
def test_the_clip_keeps_what_stands_beside_an_outlier(outlier, threshold):
    x = np.random.default_rng(0).standard_normal((3, 8, 16)).astype(np.float32)
    x[1, 2, 3] = outlier
    x[2] *= 0 if outlier < 1e4 else outlier / 8
    updates, _ = run(clip_by_matrix_rms(threshold), {"w": x}, [{"w": jnp.asarray(x)}])
    exact = x.astype(np.float64)
    size = np.sqrt(np.mean(exact**2, axis=(-2, -1), keepdims=True))
    want = exact / np.maximum(1.0, size / threshold)
    np.testing.assert_allclose(updates[0]["w"], want, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("outlier", [1e20, 3e38])
@pytest.mark.parametrize("whole", ["an entry", "a row"])
def test_finite_gradients_of_any_size_have_finite_updates(outlier, whole):
    tx, params = lro.scale_by_adafactor(), random_like({"w": (48, 32)}, 0)
    update, state = jax.jit(tx.update), tx.init(params)
    for step, grads in enumerate(random_grads(params, 6)):
        if step == 3:
            row = slice(None) if whole == "a row" else 1
            grads["w"] = grads["w"].at[1, row].set(outlier)
        updates, state = update(grads, state, params)
        chex.assert_tree_all_finite((updates, state))
        assert jnp.max(jnp.abs(updates["w"])) < 100
