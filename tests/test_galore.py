"""GaLore against its formulas: trajectories, subspaces, sizes, whole optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from running import assert_close, random_grads, random_like, relative_error, run

import lowrank_optax as lro

STEPS, PERIOD, RANK = 50, 10, 3
ADAM = optax.scale_by_adam()


def galore(inner=ADAM, **changes):
    arguments = {"rank": RANK, "update_every": PERIOD, "subspace": lro.TopSingular()}
    return lro.galore_project(inner, **arguments | changes)


def run_and_collect_bases(tx, grads):
    """Updates of a leaf w, and its basis at each refresh."""
    params = {"w": jnp.zeros_like(grads[0])}
    state, update = tx.init(params), jax.jit(tx.update)
    updates, bases = [], {}
    for step, g in enumerate(grads):
        u, state = update({"w": g}, state, params)
        updates.append(u["w"])
        if step % PERIOD == 0:
            bases[step] = np.asarray(optax.tree.get(state, "basis")["w"])
    return updates, bases


def gradients(shape, steps=STEPS):
    """A fixed signal with singular values well apart, and noise."""
    signal = random_like({"a": (*shape[:-1], 4), "b": (*shape[:-2], 4, shape[-1])}, 0)
    signal = signal["a"] * jnp.array([4.0, 2.0, 1.0, 0.5]) @ signal["b"]
    noise = random_like({"g": (steps, *shape)}, 1)["g"]
    return list(signal + 0.5 * noise)


@pytest.mark.parametrize("transfer", [lro.Keep(), lro.Rotate(), lro.Reset()], ids=str)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 6, 9)], ids=str)
def test_galore_adam_follows_the_formulas(shape, transfer):
    grads = gradients(shape)
    matrices = lro.MatrixAxes() if len(shape) > 2 else None
    tx = galore(scale=0.25, transfer=transfer, matrices=matrices)
    updates, bases = run_and_collect_bases(tx, grads)
    assert len(bases) == STEPS // PERIOD
    # The short side is the left one of the reference.
    turned = shape[-2] > shape[-1]
    expected = reference.galore_adam(
        [g.T for g in grads] if turned else grads,
        bases,
        scale=0.25,
        transfer=type(transfer).__name__.lower(),
    )
    for u, want in zip(updates, expected, strict=True):
        assert relative_error(u, want.T if turned else want) < 1e-4


@pytest.mark.parametrize(
    "method", ["svd", "gram_eigh", "rsvd", "subspace_iteration", "warm"]
)
def test_the_subspace_is_that_of_the_leading_singular_vectors(method):
    grads = gradients((6, 9), steps=2 * PERIOD + 1)
    tx = galore(subspace=lro.TopSingular(method))
    _, bases = run_and_collect_bases(tx, grads)
    for step, basis in bases.items():
        best = reference.top_singular(grads[step], RANK)
        assert relative_error(basis @ basis.T, best @ best.T) < 1e-4


# Sizes (M-7). s and l are the shorter and the longer side.

M, N, S, L = 40, 24, 24, 40
MATRIX = {"w": jax.ShapeDtypeStruct((M, N), jnp.float32)}


def numbers(tx, params):
    """How many the state keeps, and its bytes for counters and placeholders."""
    arrays = jax.tree.leaves(jax.eval_shape(tx.init, params))
    rest = sum(x.size * x.dtype.itemsize for x in arrays if x.size == 1)
    return sum(x.size for x in arrays if x.size > 1), rest


@pytest.mark.parametrize("r", [4, 30])
@pytest.mark.parametrize(
    ("make", "formula"),
    [
        (
            lambda r: galore(rank=r, matrices=lro.MatrixAxes()),
            lambda r: S * r + 2 * L * r,
        ),
        (
            lambda r: galore(rank=r, matrices=lro.MatrixAxes(), side="long"),
            lambda r: L * r + 2 * S * r,
        ),
        (
            lambda r: galore(rank=r, matrices=lro.MatrixAxes(), side="left"),
            lambda r: M * r + 2 * N * r,
        ),
        (
            lambda r: galore(rank=r, matrices=lro.MatrixAxes(), side="right"),
            lambda r: N * r + 2 * M * r,
        ),
        (
            lambda r: galore(optax.scale_by_lion(), rank=r, matrices=lro.MatrixAxes()),
            lambda r: (S + L) * r,
        ),
        (
            lambda r: lro.galore_adamw(0.1, rank=r, matrices=lro.MatrixAxes()),
            lambda r: S * r + 2 * L * r,
        ),
        (
            lambda r: lro.galore_adafactor(0.1, rank=r, matrices=lro.MatrixAxes()),
            lambda r: S * r + L + r,
        ),
        (
            lambda r: lro.galore_adafactor(
                0.1, rank=r, momentum=0.9, matrices=lro.MatrixAxes()
            ),
            lambda r: S * r + L + r + L * r,
        ),
    ],
    ids=["short", "long", "left", "right", "lion", "adamw", "adafactor", "momentum"],
)
def test_state_size(make, formula, r):
    tx, effective = make(r), min(r, S)
    kept, rest = numbers(tx, MATRIX)
    assert kept == formula(effective)
    assert lro.state_bytes(tx, MATRIX) == 4 * kept + rest
    assert rest <= 16
    state = tx.init({"w": jnp.zeros((M, N))})
    assert lro.state_bytes(tx, MATRIX) == sum(x.nbytes for x in jax.tree.leaves(state))


def test_a_stack_keeps_what_its_matrices_keep():
    stack = {
        "w": jax.ShapeDtypeStruct((50, M, N), jnp.float32)
    }  # more layers than rows
    for momentum in (None, 0.9):
        tx = lro.galore_adafactor(
            0.1, rank=4, momentum=momentum, matrices=lro.MatrixAxes()
        )
        assert numbers(tx, stack)[0] == 50 * numbers(tx, MATRIX)[0]


# Whole optimizers


def test_galore_adamw_is_its_parts():
    params = random_like({"w": (6, 9), "b": (9,), "frozen": (6, 9)}, 0)
    grads = random_grads(params, PERIOD + 2)
    tx = lro.galore_adamw(
        0.1,
        RANK,
        update_every=PERIOD,
        scale=0.25,
        b1=0.8,
        b2=0.9,
        eps=1e-3,
        weight_decay=0.5,
        mask={"w": True, "b": True, "frozen": False},
    )
    updates, _ = run(tx, params, grads)
    inner = optax.scale_by_adam(b1=0.8, b2=0.9, eps=1e-3)
    directions, _ = run(galore(inner, scale=0.25), params, grads)
    for u, d in zip(updates, directions, strict=True):
        expected = {
            "w": -0.1 * (d["w"] + 0.5 * params["w"]),
            "b": -0.1 * (d["b"] + 0.5 * params["b"]),
            "frozen": -0.1 * d["frozen"],
        }
        assert_close(u, expected)


def adafactor(grads, decay_rate=0.8, clipping_threshold=1.0, momentum=None):
    """Adafactor (Shazeer & Stern, Algorithm 4) without relative steps, in NumPy."""
    rows = columns = m = 0.0
    directions = []
    for t, g in enumerate(map(reference.wide, grads), start=1):
        decay = 1 - t**-decay_rate
        square = g**2 + 1e-30
        rows = decay * rows + (1 - decay) * square.mean(-1, keepdims=True)
        columns = decay * columns + (1 - decay) * square.mean(-2, keepdims=True)
        u = g / np.sqrt(rows @ columns / rows.mean())
        u = u / max(1.0, np.sqrt(np.mean(u**2)) / clipping_threshold)
        if momentum is not None:
            u = m = momentum * m + (1 - momentum) * u
        directions.append(u)
    return directions


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_galore_adafactor_is_adafactor_in_the_subspace(momentum):
    grads = gradients((6, 9))
    tx = lro.galore_adafactor(
        0.1, RANK, update_every=PERIOD, scale=0.25, momentum=momentum
    )
    updates, bases = run_and_collect_bases(tx, grads)
    assert len(bases) == STEPS // PERIOD
    at = [np.float64(bases[step - step % PERIOD]) for step in range(STEPS)]
    low = [p.T @ np.asarray(g) for p, g in zip(at, grads, strict=True)]
    directions = adafactor(low, momentum=momentum)
    for u, p, n in zip(updates, at, directions, strict=True):
        assert relative_error(u, -0.1 * 0.25 * p @ n) < 1e-4


def test_galore_adafactor_clips_only_if_asked_to():
    grads = [{"w": g} for g in gradients((6, 9), steps=3)]
    free, _ = run(
        lro.galore_adafactor(
            1.0, RANK, update_every=PERIOD, scale=1.0, clipping_threshold=None
        ),
        grads[0],
        grads,
    )
    clipped, _ = run(
        lro.galore_adafactor(
            1.0, RANK, update_every=PERIOD, scale=1.0, clipping_threshold=0.1
        ),
        grads[0],
        grads,
    )

    def root_mean_square_of_coefficients(u):
        return np.linalg.norm(u["w"]) / np.sqrt(RANK * 9)

    for u, c in zip(free, clipped, strict=True):
        assert root_mean_square_of_coefficients(u) > 0.5
        np.testing.assert_allclose(root_mean_square_of_coefficients(c), 0.1, rtol=1e-4)


# Numbers


@pytest.mark.parametrize("make", [galore, lambda: lro.galore_adamw(0.1, RANK)])
def test_moments_of_bfloat16_parameters_keep_decaying(make):
    # Rounded to bfloat16 after each step, 0.999 v would be v again (M-1.4).
    params = {"w": jnp.ones((6, 9), jnp.bfloat16)}
    tx = make()
    zero = jax.tree.map(jnp.zeros_like, params)
    _, state = tx.update(params, tx.init(params), params)

    def step(state, _):
        return tx.update(zero, state, params)[1], None

    before = optax.tree.get(state, "nu")["w"]
    after = optax.tree.get(jax.lax.scan(step, state, length=1000)[0], "nu")["w"]
    assert after.dtype == jnp.float32
    assert np.max(before) > 0
    np.testing.assert_allclose(after, 0.999**1000 * before, rtol=1e-3)
