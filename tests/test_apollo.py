"""APOLLO against its formulas: its factors, the limiter, bases that are not kept."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from running import assert_close, random_grads, random_like, relative_error, run

import lowrank_optax as lro
from lowrank_optax._src.linalg import random

STEPS, PERIOD, RANK = 50, 10, 3
ADAM = optax.scale_by_adam()


def apollo(inner=ADAM, **changes):
    return lro.apollo_scale(inner, **{"rank": RANK, "update_every": PERIOD} | changes)


def gradients(shape, steps=STEPS):
    """Noise around a signal, of a size that jumps: sometimes the limiter acts."""
    arrays = random_like({"signal": shape, "noise": (steps, *shape)}, 0)
    size = 1 + 3 * (np.arange(steps) % 7 == 0)
    noisy = arrays["signal"] + arrays["noise"]
    return list(noisy * size.reshape(-1, *[1] * len(shape)))


def projection(step, m, rank=RANK, path="", seed=0, place=None):
    """The law of the bases: of seed, path, step of the drawing, place in a stack."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
    key = jax.random.fold_in(key, step)
    key = key if place is None else jax.random.fold_in(key, place)
    return np.asarray(random.normal(key, (m, rank), jnp.float32)) / rank**0.5


def apollo_adam(grads, bases, scale, limiter, per, b1=0.9, b2=0.999, eps=1e-8):
    """APOLLO with Adam on one matrix; also how often the limiter acted."""
    basis = m = v = before = None
    directions, limited = [], 0
    axis = 0 if per == "channel" else None
    for step, g in enumerate(map(reference.wide, grads)):
        basis = reference.wide(bases.get(step, basis))
        r = basis.T @ g
        m = b1 * (0 if m is None else m) + (1 - b1) * r
        v = b2 * (0 if v is None else v) + (1 - b2) * r**2
        t = step + 1
        psi = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        phi = np.linalg.norm(psi, axis=axis) / (np.linalg.norm(r, axis=axis) + 1e-8)
        x = g * phi
        norm = np.linalg.norm(x)
        if before is not None and limiter is not None and norm > limiter * before:
            x = x * (limiter * before / norm)
            limited += 1
        before = np.linalg.norm(x)
        directions.append(scale * x)
    return directions, limited


@pytest.mark.parametrize(
    ("shape", "per", "limiter", "rank"),
    [
        ((6, 9), "channel", 1.05, RANK),
        ((9, 6), "channel", None, RANK),
        ((9, 6), "tensor", 1.05, 1),
    ],
    ids=str,
)
def test_apollo_adam_follows_the_formulas(shape, per, limiter, rank):
    grads = gradients(shape)
    tx = apollo(scale=0.5, per=per, limiter=limiter, rank=rank)
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    updates = []
    for step, g in enumerate(grads):
        u, state = update(g, state)
        updates.append(u)
        assert int(state.basis) == step // PERIOD * PERIOD
        assert np.all(np.asarray(state.inner_state.nu) >= 0)
    turned = shape[0] > shape[1]
    expected, limited = apollo_adam(
        [g.T for g in grads] if turned else grads,
        {step: projection(step, 6, rank) for step in range(0, STEPS, PERIOD)},
        0.5,
        limiter,
        per,
    )
    assert limited == 0 if limiter is None else 5 <= limited <= STEPS - 5
    for u, want in zip(updates, expected, strict=True):
        assert relative_error(u, want.T if turned else want) < 1e-4


def test_every_leaf_and_every_matrix_of_a_stack_has_its_own_projection():
    g = gradients((6, 9), 1)[0]
    grads = {"a": g, "b": g, "stack": jnp.stack([g, g])}
    arguments = dict(limiter=None, matrices=lro.MatrixAxes(), key=7)
    updates, _ = run(apollo(**arguments), grads, [grads])
    bases = {path: projection(0, 6, path=path, seed=7) for path in ("a", "b")}
    for i in range(2):
        bases[i] = projection(0, 6, path="stack", seed=7, place=i)
    got = updates[0] | dict(enumerate(updates[0]["stack"]))
    for name, basis in bases.items():
        (want,), _ = apollo_adam([g], {0: basis}, 1.0, None, "channel")
        assert relative_error(got[name], want) < 1e-4
    assert relative_error(got["a"], got["b"]) > 1e-2
    assert relative_error(got[0], got[1]) > 1e-2


def test_a_run_goes_on_from_its_state_in_the_middle_of_a_period():
    grads = gradients((6, 9), 2 * PERIOD)
    # The staggered refresh falls neither on step 0 nor on a multiple of the period.
    tx = lro.project_gradients(
        ADAM,
        rank=RANK,
        subspace=lro.RandomGaussian(),
        refresh=lro.Staggered(PERIOD),
        transfer=lro.RotateFirst(),
    )
    expected, last = run(tx, grads[0], grads)
    assert int(last.basis) % PERIOD == PERIOD // 2
    for start in (3, PERIOD):
        _, state = run(tx, grads[0], grads[:start])
        updates, again = run(tx, grads[0], grads[start:], state)
        for u, want in zip(updates, expected[start:], strict=True):
            np.testing.assert_array_equal(u, want)
        assert int(again.basis) == int(last.basis)


def test_the_projection_is_the_identity_in_expectation():
    m, r, draws = 5, 2, 4000
    keys = jax.random.split(jax.random.key(0), draws)
    zero, step = jnp.zeros((m, r)), jnp.zeros([], jnp.int32)
    select = lro.RandomGaussian().select
    p = np.asarray(jax.jit(jax.vmap(lambda k: select(k, zero, zero, step)))(keys))
    mean = np.einsum("kir,kjr->ij", p, p) / draws
    np.testing.assert_allclose(mean, np.eye(m), atol=5 * np.sqrt(2 / r / draws))
    assert np.abs(p.mean(0)).max() < 5 * np.sqrt(1 / r / draws)


class Identity:
    def select(self, key, grad, old, step):
        return jnp.eye(old.shape[-2], old.shape[-1])


def test_with_the_identity_the_factors_are_those_of_adam():
    grads = gradients((6, 9), 12)
    full = {"rank": 6, "limiter": None, "matrices": lro.MatrixAxes()}
    updates, _ = run(apollo(subspace=Identity(), **full), grads[0], grads)
    for u, g, a in zip(updates, grads, reference.adam(grads), strict=True):
        ratio = np.linalg.norm(a, axis=0) / np.linalg.norm(g, axis=0)
        assert relative_error(u, g * ratio) < 1e-4


@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_with_sgd_inside_and_no_limiter_it_is_sgd(per):
    params = random_like({"w": (6, 9), "v": (9, 6)}, 0)
    grads = random_grads(params, 2)
    updates, _ = run(apollo(optax.identity(), limiter=None, per=per), params, grads)
    for u, g in zip(updates, grads, strict=True):
        assert_close(u, g, rtol=1e-4, atol=1e-5)


def test_a_small_projection_needs_the_scale_of_the_documentation():
    # M-2.4: the factors are about sqrt(r / m) of those of full rank.
    m, n, r = 64, 96, 16
    grads = list(random_like({"g": (8, m, n)}, 3)["g"])
    updates, _ = run(apollo(rank=r, limiter=None), grads[0], grads)
    full = reference.adam(grads)[-1]
    ratio = np.linalg.norm(updates[-1]) / np.linalg.norm(full)
    assert 0.8 < ratio / np.sqrt(r / m) < 1.25


def test_a_bad_gradient_leaves_a_usable_state():
    g = gradients((6, 9), 1)[0]
    tx = apollo(update_every=1)
    tx = tx._replace(update=jax.jit(tx.update))
    good, before = tx.update(g, tx.init(g))
    # A gradient of zero does not lock the limiter (M-2.4).
    zero, after_zero = tx.update(0 * g, before)
    np.testing.assert_array_equal(zero, np.zeros(g.shape))
    u, _ = tx.update(g, after_zero)
    assert 0.1 < np.linalg.norm(u) / np.linalg.norm(good) < 10
    _, after_nan = tx.update(g.at[0, 0].set(jnp.nan), before)
    assert after_nan.recovery.norm == before.recovery.norm
    u, _ = tx.update(g, after_nan)
    assert np.all(np.isfinite(u)) and np.any(np.asarray(u))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"limiter": 0.5}, "at least 1"), ({"per": "row"}, "'row'.*channel, tensor")],
    ids=str,
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        apollo(**changes)


M, N, L = 40, 24, 40


@pytest.mark.parametrize("r", [1, 4, 11])
@pytest.mark.parametrize(
    ("make", "extra"),
    [
        (lambda r: apollo(rank=r), 1),
        (lambda r: apollo(rank=r, limiter=None), 0),
        (lambda r: lro.apollo_adamw(0.1, r, per="tensor"), 1),
    ],
    ids=["limiter", "none", "adamw"],
)
def test_state_size(make, extra, r):
    params = {"w": jax.ShapeDtypeStruct((M, N), jnp.float32)}
    counters = 3  # of the engine, of Adam, and the step of the drawing
    numbers = 2 * L * r + extra
    assert lro.state_bytes(make(r), params) == 4 * (numbers + counters)
    (row,) = lro.describe(make(r), params)
    assert row.rank == r


def test_apollo_adamw_is_its_parts():
    params = random_like({"w": (6, 9), "frozen": (6, 9)}, 0)
    grads = random_grads(params, 3)
    tx = lro.apollo_adamw(
        0.1,
        RANK,
        update_every=2,
        scale=0.5,
        b1=0.8,
        b2=0.9,
        eps=1e-3,
        weight_decay=0.5,
        mask={"w": True, "frozen": False},
        per="tensor",
        limiter=1.2,
    )
    updates, _ = run(tx, params, grads)
    inner = optax.scale_by_adam(b1=0.8, b2=0.9, eps=1e-3)
    method = apollo(inner, update_every=2, scale=0.5, per="tensor", limiter=1.2)
    directions, _ = run(method, params, grads)
    for u, d in zip(updates, directions, strict=True):
        assert_close(u["w"], -0.1 * (d["w"] + 0.5 * params["w"]))
        assert_close(u["frozen"], -0.1 * d["frozen"])
