"""LDAdam against its formulas: the algorithm, its identities and its state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from running import assert_close, random_grads, random_like, relative_error, run

import lowrank_optax as lro

B1, B2, RHO, EPS = 0.908, 0.99, 0.908, 1e-8
RANK = 3


def turning(shape, steps, seed=0):
    """Gradients with a slowly turning signal of rank 4 above noise, float32."""
    rng = np.random.default_rng(seed)
    u, v = (rng.standard_normal((n, 4)) for n in shape[-2:])
    grads = []
    for _ in range(steps):
        u, v = (x + 0.1 * rng.standard_normal(x.shape) for x in (u, v))
        signal = u * [4.0, 3.0, 2.0, 1.5] @ v.T
        grads.append((signal + 0.3 * rng.standard_normal(shape)).astype(np.float32))
    return grads


def transcribed(grads, rank, error_feedback, bases=None):
    """LDAdam on (m, n), m <= n, in float64, by Householder QR and an exact SVD.

    Args:
      bases: to be used instead of its own choice, one a step.

    Returns:
      ``(direction, basis, mu, nu, error)`` of each step.
    """
    m, n = grads[0].shape
    basis, error = np.zeros((m, rank)), np.zeros((m, n))
    mu = nu = np.zeros((rank, n))
    steps = []
    for k, g in enumerate(grads):
        a = np.asarray(g, np.float64) + error
        old = basis
        if k == 0:
            basis = np.linalg.svd(a)[0][:, :rank]
        else:
            mu_hat, nu_hat = mu / (1 - B1**k), nu / (1 - B2**k)
            b = RHO * old @ mu_hat + (1 - RHO) * a
            basis = np.linalg.qr(b @ (b.T @ old))[0]
        basis = basis if bases is None else np.asarray(bases[k], np.float64)
        r, c = basis.T @ a, basis.T @ old
        carried = c @ mu
        if error_feedback:
            change = old @ mu - basis @ carried
            error = a - basis @ r + B1 / (1 - B1) * change
        if k:
            centred = c**2 @ (nu_hat - mu_hat**2)
            nu = (1 - B2**k) * np.abs(centred + (carried / (1 - B1**k)) ** 2)
        mu = B1 * carried + (1 - B1) * r
        nu = B2 * nu + (1 - B2) * r**2
        t = k + 1
        scaled = mu / (1 - B1**t) / (np.sqrt(nu / (1 - B2**t)) + EPS)
        steps.append((basis @ scaled, basis, mu, nu, error))
    return steps


def trajectory(tx, params, grads):
    """``(updates, states)``, one of each a step."""
    update, state = jax.jit(tx.update), tx.init(params)
    updates, states = [], []
    for g in grads:
        u, state = update(g, state, params)
        updates.append(u)
        states.append(state)
    return updates, states


@pytest.mark.parametrize("error_feedback", [True, False])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)], ids=str)
def test_follows_the_transcription(shape, error_feedback):
    grads = turning(shape, 50)
    params = {"w": jnp.ones(shape)}
    tx = lro.scale_by_ldadam(RANK, error_feedback=error_feedback)
    updates, states = trajectory(tx, params, [{"w": g} for g in grads])
    turned = [g.T if shape[0] > shape[1] else g for g in grads]  # a square stays
    bases = [s.own["basis"]["w"] for s in states]
    given = transcribed(turned, RANK, error_feedback, bases)
    own = transcribed(turned, RANK, error_feedback)
    moved = np.zeros(given[0][0].shape)
    wanted, free = moved, moved
    for t, (u, s) in enumerate(zip(updates, states, strict=True)):
        direction, _, mu, nu, error = given[t]
        # As in the reference trajectories, the way from the start is compared: where
        # the second moment cancels to next to nothing, one entry of one step is as
        # good as float32.
        moved = moved + (u["w"].T if shape[0] > shape[1] else u["w"])
        wanted, free = wanted + direction, free + own[t][0]
        assert relative_error(moved, wanted) < 1e-4
        assert relative_error(moved, free) < 1e-3  # with bases of its own
        assert relative_error(s.inner_state.mu["w"], mu) < 1e-4
        assert relative_error(s.inner_state.nu["w"], nu) < 1e-4
        if error_feedback:  # which lies as the leaf does
            kept = s.own["error"]["w"]
            assert kept.shape == shape
            kept = kept.T if shape[0] > shape[1] else kept
            assert relative_error(kept, error) < 1e-4


def test_the_subspace_is_one_block_power_step():
    grads = turning((6, 10), 12)
    params = {"w": jnp.ones((6, 10))}
    tx = lro.scale_by_ldadam(RANK)
    _, states = trajectory(tx, params, [{"w": g} for g in grads])
    start = np.asarray(states[0].own["basis"]["w"])
    np.testing.assert_allclose(
        start @ start.T, _projector(np.linalg.svd(grads[0])[0][:, :RANK]), atol=1e-5
    )
    for t in range(1, 12):
        before, basis = states[t - 1], np.asarray(states[t].own["basis"]["w"])
        np.testing.assert_allclose(basis.T @ basis, np.eye(RANK), atol=1e-5)
        old = np.asarray(before.own["basis"]["w"], np.float64)
        a = grads[t] + np.asarray(before.own["error"]["w"], np.float64)
        mu_hat = np.asarray(before.inner_state.mu["w"]) / (1 - B1**t)
        b = RHO * old @ mu_hat + (1 - RHO) * a
        expected = _projector(np.linalg.qr(b @ b.T @ old)[0])
        np.testing.assert_allclose(_projector(basis), expected, atol=1e-4)


def _projector(basis):
    return basis @ basis.T


def test_nothing_of_a_gradient_is_lost():
    """``P M + (1 - b1) E`` is an exact average of all gradients, whatever the bases."""
    grads = turning((6, 10), 30)
    tx = lro.scale_by_ldadam(RANK)
    _, states = trajectory(tx, {"w": jnp.ones((6, 10))}, [{"w": g} for g in grads])
    momentum = error = np.zeros((6, 10))
    for g, s in zip(grads, states, strict=True):
        kept = B1 * momentum + (1 - B1) * (error + g)
        momentum = np.asarray(s.own["basis"]["w"]) @ np.asarray(s.inner_state.mu["w"])
        error = np.asarray(s.own["error"]["w"])
        assert relative_error(momentum + (1 - B1) * error, kept) < 1e-5
    assert np.linalg.norm(error) > 0.1 * np.linalg.norm(grads[-1])


def test_the_error_has_no_part_in_the_basis_that_left_it():
    """Which is why a basis is looked for without projecting the error."""
    for shape in ((6, 10), (10, 6)):
        tx = lro.scale_by_ldadam(RANK)
        grads = [{"w": g} for g in turning(shape, 30)]
        _, states = trajectory(tx, {"w": jnp.ones(shape)}, grads)
        for s in states[1:]:
            error = np.asarray(s.own["error"]["w"], np.float64)
            basis = np.asarray(s.own["basis"]["w"], np.float64)
            within = (error.T if shape[0] > shape[1] else error).T @ basis
            assert np.linalg.norm(within) < 2e-6 * np.linalg.norm(error)


def test_at_full_rank_the_momentum_is_adams_and_the_error_vanishes():
    grads = turning((6, 10), 20)
    params = {"w": jnp.ones((6, 10))}
    tx = lro.scale_by_ldadam(100, matrices=lro.MatrixAxes())
    _, states = trajectory(tx, params, [{"w": g} for g in grads])
    expected = np.zeros((6, 10))
    for g, s in zip(grads, states, strict=True):
        expected = B1 * expected + (1 - B1) * g
        momentum = s.own["basis"]["w"] @ s.inner_state.mu["w"]
        assert relative_error(momentum, expected) < 1e-4
        assert np.linalg.norm(s.own["error"]["w"]) < 1e-4 * np.linalg.norm(g)


def test_second_moments_are_never_negative():
    # Without the absolute value they would be: jumps of the subspace carry a variance
    # that is smaller than the square of the mean.
    params = {"w": jnp.ones((6, 10))}
    rng = np.random.default_rng(3)
    grads = [
        {"w": np.outer(rng.standard_normal(6), rng.standard_normal(10)) * 5.0**i}
        for i in rng.integers(-2, 3, 40)
    ]
    _, states = trajectory(lro.scale_by_ldadam(RANK), params, grads)
    for s in states:
        assert np.all(np.asarray(s.inner_state.nu["w"]) >= 0)


@pytest.mark.parametrize("error_feedback", [True, False])
def test_state_bytes_are_those_of_the_formula(error_feedback):
    params = {
        "wide": jnp.ones((24, 40)),
        "tall": jnp.ones((40, 24)),
        "square": jnp.ones((32, 32)),
        "stack": jnp.ones((5, 8, 12)),
        "bias": jnp.ones(7),
    }
    matrices = {name: lro.MatrixAxes() for name in params if name != "bias"}
    tx = lro.scale_by_ldadam(4, error_feedback=error_feedback, matrices=matrices)
    numbers = 2 * 7
    for count, m, n in [(1, 24, 40), (1, 40, 24), (1, 32, 32), (5, 8, 12)]:
        s, longer = min(m, n), max(m, n)
        numbers += count * (s * 4 + 2 * longer * 4 + m * n * error_feedback)
    counters = 2 * 4  # our step and Adam's
    assert lro.state_bytes(tx, params) == 4 * numbers + counters
    ranks = {row.path: row.rank for row in lro.describe(tx, params)}
    assert ranks == {**dict.fromkeys(matrices, 4), "bias": None}


def test_the_error_can_have_a_dtype_of_its_own():
    params = {"w": jnp.ones((64, 80))}
    grads = random_grads(params, 4)
    tx = lro.scale_by_ldadam(4)
    narrow = lro.compress_state(tx, {"error": lro.Cast(jnp.bfloat16)})
    saved = lro.state_bytes(tx, params) - lro.state_bytes(narrow, params)
    assert saved == 2 * 64 * 80 - 4  # and one more counter
    updates, state = run(narrow, params, grads)
    assert state.inner_state.own["error"]["w"].value.dtype == jnp.bfloat16
    expected, _ = run(tx, params, grads)
    assert 0 < relative_error(updates[-1]["w"], expected[-1]["w"]) < 0.1


def test_an_unusable_first_gradient_only_delays_the_start():
    params = random_like({"w": (6, 10)}, 0)
    grads = [{"w": jnp.asarray(g)} for g in turning((6, 10), 3)]
    bad = {"w": grads[0]["w"].at[0, 0].set(jnp.nan)}
    tx = lro.scale_by_ldadam(RANK)
    _, late = run(tx, params, [bad, grads[0]])
    _, fresh = run(tx, params, [grads[0]])
    assert_close(late.own, fresh.own)
    assert_close(late.inner_state.mu, fresh.inner_state.mu)


@pytest.mark.parametrize("value", [0.0, jnp.nan, jnp.inf])
def test_a_bad_gradient_in_between(value):
    params = random_like({"w": (6, 10)}, 0)
    grads = [{"w": jnp.asarray(g)} for g in turning((6, 10), 8)]
    bad = {"w": jnp.full((6, 10), value)}
    tx = lro.scale_by_ldadam(RANK)
    updates, state = run(tx, params, [*grads[:3], bad, bad, *grads[3:]])
    expected, _ = run(tx, params, grads)
    basis = state.own["basis"]["w"]
    assert_close(basis.T @ basis, jnp.eye(RANK), atol=1e-5)
    cosine = optax.tree.vdot(updates[-1], expected[-1]) / (
        optax.tree.norm(updates[-1]) * optax.tree.norm(expected[-1])
    )
    assert cosine > 0.8


@pytest.mark.parametrize("error_feedback", [True, False])
def test_the_bases_do_not_depend_on_the_size_of_the_gradients(error_feedback):
    grads = turning((6, 10), 4)
    params = {"w": jnp.ones((6, 10))}
    tx = lro.scale_by_ldadam(RANK, error_feedback=error_feedback)
    bases = []
    for scale in (1.0, 2.0**-80, 2.0**50):  # squares of which no float32 holds
        _, states = trajectory(tx, params, [{"w": scale * g} for g in grads])
        bases.append([s.own["basis"]["w"] for s in states])
    assert relative_error(bases[0][-1], bases[0][0]) > 1e-2
    for scaled in bases[1:]:
        assert relative_error(scaled, bases[0]) < 1e-4


def test_parameters_may_be_narrower_than_the_widest_floats():
    with jax.enable_x64(True):
        for dtype in (jnp.float32, jnp.float64, jnp.bfloat16):
            params = {"w": jnp.ones((5, 8), dtype)}
            tx = lro.scale_by_ldadam(RANK)
            before = tx.init(params)
            updates, after = jax.jit(tx.update)(params, before, params)
            assert updates["w"].dtype == dtype
            assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, before)


def test_ldadamw_decays_the_weights_before_the_step():
    params = random_like({"w": (6, 10), "b": (4,)}, 0)
    grads = random_grads(params, 3)
    tx = lro.ldadamw(0.01, RANK, weight_decay=0.1)
    bare, state = lro.scale_by_ldadam(RANK), tx.init(params)
    directions, _ = run(bare, params, grads)
    for g, d in zip(grads, directions, strict=True):
        updates, state = tx.update(g, state, params)
        expected = jax.tree.map(lambda p, x: p * (1 - 0.01 * 0.1) - 0.01 * x, params, d)
        params = optax.apply_updates(params, updates)
        assert_close(params, expected)


@pytest.mark.parametrize("rank, error", [(0, ValueError), (2.0, TypeError)])
def test_refuses_a_rank(rank, error):
    with pytest.raises(error, match="`rank` must be"):
        lro.scale_by_ldadam(rank)
