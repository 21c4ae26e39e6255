"""Gradients summed in the subspace: equal to the whole batch, small, refused if not."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from running import (
    assert_close,
    norm,
    random_grads,
    random_like,
    relative_error,
    run,
)

import lowrank_optax as lro
from benchmarks.steps import matrices

ADAM, MOMENTUM = optax.scale_by_adam(), optax.trace(0.9)
EVERY = 3
SHAPES = {"tall": (7, 4), "wide": (4, 7), "bias": (5,), "embed": (6, 4)}


def windows(grads):
    return [grads[i : i + EVERY] for i in range(0, len(grads), EVERY)]


def means(grads):
    return [jax.tree.map(lambda *g: sum(g) / EVERY, *w) for w in windows(grads)]


def project(inner=ADAM, rank=2, **parts):
    parts = {"subspace": lro.RandomOrthonormal(), "transfer": lro.Rotate()} | parts
    return lro.project_gradients(inner, rank=rank, refresh=lro.Every(2), **parts)


def test_an_inner_optimizer_may_be_compiled_by_itself():
    params = random_like(SHAPES, 0)
    grads = random_grads(params, 4 * EVERY)
    inner = optax.chain(project(MOMENTUM), optax.scale(-1.0))
    compiled = optax.GradientTransformationExtraArgs(
        jax.jit(inner.init), jax.jit(inner.update)
    )
    found = run(lro.accumulate_gradients(compiled, EVERY), params, grads)
    wanted = run(lro.accumulate_gradients(inner, EVERY), params, grads)
    assert_close(found, wanted, 1e-6)


def test_the_formulas_with_the_basis_of_the_first_micro_batch():
    params = random_like({"w": (5, 8), "b": (3,)}, 0)
    grads = random_grads(params, 4 * EVERY)
    tx = lro.galore_project(
        ADAM, rank=2, update_every=2, subspace=lro.TopSingular("svd")
    )
    tx = lro.accumulate_gradients(tx, EVERY)
    update, state, updates, bases = jax.jit(tx.update), tx.init(params), [], []
    for g in grads:
        u, state = update(g, state, params)
        updates.append(u)
        bases.append(reference.wide(state.inner_state.basis["w"]))
    for i, window in enumerate(windows(grads)):
        chosen = reference.top_singular(grads[i // 2 * 2 * EVERY]["w"], 2)
        for basis in bases[i * EVERY : (i + 1) * EVERY]:
            assert relative_error(basis @ basis.T, chosen @ chosen.T) < 1e-5
        assert_close(updates[i * EVERY], jax.tree.map(jnp.zeros_like, window[0]), 0, 0)
    mean = means(grads)
    expected = reference.galore_adam(
        [g["w"] for g in mean], {0: bases[0], 2: bases[2 * EVERY]}
    )
    for u, want in zip(updates[EVERY - 1 :: EVERY], expected, strict=True):
        assert relative_error(u["w"], want) < 1e-4
    dense = reference.adam([g["b"] for g in mean])
    for u, want in zip(updates[EVERY - 1 :: EVERY], dense, strict=True):
        assert relative_error(u["b"], want) < 1e-4


# With bases that do not depend on the gradients, it is the update by their mean.
EXACT = {
    "Adam": project(),
    "Flora": lro.flora_project(MOMENTUM, rank=2, update_every=2),
    "a whole optimizer": optax.chain(
        optax.scale(2.0),
        project(lro.scale_by_adam_mini(), transfer=lro.Keep(), side="long"),
        optax.add_decayed_weights(0.1),
        optax.scale_by_schedule(lambda count: -0.1 / (1 + count)),
    ),
    "hyperparameters": lro.inject_hyperparams(lro.golore_adamw)(
        lambda count: 0.1 / (1 + count), rank=2, switch_step=0, update_every=2
    ),
    # Moments that move with the basis are stored once more, so here they do not.
    "in bytes": lro.quantize_state(
        project(rank=64, transfer=lro.Keep(), matrices=lro.MatrixAxes())
    ),
    "in factors": lro.mlorc_compress(
        project(rank=4, transfer=lro.Keep(), matrices=lro.MatrixAxes()), rank=2
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_equals_the_update_by_the_mean(name):
    tx = EXACT[name]
    large = {"large": (65, 70)} if name == "in bytes" else {}
    params = random_like(SHAPES | large, 0)
    grads = random_grads(params, 4 * EVERY)
    expected, _ = run(tx, params, means(grads))
    updates, _ = run(lro.accumulate_gradients(tx, EVERY), params, grads)
    # Of bytes, one that lies between two codes goes to the other by a rounding error.
    atol = 1e-3 if name == "in bytes" else 1e-5
    assert_close(updates[EVERY - 1 :: EVERY], expected, rtol=1e-4, atol=atol)
    for i in range(EVERY - 1):
        between = [jax.tree.map(jnp.zeros_like, params)] * 4
        assert_close(updates[i::EVERY], between, 0, 0)


def test_a_scan_goes_on_within_a_window():
    params = random_like(SHAPES, 0)
    grads = random_grads(params, 2 * EVERY)
    tx = lro.accumulate_gradients(lro.galore_adamw(0.1, rank=2), EVERY)
    expected, last = run(tx, params, grads)
    _, state = run(tx, params, grads[:2])
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads[2:])

    def step(state, g):
        updates, state = tx.update(g, state, params)
        return state, updates

    state, updates = jax.jit(lambda s: jax.lax.scan(step, s, stacked))(state)
    assert_close(state, last)
    assert_close(updates, jax.tree.map(lambda *u: jnp.stack(u), *expected[2:]))
    assert int(state[0].count) == 0 and int(state[0].inner_state.step) == 2


# What it keeps


def test_bytes_are_those_of_the_state_and_one_projected_gradient():
    stack = {"stack": (3, 6, 9)}
    params = random_like(SHAPES | stack, 0, jnp.bfloat16)
    tx = project(matrices=lro.MatrixAxes())
    extra = lro.state_bytes(lro.accumulate_gradients(tx, 8), params)
    extra -= lro.state_bytes(tx, params)
    # (r, n) at matrices, whole leaves elsewhere, in float32; and a count.
    projected = 2 * 7 + 2 * 7 + 3 * 2 * 9
    assert extra == 4 * (projected + 5 + 6 * 4 + 1)


def test_llama_60m_needs_less_than_a_tenth_beside_its_dense_leaves():
    shapes = matrices("60m", layers=8) | {
        "embed": (32000, 512),
        "lm_head": (512, 32000),
    }
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    tx = lro.galore_adamw(1e-2, rank=128)
    alone, dense = lro.state_bytes(tx, params), 4 * 2 * 32000 * 512
    assert lro.state_bytes(lro.accumulate_gradients(tx, 8), params) < 1.1 * (
        alone + dense
    )
    whole = 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    assert alone + whole > 1.1 * (alone + dense)  # as optax.MultiSteps would keep


# Gradients that cannot be used


def test_a_basis_is_found_by_the_first_gradient_that_is_not_zero():
    params = random_like({"w": (5, 8)}, 0)
    grads = random_grads(params, EVERY)
    grads[0] = jax.tree.map(jnp.zeros_like, grads[0])
    tx = project(subspace=lro.TopSingular("svd"))
    updates, state = run(lro.accumulate_gradients(tx, EVERY), params, grads)
    chosen = reference.top_singular(grads[1]["w"], 2)
    basis = reference.wide(state.inner_state.basis["w"])
    assert relative_error(basis @ basis.T, chosen @ chosen.T) < 1e-5
    mean = reference.wide(means(grads)[0]["w"])
    expected = reference.galore_adam([mean], {0: basis})
    assert relative_error(updates[-1]["w"], expected[0]) < 1e-5


def test_a_bad_micro_batch_spoils_no_more_than_its_window():
    params = random_like({"w": (5, 8)}, 0)
    grads = random_grads(params, 2 * EVERY)
    grads[1] = jax.tree.map(lambda g: g.at[0, 0].set(jnp.nan), grads[1])
    tx = lro.accumulate_gradients(project(), EVERY)
    updates, state = run(tx, params, grads)
    assert not np.all(np.isfinite(updates[EVERY - 1]["w"]))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
    assert np.all(np.isfinite(updates[-1]["w"]))
    # Inside of it, one that is not finite is left out, and the window waits for more.
    tx = lro.accumulate_gradients(optax.apply_if_finite(project(), 9), EVERY)
    updates, state = run(tx, params, grads)
    kept, _ = run(tx, params, [grads[0], *grads[2:]])
    assert_close(updates[EVERY]["w"], kept[EVERY - 1]["w"])
    assert norm(updates[EVERY]) > 0 == norm(updates[EVERY - 1])
    assert state.total_notfinite == 1 and state.notfinite_count == 0


def test_too_many_bad_micro_batches_are_let_through():
    params = random_like({"w": (5, 8)}, 0)
    bad = jax.tree.map(lambda x: jnp.nan * x, params)
    tx = lro.accumulate_gradients(optax.apply_if_finite(project(), 2), EVERY)
    updates, state = run(tx, params, [bad] * (2 + EVERY))
    assert state.notfinite_count == state.total_notfinite == 2 + EVERY
    assert all(norm(u) == 0 for u in updates[:-1])
    assert not np.any(np.isfinite(updates[-1]["w"]))


# What it cannot be used with


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (lro.mlorc_adamw(0.1), "an optimizer of the state CompressState, .* subspace"),
        (optax.adamw(0.1), "an optimizer of the state ScaleByAdamState, .* subspace"),
        (
            lro.fira_adamw(0.1, rank=2),
            "FiraResidual: accumulate_gradients requires a recovery that needs the "
            "projected gradient alone, FiraResidual does not provide it",
        ),
        (lro.apollo_adamw(0.1, rank=2), "ScaleGradient: .* alone"),
        (project(recovery=lro.SparseResidual()), "SparseResidual: .* alone"),
        (
            optax.chain(MOMENTUM, project()),
            "moments of '.*' that come before the projection: .* only the projection",
        ),
        (
            optax.chain(optax.add_noise(0.1, 0.0, key=jax.random.key(0)), project()),
            "optax.add_noise: .* nothing before .*Put it before accumulate_gradients",
        ),
        (
            optax.masked(project(), {"tall": True, "wide": False}),
            "the parameter 'wide' outside of it: .* every parameter",
        ),
    ],
)
def test_refused_with_the_reason_and_a_remedy(tx, message):
    params = random_like({"tall": (7, 4), "wide": (4, 7)}, 0)
    tx = lro.accumulate_gradients(tx, 2)
    with pytest.raises(ValueError, match="Cannot use accumulate_gradients with") as e:
        tx.init(params)
    assert e.match(message)
    assert e.match("MultiSteps|around the parts|before accumulate_gradients")


def test_a_window_holds_a_gradient():
    with pytest.raises(ValueError, match="`every` must be at least 1, got 0"):
        lro.accumulate_gradients(project(), 0)
