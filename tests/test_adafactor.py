"""Adafactor against Optax's on matrices, against its formulas on other axes."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from running import random_grads, random_like, relative_error, run

import lowrank_optax as lro

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
