"""Fira against its formulas: the residual, its limiter, and the sizes of the state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from running import assert_close, random_grads, random_like, relative_error, run

import lowrank_optax as lro
from lowrank_optax._src.linalg.products import Lying
from lowrank_optax._src.parts.recovery import FiraState

STEPS, PERIOD, RANK = 50, 10, 3
ADAM = optax.scale_by_adam()


def fira(inner=ADAM, **changes):
    return lro.fira_project(inner, **{"rank": RANK, "update_every": PERIOD} | changes)


def gradients(shape, steps=STEPS):
    """A signal, noise, and a size that jumps: sometimes the limiter acts."""
    signal = random_like({"a": (*shape[:-1], 4), "b": (*shape[:-2], 4, shape[-1])}, 0)
    signal = signal["a"] * jnp.array([4.0, 2.0, 1.0, 0.5]) @ signal["b"]
    noise = random_like({"g": (steps, *shape)}, 1)["g"]
    size = 1 + 3 * (np.arange(steps) % 7 == 0)
    return list((signal + noise) * size.reshape(-1, *[1] * len(shape)))


def fira_adam(grads, bases, scale, limiter, corrected, b1=0.9, b2=0.999, eps=1e-8):
    """Fira with Adam on one matrix; also how often the limiter acted.

    ``corrected``: the paper's residual, and a limiter after the bias correction;
    otherwise both as in Fira's code.
    """
    basis = m = v = before = None
    directions, limited = [], 0
    for step, g in enumerate(map(reference.wide, grads)):
        basis = reference.wide(bases.get(step, basis))
        r = basis.T @ g
        m = b1 * (0 if m is None else m) + (1 - b1) * r
        v = b2 * (0 if v is None else v) + (1 - b2) * r**2
        t = step + 1
        correction = np.sqrt(1 - b2**t) / (1 - b1**t)
        if corrected:
            psi, correction = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps), 1.0
            residual = g - basis @ r
        else:
            psi = m / (np.sqrt(v) + eps)
            residual = g - scale * basis @ r
        x = residual * (
            np.linalg.norm(psi, axis=0) / (np.linalg.norm(r, axis=0) + 1e-8)
        )
        norm = np.linalg.norm(x)
        if before is not None and limiter is not None and norm > limiter * before:
            x = x * (limiter * before / norm)
            limited += 1
        before = np.linalg.norm(x)
        directions.append(correction * (scale * basis @ psi + x))
    return directions, limited


@pytest.mark.parametrize("form", ["paper", "unlimited", "reference"])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=str)
def test_fira_adam_follows_the_formulas(shape, form):
    limiter = None if form == "unlimited" else 1.05
    # Fira's code adds epsilon before the bias correction; none, and they are the same.
    inner = optax.scale_by_adam(eps=1e-8 if form != "reference" else 0.0)
    grads = gradients(shape)
    tx = fira(
        inner,
        scale=0.25,
        limiter=limiter,
        reference=(0.9, 0.999) if form == "reference" else None,
    )
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    updates, bases = [], {}
    for step, g in enumerate(grads):
        u, state = update(g, state)
        updates.append(u)
        bases |= {step: np.asarray(state.basis)} if step % PERIOD == 0 else {}
        assert np.all(np.asarray(state.inner_state.nu) >= 0)
    turned = shape[0] > shape[1]
    expected, limited = fira_adam(
        [g.T for g in grads] if turned else grads,
        bases,
        0.25,
        limiter,
        form != "reference",
        eps=1e-8 if form != "reference" else 0.0,
    )
    assert len(bases) == STEPS // PERIOD
    assert limited == 0 if form == "unlimited" else 5 <= limited <= STEPS - 5
    for u, want in zip(updates, expected, strict=True):
        assert relative_error(u, want.T if turned else want) < 1e-4


def test_matrices_of_a_stack_are_limited_one_by_one():
    small, large = gradients((6, 9), 3), gradients((6, 9), 3)
    large = [g * factor for g, factor in zip(large, [1, 50, 1], strict=True)]
    stacks = [jnp.stack(pair) for pair in zip(small, large, strict=True)]
    # The exact basis, as the random one has another key for every slice of a stack.
    exact = {"subspace": lro.TopSingular("gram_eigh"), "rank": 2}
    stacked, _ = run(fira(matrices=lro.MatrixAxes(), **exact), stacks[0], stacks)
    for i, grads in enumerate([small, large]):
        alone, _ = run(fira(**exact), grads[0], grads)
        for u, want in zip(stacked, alone, strict=True):
            assert_close(u[i], want, rtol=1e-4, atol=1e-5)


def test_at_full_rank_it_is_galore():
    params = random_like({"w": (6, 9), "v": (9, 6), "b": (9,)}, 0)
    grads = random_grads(params, PERIOD + 2)
    full = {"rank": 6, "update_every": PERIOD, "matrices": lro.MatrixAxes()}
    got, _ = run(fira(**full), params, grads)
    want, _ = run(lro.galore_project(ADAM, **full), params, grads)
    for u, v in zip(got, want, strict=True):
        assert_close(u, v, rtol=1e-4, atol=1e-5)


def test_with_sgd_inside_and_no_limiter_it_is_sgd():
    # All ratios are 1 then: what the projection leaves out is put back as it was.
    params = random_like({"w": (6, 9), "v": (9, 6)}, 0)
    grads = random_grads(params, 3)
    updates, _ = run(fira(optax.identity(), limiter=None), params, grads)
    for u, g in zip(updates, grads, strict=True):
        assert_close(u, g, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reference_form", [None, (0.9, 0.999)], ids=str)
def test_a_zero_gradient_does_not_lock_the_limiter(reference_form):
    # Fira's code would let the residual grow by 1% a step from about nothing (M-2.2).
    g = gradients((6, 9), 1)[0]
    free, _ = run(fira(limiter=None, reference=reference_form), g, [0 * g, g])
    limited, _ = run(fira(reference=reference_form), g, [0 * g, g])
    assert_close(limited[1], free[1])
    assert np.linalg.norm(limited[1]) > 1


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-5, 1e-6, 0.0])
def test_rounding_neither_unlocks_the_limiter_nor_counts(size):
    """A residual that is small beside the gradient, and then one as large as it."""
    m, n, r = 64, 96, 8
    for seed in range(5):
        rng = np.random.default_rng(seed)
        q = np.eye(m) if size == 0 else np.linalg.qr(rng.standard_normal((m, m)))[0]
        coeff, rest = rng.standard_normal((r, n)), rng.standard_normal((m - r, n))
        rest *= np.linalg.norm(coeff, axis=0) / np.linalg.norm(rest, axis=0)
        direction = np.sign(coeff)
        norms, state = [], FiraState(jnp.zeros([]), optax.MaskedNode())
        for share in (size, 1.0):
            grad = q[:, :r] @ coeff + share * q[:, r:] @ rest
            given = (jnp.float32(x) for x in (grad, q[:, :r], direction))
            update, state = recovered(*given, state)
            norms.append(float(state.norm))
        # Of the direction that it is scaled like, columns have equal norms.
        want = max(size, np.sqrt(16 * 2.0**-23)) * np.linalg.norm(direction)
        np.testing.assert_allclose(norms, [want, 1.01 * want], rtol=1e-2)
        np.testing.assert_allclose(np.linalg.norm(update), 1.01 * want, rtol=1e-2)


@jax.jit
def recovered(grad, basis, direction, state):
    """What `FiraResidual` adds to no step inside."""
    coeff = jnp.matmul(basis.T, grad, precision="highest")
    given = Lying(grad, False), coeff, direction, basis, 0.0, state
    update, state = lro.FiraResidual().recover(*given)
    return update.array, state


def test_a_gradient_that_is_not_finite_leaves_the_limiter_as_it_was():
    g = gradients((6, 9), 1)[0]
    tx = fira()
    _, before = run(tx, g, [g])
    _, after = run(tx, g, [g.at[0, 0].set(jnp.nan)], before)
    assert before.recovery.norm > 0
    assert after.recovery.norm == before.recovery.norm
    updates, _ = run(tx, g, [g], after)
    assert np.all(np.isfinite(updates[0]))


def test_an_infinite_limiter_may_be_injected():
    g = gradients((6, 9), 4)
    tx = lro.inject_hyperparams(fira_with_limiter)(limiter=np.inf)
    got, _ = run(tx, g[0], g)
    want, _ = run(fira(limiter=None), g[0], g)
    for u, v in zip(got, want, strict=True):
        assert_close(u, v)


def fira_with_limiter(limiter):
    return fira(limiter=limiter)


@pytest.mark.parametrize("limiter", [0.5, 0, float("nan")])
def test_a_limiter_below_one_is_refused(limiter):
    with pytest.raises(ValueError, match="at least 1"):
        fira(limiter=limiter)


# Sizes (M-7)

M, N, S, L = 40, 24, 24, 40


@pytest.mark.parametrize(
    ("make", "extra"),
    [
        (lambda r: fira(rank=r), 1),
        (lambda r: fira(rank=r, limiter=None), 0),
        (lambda r: fira(rank=r, limiter=float("inf")), 0),
        (lambda r: lro.fira_adamw(0.1, rank=r), 1),
    ],
    ids=["limiter", "none", "infinite", "adamw"],
)
@pytest.mark.parametrize("r", [4, 11])
def test_state_size(make, extra, r):
    tx, params = make(r), {"w": jax.ShapeDtypeStruct((M, N), jnp.float32)}
    counters = 2  # of the engine and of Adam
    numbers = S * r + 2 * L * r + extra
    assert lro.state_bytes(tx, params) == 4 * (numbers + counters)


def test_fira_adamw_is_its_parts():
    params = random_like({"w": (6, 9), "b": (9,), "frozen": (6, 9)}, 0)
    grads = random_grads(params, PERIOD + 2)
    tx = lro.fira_adamw(
        0.1,
        RANK,
        update_every=PERIOD,
        scale=0.5,
        b1=0.8,
        b2=0.9,
        eps=1e-3,
        weight_decay=0.5,
        mask={"w": True, "b": True, "frozen": False},
        limiter=1.2,
        reference=(0.8, 0.9),
    )
    updates, _ = run(tx, params, grads)
    inner = optax.scale_by_adam(b1=0.8, b2=0.9, eps=1e-3)
    method = fira(inner, scale=0.5, limiter=1.2, reference=(0.8, 0.9))
    directions, _ = run(method, params, grads)
    for u, d in zip(updates, directions, strict=True):
        expected = {
            "w": -0.1 * (d["w"] + 0.5 * params["w"]),
            "b": -0.1 * (d["b"] + 0.5 * params["b"]),
            "frozen": -0.1 * d["frozen"],
        }
        assert_close(u, expected)
