"""The diagnostics against float64 NumPy, closed forms and their stated invariances."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from running import random_grads, random_like, run

import lowrank_optax as lro
from lowrank_optax import diagnostics

SPECTRAL = {
    "singular_value_ratio": diagnostics.singular_value_ratio,
    "singular_value_ratio_k2": lambda x: diagnostics.singular_value_ratio(x, k=2),
    "effective_rank": diagnostics.effective_rank,
    "effective_rank_energy": lambda x: diagnostics.effective_rank(x, energy=0.7),
    "stable_rank": diagnostics.stable_rank,
}


def expected(name: str, x: np.ndarray) -> float:
    """Each measure from NumPy's float64 singular values, as its definition reads."""
    s = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    if name.startswith("singular_value_ratio"):
        k = 2 if name.endswith("k2") else 8
        return sum(sorted(s)[-k:]) / sum(s)
    if name == "effective_rank":
        p = s / sum(s)
        return float(np.prod(p ** (-p)))
    if name == "effective_rank_energy":
        r = 0
        while sum(s[r:] ** 2) > 0.3 * sum(s**2):
            r += 1
        return r
    return np.linalg.norm(x, "fro") ** 2 / np.linalg.norm(x, 2) ** 2


def orthonormal(rng: np.random.Generator, m: int, r: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((m, r)))[0]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(params=[(24, 40), (12, 12), (9, 1)], ids=str)
def matrix(request, rng):
    """A matrix whose spectrum decays, so that the measures differ from one another."""
    m, n = request.param
    s = min(m, n)
    u, v = orthonormal(rng, m, s), orthonormal(rng, n, s)
    return ((u * 0.8 ** np.arange(s)) @ v.T).astype(np.float32)


@pytest.mark.parametrize("name", SPECTRAL)
def test_spectral_measures_match_numpy(name, matrix):
    result = SPECTRAL[name](matrix)
    assert result.shape == () and result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected(name, matrix), rtol=2e-6)


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("scale", [1e-30, 7e33])
def test_spectral_measures_ignore_scale(name, scale, matrix):
    # Squares of these scales leave the float32 range.
    scaled = SPECTRAL[name](matrix * np.float32(scale))
    np.testing.assert_allclose(scaled, expected(name, matrix), rtol=1e-5)


@pytest.mark.parametrize("name", SPECTRAL)
def test_spectral_measures_ignore_rotation_and_transposition(name, matrix, rng):
    m, n = matrix.shape
    rotated = orthonormal(rng, m, m) @ matrix @ orthonormal(rng, n, n)
    reference = SPECTRAL[name](matrix)
    np.testing.assert_allclose(
        SPECTRAL[name](rotated.astype(np.float32)), reference, rtol=1e-5
    )
    np.testing.assert_allclose(SPECTRAL[name](matrix.T), reference, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 8, 20])
def test_closed_forms_for_equal_singular_values(rank, rng):
    """``rank`` equal singular values: every notion of rank agrees."""
    x = (orthonormal(rng, 48, rank) @ orthonormal(rng, 32, rank).T).astype(np.float32)
    np.testing.assert_allclose(diagnostics.effective_rank(x), rank, rtol=1e-4)
    np.testing.assert_allclose(diagnostics.stable_rank(x), rank, rtol=1e-5)
    np.testing.assert_allclose(
        diagnostics.singular_value_ratio(x), min(1, 8 / rank), rtol=1e-5
    )
    # Half the energy sits in half of the directions, rounded up.
    assert diagnostics.effective_rank(x, energy=0.49) == np.ceil(0.49 * rank)


def test_identity():
    eye = jnp.eye(20)
    np.testing.assert_allclose(diagnostics.effective_rank(eye), 20, rtol=1e-6)
    np.testing.assert_allclose(diagnostics.stable_rank(eye), 20, rtol=1e-6)
    np.testing.assert_allclose(diagnostics.singular_value_ratio(eye, k=5), 0.25)
    assert diagnostics.effective_rank(eye, energy=0.74) == 15


def test_top_k_beyond_the_rank_is_everything(matrix):
    assert diagnostics.singular_value_ratio(matrix, k=1000) == 1


def test_effective_rank_keeps_the_energy_that_is_asked_for(matrix):
    """The rank returned keeps enough, and one less does not (in float64)."""
    s2 = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    for energy in (0.1, 0.52, 0.9, 0.99):
        rank = int(diagnostics.effective_rank(matrix, energy=energy))
        assert sum(s2[:rank]) >= energy * sum(s2) > sum(s2[: rank - 1])


def test_subspace_overlap_matches_numpy_and_equation_3(rng):
    u, v = orthonormal(rng, 30, 5), orthonormal(rng, 30, 5)
    result = diagnostics.subspace_overlap(jnp.float32(u), jnp.float32(v))
    columns = [np.linalg.norm(u.T @ v[:, i]) ** 2 for i in range(5)]
    np.testing.assert_allclose(result, sum(columns) / 5, rtol=1e-5)


def test_subspace_overlap_closed_forms(rng):
    q = orthonormal(rng, 24, 24).astype(np.float32)
    turn = orthonormal(rng, 6, 6).astype(np.float32)
    overlap = diagnostics.subspace_overlap
    np.testing.assert_allclose(overlap(q[:, :6], q[:, :6] @ turn), 1, rtol=1e-5)
    np.testing.assert_allclose(overlap(q[:, :6], q[:, 6:12]), 0, atol=1e-10)
    np.testing.assert_allclose(overlap(q[:, :6], q[:, 4:]), 2 / 6, rtol=1e-5)
    np.testing.assert_allclose(overlap(q[:, :4], q[:, :8]), 1, rtol=1e-5)
    # A tilt of one direction by an angle loses the squared sine of it.
    tilted = np.float32(np.cos(0.3) * q[:, :1] + np.sin(0.3) * q[:, 1:2])
    np.testing.assert_allclose(overlap(q[:, :1], tilted), np.cos(0.3) ** 2, rtol=1e-5)


def test_captured_energy_matches_numpy(matrix, rng):
    m = matrix.shape[0]
    basis = orthonormal(rng, m, max(1, m // 3))
    kept = np.linalg.norm(basis.T @ matrix) ** 2 / np.linalg.norm(matrix) ** 2
    result = diagnostics.captured_energy(matrix, jnp.float32(basis))
    np.testing.assert_allclose(result, kept, rtol=1e-5)


def test_captured_energy_of_singular_vectors_is_their_share(matrix):
    u, s, _ = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    for r in (1, len(s)):
        result = diagnostics.captured_energy(matrix, jnp.float32(u[:, :r]))
        np.testing.assert_allclose(result, sum(s[:r] ** 2) / sum(s**2), rtol=1e-5)
        assert result <= 1


def test_a_full_basis_captures_no_more_than_all(rng):
    bases = np.linalg.qr(rng.standard_normal((200, 8, 8)))[0].astype(np.float32)
    x = jnp.float32(rng.standard_normal((200, 8, 5)))
    captured = diagnostics.captured_energy(x, bases)
    np.testing.assert_allclose(captured, 1.0, rtol=1e-5)
    assert np.all(captured <= 1)
    # Without a bound, rounding would carry some beyond it.
    kept = jnp.sum(jnp.matmul(bases.mT, x) ** 2, (-2, -1)) / jnp.sum(x**2, (-2, -1))
    assert np.any(kept > 1)


@pytest.mark.parametrize("scale", [1e-30, 7e33])
def test_captured_energy_ignores_scale(scale, matrix, rng):
    basis = jnp.float32(orthonormal(rng, matrix.shape[0], 1))
    np.testing.assert_allclose(
        diagnostics.captured_energy(matrix * np.float32(scale), basis),
        diagnostics.captured_energy(matrix, basis),
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", SPECTRAL)
def test_zero_has_rank_zero(name):
    batch = jnp.stack([jnp.zeros((5, 7)), jnp.ones((5, 7))])
    np.testing.assert_allclose(SPECTRAL[name](batch), [0, 1], atol=1e-4)
    np.testing.assert_array_equal(SPECTRAL[name](batch[:1]), [0])


def test_zero_has_no_energy_and_no_overlap():
    zero, basis = jnp.zeros((5, 7)), jnp.eye(5)[:, :2]
    assert diagnostics.captured_energy(zero, basis) == 0
    assert diagnostics.subspace_overlap(basis, jnp.zeros((5, 2))) == 0


@pytest.mark.parametrize("name", SPECTRAL)
def test_batch_axes_are_a_loop_and_vmap_and_jit_agree(name, rng):
    x = rng.standard_normal((2, 3, 6, 10)).astype(np.float32)
    looped = [[expected(name, x[i, j]) for j in range(3)] for i in range(2)]
    measure = SPECTRAL[name]
    np.testing.assert_allclose(measure(x), looped, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(measure)(x), looped, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(jax.vmap(measure))(x), looped, rtol=1e-5)


@pytest.mark.parametrize(
    "measure", [diagnostics.subspace_overlap, diagnostics.captured_energy]
)
def test_pairs_batch_like_a_loop_under_jit_and_vmap(measure, rng):
    a = np.linalg.qr(rng.standard_normal((4, 9, 3)))[0].astype(np.float32)
    b = np.linalg.qr(rng.standard_normal((4, 9, 3)))[0].astype(np.float32)
    looped = [np.linalg.norm(a[i].T @ b[i]) ** 2 / 3 for i in range(4)]
    np.testing.assert_allclose(measure(a, b), looped, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(measure)(a, b), looped, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(measure)(a, b), looped, rtol=1e-5)


@pytest.mark.parametrize("name", SPECTRAL)
def test_bfloat16_is_measured_in_float32(name, matrix):
    low = jnp.asarray(matrix, jnp.bfloat16)
    result = SPECTRAL[name](low)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected(name, np.float32(low)), rtol=2e-6)


def test_bfloat16_pairs_are_measured_in_float32(rng):
    x = jnp.asarray(rng.standard_normal((8, 12)), jnp.bfloat16)
    basis = jnp.asarray(orthonormal(rng, 8, 3), jnp.bfloat16)
    x64, basis64 = np.float64(x), np.float64(basis)
    energy = diagnostics.captured_energy(x, basis)
    overlap = diagnostics.subspace_overlap(basis, basis)
    assert energy.dtype == overlap.dtype == jnp.float32
    kept = np.linalg.norm(basis64.T @ x64) ** 2 / np.linalg.norm(x64) ** 2
    np.testing.assert_allclose(energy, kept, rtol=1e-5)
    np.testing.assert_allclose(
        overlap, np.linalg.norm(basis64.T @ basis64) ** 2 / 3, rtol=1e-5
    )


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"shape \(3,\): it has no rows"):
        diagnostics.stable_rank(jnp.ones(3))
    with pytest.raises(ValueError, match="top 0 singular values"):
        diagnostics.singular_value_ratio(jnp.eye(3), k=0)
    for energy in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match=f"share {energy} of the energy"):
            diagnostics.effective_rank(jnp.eye(3), energy=energy)
    with pytest.raises(ValueError, match=r"u of shape \(3, 2\) with v of shape"):
        diagnostics.subspace_overlap(jnp.ones((3, 2)), jnp.ones((4, 2)))
    with pytest.raises(ValueError, match=r"x of shape \(3, 2\) with basis of shape"):
        diagnostics.captured_energy(jnp.ones((3, 2)), jnp.ones((2, 2)))


# As a report over a state


def mean(measure, matrices):
    return np.mean([measure(x) for x in matrices])


@pytest.mark.parametrize("side", ["short", "long", "left", "right"])
def test_a_report_over_the_state_of_a_projecting_optimizer(side):
    params = random_like(
        {"a": (6, 9), "s": (2, 7, 7), "heads": (4, 2, 5), "b": (3,)}, 0
    )
    grads = random_grads(params, 4)
    matrices = {
        "a": lro.MatrixAxes(),
        "s": lro.MatrixAxes(),
        "heads": lro.MatrixAxes(rows=0, cols=(1, 2)),
        "b": None,
    }
    tx = lro.galore_adamw(0.1, 3, update_every=2, side=side, matrices=matrices)
    _, first = run(tx, params, grads[:2])
    _, last = run(tx, params, grads)

    @jax.jit
    def report(state, earlier, grads):
        return diagnostics.state_metrics(
            state, tx=tx, grads=grads, earlier=earlier, moments=True
        )

    metrics = report(last, first, grads[-1])
    plain = diagnostics.state_metrics(last)
    assert {k: metrics[k] for k in plain} == plain
    rows = {"a": 6, "s": 7, "heads": 4}
    columns = {"a": 9, "s": 7, "heads": 10}
    for name in rows:
        wide = rows[name] < columns[name]
        turned = {"short": not wide, "long": wide, "left": False, "right": True}
        g = reference.wide(grads[-1][name]).reshape(-1, rows[name], columns[name])
        g = g.swapaxes(1, 2) if turned[side] else g
        new, old = (
            reference.wide(optax.tree.get(x, "basis")[name]).reshape(-1, g.shape[1], 3)
            for x in (last, first)
        )
        captured = [
            np.sum((p.T @ x) ** 2) / np.sum(x**2) for p, x in zip(new, g, strict=True)
        ]
        overlap = [np.sum((p.T @ q) ** 2) / 3 for p, q in zip(new, old, strict=True)]
        np.testing.assert_allclose(
            metrics[f"captured_energy/{name}"], np.mean(captured), rtol=1e-4
        )
        np.testing.assert_allclose(
            metrics[f"overlap/{name}"], np.mean(overlap), rtol=1e-4
        )
        for field in ("mu", "nu"):
            moments = np.asarray(optax.tree.get(last, field)[name])
            moments = moments.reshape(-1, *moments.shape[-2:])
            for kind in ("effective_rank", "stable_rank"):
                np.testing.assert_allclose(
                    metrics[f"{kind}/{field}/{name}"],
                    mean(lambda x, kind=kind: expected(kind, x), moments),
                    rtol=1e-4,
                )
    assert not [k for k in metrics if k.endswith("/b")]


def test_a_report_over_factors():
    params = random_like({"w": (12, 20), "embed": (9, 5)}, 0)
    tx = lro.mlorc_adamw(0.1, 3)
    _, state = run(tx, params, random_grads(params, 3))
    metrics = diagnostics.state_metrics(state, moments=True)
    for field in ("mu", "nu"):
        code = optax.tree.get(state, field)["w"]
        whole = reference.wide(code.left) @ reference.wide(code.right)
        dense = np.asarray(optax.tree.get(state, field)["embed"])
        for kind in ("effective_rank", "stable_rank"):
            for name, x in {"w": whole, "embed": dense}.items():
                found = metrics.pop(f"{kind}/{field}/{name}")
                np.testing.assert_allclose(found, expected(kind, x), rtol=1e-4)
    assert metrics == {}
    assert diagnostics.state_metrics(state) == {}


def test_a_report_counts_columns_of_moments_in_bytes_too():
    params = {"bytes": jnp.ones((128, 320)), "floats": jnp.ones((48, 96))}
    tx = lro.adarankgrad_adamw_8bit(0.1, 32)
    state = tx.update(params, tx.init(params), params)[1]
    kept = optax.tree.get(state, "mu")
    assert hasattr(kept["bytes"], "index") and not hasattr(kept["floats"], "index")
    found = diagnostics.state_metrics(state)
    assert found["rank/bytes"] == found["rank/floats"] == found["rank"] == 1
    assert found["memory_reduction"] == 31 * (128 + 320 + 48 + 96)


class Attention(NamedTuple):
    q: Any
    v: Any


def test_a_parameter_is_no_moment_by_its_name():
    weight = random_like({"w": (6, 9)}, 0)["w"]
    params = {"attention": Attention(weight, weight)}
    tx = optax.MultiSteps(optax.sgd(0.1), 2)
    state = tx.update(params, tx.init(params), params)[1]
    assert diagnostics.state_metrics(state, moments=True) == {}
    adam = optax.MultiSteps(optax.scale_by_adam(), 2)
    state = adam.update(params, adam.init(params), params)[1]
    found = diagnostics.state_metrics(state, moments=True)
    names = {name.partition("/")[2] for name in found}
    assert names == {f"{m}/attention/{x}" for m in ("mu", "nu") for x in "qv"}


def test_what_a_report_cannot_see():
    params = {"w": jnp.ones((64, 96))}
    _, state = run(lro.adamw_8bit(0.1), params, [params])
    assert diagnostics.state_metrics(state, moments=True) == {}
    with pytest.raises(ValueError, match="`tx` and `grads`.*Pass both"):
        diagnostics.state_metrics(state, grads=params)
