"""What becomes of moments at a refresh: against NumPy, by sampling, and by name."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import lowrank_optax as lro
from lowrank_optax._src.leaves.roles import role_of


def carry(transfer, moments, overlap):
    """Of fields that are what their names mean in Optax's states."""
    known = {name: role_of(None, name.rpartition("/")[2]) for name in moments}
    return transfer.carry(moments, overlap, known)


def basis(m, r, seed, batch=()):
    rng = np.random.default_rng(seed)
    return np.linalg.qr(rng.standard_normal((*batch, m, r)))[0]


def moments(r, n, seed=0, batch=()):
    rng = np.random.default_rng(seed)
    m = rng.standard_normal((*batch, r, n)).astype(np.float32)
    return {"mu": m, "nu": np.abs(rng.standard_normal(m.shape)).astype(np.float32)}


def overlap(new, old):
    return jnp.asarray(np.swapaxes(new, -1, -2) @ old, jnp.float32)


@pytest.mark.parametrize("transfer", [lro.Keep(), lro.Rotate(), lro.Reset()], ids=str)
def test_transfers_follow_the_protocol(transfer):
    assert isinstance(transfer, lro.Transfer)
    before = moments(3, 5)
    after = carry(transfer, dict(before), overlap(basis(8, 3, 0), basis(8, 3, 1)))
    assert after.keys() == before.keys()
    for name, x in after.items():
        assert x.shape == before[name].shape and x.dtype == before[name].dtype
    assert np.all(after["nu"] >= 0)


def test_keep_changes_nothing():
    before = moments(3, 5)
    after = carry(lro.Keep(), before, overlap(basis(8, 3, 0), basis(8, 3, 1)))
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])


def test_reset_forgets():
    after = carry(lro.Reset(), moments(3, 5) | {"scalar": jnp.ones(())}, jnp.eye(3))
    for x in after.values():
        np.testing.assert_array_equal(x, np.zeros_like(x))


@hypothesis.given(st.integers(0, 10**6), st.sampled_from([(), (2,), (2, 3)]))
def test_rotate_matches_numpy(seed, batch):
    new, old = basis(8, 3, seed, batch), basis(8, 3, seed + 1, batch)
    before = moments(3, 5, seed, batch)
    after = carry(lro.Rotate(), before, overlap(new, old))
    m, v = reference.rotate(before["mu"], before["nu"], np.swapaxes(new, -1, -2) @ old)
    np.testing.assert_allclose(after["mu"], m, rtol=0, atol=1e-5)
    np.testing.assert_allclose(after["nu"], v, rtol=0, atol=1e-5)
    assert np.all(after["nu"] >= 0)


def test_rotate_within_the_same_subspace_keeps_the_decoded_momentum():
    old = basis(8, 3, 0)
    new = old @ basis(3, 3, 1)
    before = moments(3, 5)
    after = carry(lro.Rotate(), before, overlap(new, old))
    np.testing.assert_allclose(new @ after["mu"], old @ before["mu"], atol=1e-5)
    same = carry(lro.Rotate(), before, overlap(old, old))
    for name in before:
        np.testing.assert_allclose(same[name], before[name], atol=1e-5)


def test_rotated_second_moment_is_the_sampled_variance():
    rng = np.random.default_rng(0)
    c = np.swapaxes(basis(8, 3, 0), -1, -2) @ basis(8, 3, 1)
    v = np.array([4.0, 1.0, 0.25])
    samples = rng.standard_normal((200_000, 3)) * np.sqrt(v)
    variance = np.var(samples @ c.T, axis=0)
    after = carry(
        lro.Rotate(coverage=1.0),
        {"nu": jnp.asarray(v[:, None], jnp.float32)},
        jnp.asarray(c, jnp.float32),
    )
    # The variance of n samples has a relative deviation of sqrt(2 / n) = 0.3 %.
    np.testing.assert_allclose(after["nu"][:, 0], variance, rtol=0.015)


def test_steps_do_not_grow_as_bases_cover_little_of_each_other():
    """AR-17: new directions whose variance was taken for small would move too far."""
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((64, 4)) @ rng.standard_normal((4, 96)) / 8

    def sizes(transfer):
        tx = lro.project_gradients(
            optax.scale_by_adam(),
            rank=8,
            subspace=lro.RandomOrthonormal(),
            refresh=lro.Every(25),
            transfer=transfer,
        )
        update, state = jax.jit(tx.update), tx.init({"w": jnp.zeros(signal.shape)})
        found = []
        for _ in range(75):
            grad = signal + 0.5 * rng.standard_normal(signal.shape)
            updates, state = update({"w": jnp.asarray(grad, jnp.float32)}, state)
            found.append(float(jnp.linalg.norm(updates["w"])))
        return np.array(found)

    covered = sizes(lro.Rotate())
    assert np.mean(covered[25:]) < 1.1 * np.mean(covered[10:25])
    uncovered = sizes(lro.Rotate(coverage=1.0))
    assert np.mean(uncovered[25:]) > 1.3 * np.mean(uncovered[10:25])  # it matters


@pytest.mark.parametrize("coverage", [0.0, 1.5])
def test_a_coverage_that_is_no_share_is_refused(coverage):
    with pytest.raises(ValueError, match=r"`coverage` must be in \(0, 1\]"):
        lro.Rotate(coverage=coverage)


def test_rotate_preserves_more_momentum_than_keep():
    """Signal plus noise before and after a refresh, as in the notes on GaLore (1.5)."""
    rng = np.random.default_rng(0)
    signal = basis(64, 8, 1) * np.linspace(2, 1, 8) @ basis(48, 8, 2).T
    errors = {"keep": [], "rotate": []}
    for _ in range(10):
        grads = [signal + 0.02 * rng.standard_normal(signal.shape) for _ in range(2)]
        old, new = (reference.top_singular(g, 12) for g in grads)
        new *= np.where(np.sum(new * old, 0) < 0, -1, 1)  # as the engine aligns signs
        m = {"mu": jnp.asarray(old.T @ grads[0], jnp.float32)}
        truth = old @ m["mu"]
        for name, transfer in (("keep", lro.Keep()), ("rotate", lro.Rotate())):
            carried = new @ carry(transfer, m, overlap(new, old))["mu"]
            errors[name].append(np.linalg.norm(carried - truth) / np.linalg.norm(truth))
    assert np.mean(errors["rotate"]) < 0.7 * np.mean(errors["keep"])


@pytest.mark.parametrize("path", ["mu", "trace", "0/mu", "inner_state/1/trace"])
def test_first_moments_are_known_by_the_end_of_their_path(path):
    c = overlap(basis(8, 3, 0), basis(8, 3, 1))
    x = moments(3, 5)["mu"]
    after = carry(lro.Rotate(), {path: x}, c)[path]
    np.testing.assert_allclose(after, np.asarray(c) @ x, atol=1e-5)


@pytest.mark.parametrize("path", ["nu", "v", "0/nu", "nu_max", "sum_of_squares"])
def test_second_moments_are_known_by_the_end_of_their_path(path):
    c = overlap(basis(8, 3, 0), basis(8, 3, 1))
    x = moments(3, 5)["nu"]
    after = carry(lro.Rotate(), {path: x}, c)[path]
    expected = reference.rotate(x, x, c)[1]
    np.testing.assert_allclose(after, expected, atol=1e-5)


def test_factored_moments_rotate_along_the_basis_only():
    c = overlap(basis(8, 3, 0), basis(8, 3, 1))
    state = optax.scale_by_factored_rms(min_dim_size_to_factor=1).init(jnp.ones((3, 5)))
    assert state.v_row.shape == (3,) and state.v_col.shape == (5,)
    v_row, v_col = jnp.asarray([3.0, 2.0, 1.0]), jnp.arange(5.0)
    after = carry(lro.Rotate(), {"v_row": v_row, "v_col": v_col}, c)
    expected = reference.rotate(v_row[:, None], v_row[:, None], c)[1][:, 0]
    np.testing.assert_allclose(after["v_row"], expected, atol=1e-5)
    np.testing.assert_array_equal(after["v_col"], v_col)


def test_rotate_refuses_to_guess():
    c = overlap(basis(8, 3, 0), basis(8, 3, 1))
    x = moments(3, 5)["mu"]
    with pytest.raises(ValueError) as error:
        carry(lro.Rotate(), {"0/velocity": x}, c)
    message = str(error.value)
    for part in ("'0/velocity'", "(3, 5)", "Rotate(first=...)", "Keep()", "Reset()"):
        assert part in message
    after = carry(lro.Rotate(first=("velocity",)), {"0/velocity": x}, c)
    np.testing.assert_allclose(after["0/velocity"], np.asarray(c) @ x, atol=1e-5)
    after = carry(lro.Rotate(second=("velocity",)), {"0/velocity": abs(x)}, c)
    np.testing.assert_allclose(
        after["0/velocity"], reference.rotate(abs(x), abs(x), c)[1], atol=1e-5
    )
    # What has no axis along the basis has nothing to rotate.
    scale = carry(lro.Rotate(), {"scale": jnp.ones(5), "other": jnp.ones((4, 5))}, c)
    np.testing.assert_array_equal(scale["scale"], np.ones(5))
    np.testing.assert_array_equal(scale["other"], np.ones((4, 5)))


def test_the_engine_reaches_the_refusal():
    def init(params):
        return {"velocity": optax.tree.zeros_like(params)}

    def update(updates, state, params=None):
        new = optax.tree.add_scale(updates, 0.9, state["velocity"])
        return new, {"velocity": new}

    inner = optax.GradientTransformation(init, update)
    params = {"w": jnp.ones((4, 6))}

    def step(transfer):
        tx = lro.project_gradients(inner, rank=2, transfer=transfer)
        return jax.eval_shape(tx.update, params, tx.init(params))

    with pytest.raises(ValueError, match="state field 'velocity'"):
        step(lro.Rotate())
    step(lro.Rotate(first=("velocity",)))


def test_a_row_of_second_moments_for_the_basis_vectors_cannot_be_rotated():
    first = moments(3, 5)["mu"]
    turned = overlap(basis(8, 3, 0), basis(8, 3, 1))
    row = {"mu": first, "nu": np.ones((1, 3), np.float32)}
    with pytest.raises(ValueError, match="state field 'nu' of shape .1, 3.*rows are"):
        carry(lro.Rotate(), row, turned)
    # One number a row, or for each column, is another thing.
    for shape in [(3, 1), (1, 5)]:
        column = {"mu": first, "nu": np.ones(shape, np.float32)}
        assert carry(lro.Rotate(), column, turned)["nu"].shape == shape
