"""MLorc against its formulas, against the optimizers that it compresses, and itself."""

import contextlib
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from running import assert_close, norm, random_grads, random_like, relative_error, run

import lowrank_optax as lro
from lowrank_optax._src.kernels.dispatch import interpreted
from lowrank_optax._src.linalg import random

STEPS, RANK = 12, 2
SHAPES = {"wide": (5, 8), "tall": (8, 5)}
# These columns span all of a (5, 8) matrix: the truncation is exact, whatever is drawn.
EXACT = {"oversample": 4}
# Nothing is drawn at all: the sketch is the previous right factor.
DETERMINISTIC = {"oversample": 0, "warm_start": True}


def on_one_leaf(tx, grads):
    params = {"w": jnp.zeros_like(grads[0])}
    return [u["w"] for u in run(tx, params, [{"w": g} for g in grads])[0]]


def gradients(shape, steps=STEPS, seed=0):
    return list(random_like({"g": (steps, *shape)}, seed)["g"])


# Against the formulas


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (2, 5, 8)], ids=str)
@pytest.mark.parametrize("compress", [("mu", "nu"), ("mu",), ("nu",)], ids=str)
def test_mlorc_adam_follows_the_formulas(shape, compress):
    grads = gradients(shape)
    matrices = lro.MatrixAxes() if len(shape) > 2 else None
    tx = lro.mlorc_scale_by_adam(
        RANK, b1=0.7, b2=0.95, eps=1e-6, compress=compress, matrices=matrices, **EXACT
    )
    expected = reference.mlorc_adam(grads, RANK, 0.7, 0.95, 1e-6, compress=compress)
    for u, want in zip(on_one_leaf(tx, grads), expected, strict=True):
        # A second moment near its clamp loses digits to the cancellation before it.
        assert relative_error(u, want) < 1e-3


@pytest.mark.parametrize("compress", [("mu", "nu"), ("mu",), ("nu",)], ids=str)
def test_no_update_exceeds_what_adam_allows(compress):
    """One entry is a million times the others once; a leaf of Adam's own is exact."""
    grads = [1e-3 * g for g in gradients((24, 32), 8)]
    grads[3] = grads[3].at[3, 5].set(1e3)
    grads = [{"w": g, "b": g[3]} for g in grads]
    b1, b2 = 0.8, 0.999
    tx = lro.mlorc_scale_by_adam(4, b1=b1, b2=b2, compress=compress)
    updates, state = run(tx, grads[0], grads)
    # Of m / sqrt(v) over all gradients, by Cauchy and Schwarz.
    most = (1 - b1) / np.sqrt((1 - b2) * (1 - b1**2 / b2))
    assert max(np.max(np.abs(u["w"])) for u in updates) <= most * (1 + 1e-5)
    expected, adams = run(optax.scale_by_adam(b1, b2), grads[0], grads)
    for u, want in zip(updates, expected, strict=True):
        assert_close(u["b"], want["b"])
    moments = state.inner_state
    for name in {"mu", "nu"} - set(compress):  # of which nothing is cut off
        assert_close(getattr(moments, name)["w"], getattr(adams, name)["w"])


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (2, 5, 8)], ids=str)
def test_mlorc_lion_follows_the_formulas(shape):
    grads = gradients(shape)
    matrices = lro.MatrixAxes() if len(shape) > 2 else None
    tx = lro.mlorc_scale_by_lion(RANK, b1=0.8, b2=0.95, matrices=matrices, **EXACT)
    expected = reference.mlorc_lion(grads, RANK, 0.8, 0.95)
    for u, want in zip(on_one_leaf(tx, grads), expected, strict=True):
        np.testing.assert_array_equal(u, want)


def sketched(a, code, fresh):
    """Algorithm 3 with the old right factor and columns that are given; the factors."""
    omega = np.concatenate([code[1].T, fresh], axis=1)
    q, _ = np.linalg.qr(a @ omega)
    u, s, vt = np.linalg.svd(q.T @ a, full_matrices=False)
    rank = len(code[1])
    return (q @ u[:, :rank]) * s[:rank], vt[:rank]


def test_the_sketched_moments_follow_the_formulas():
    # A real sketch: 4 columns of before and 4 random ones, of a matrix with 32 rows.
    # No second moment is small, near the clamp; and each step adds more to them than
    # the thousandth of the largest direction below which a sketch is cut off.
    m, n, rank, b1, b2, eps = 32, 48, 4, 0.8, 0.95, 1e-8
    arrays = random_like({"a": (m, 1), "b": (1, n), "g": (50, m, n)}, 0)
    size = jnp.exp(0.3 * (arrays["a"] + arrays["b"]))
    grads = list(size * (1 + 0.3 * arrays["g"]))
    updates = on_one_leaf(lro.mlorc_scale_by_adam(rank, b1=b1, b2=b2, eps=eps), grads)

    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(b"w"))
    mu = nu = (np.zeros((m, rank)), reference.wide(random.fixed_signs(n, rank)).T)
    for t, (u, g) in enumerate(zip(updates, map(reference.wide, grads), strict=True)):
        seed = random.seeds(jax.random.fold_in(key, t))
        fresh = reference.wide(random.signs(seed, n, 4, jnp.float32))
        first = b1 * mu[0] @ mu[1] + (1 - b1) * g
        second = b2 * reference.clamp(nu[0] @ nu[1]) + (1 - b2) * g**2
        root = np.sqrt(second / (1 - b2 ** (t + 1))) + eps
        assert relative_error(u, first / (1 - b1 ** (t + 1)) / root) < 1e-4
        mu, nu = sketched(first, mu, fresh), sketched(second, nu, fresh)


def hard_moments(m, n):
    """A stack of matrices whose sketches of 8 columns are ever nearer to rank one."""
    a = random_like({"a": (m, 1), "b": (1, n), "g": (m, n)}, 1)
    u, _, vt = np.linalg.svd(reference.wide(a["g"]), full_matrices=False)
    return [
        a["g"],
        np.exp(a["a"] + a["b"]) * a["g"] ** 2,  # a second moment
        (u * 0.5 ** np.arange(m)) @ vt,
        1 + 0.01 * a["g"],
    ]


@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize(("wide", "tolerance"), [(True, 1e-6), (False, 1e-4)])
def test_a_code_is_that_of_algorithm_3(warm_start, wide, tolerance):
    m, n, rank = 48, 80, 4
    with jax.enable_x64(wide):
        codec = lro.LowRank(rank, oversample=4, warm_start=warm_start)
        moments = [*hard_moments(m, n), *([1 + 1e-5 * hard_moments(m, n)[0]] * wide)]
        x = jnp.asarray(np.stack(moments), float)
        view = lro.MatrixView("w", x.shape, x.dtype, (1,), (2,), (0,))
        old, key = codec.init(view), jax.random.split(jax.random.key(0), len(x))
        omega = codec.draw([key], [old], None)[0].mT
        left, right = map(reference.wide, jax.jit(codec.encode)(key, x, old))
    conditions = []
    for a, y, code in zip(*map(reference.wide, (x, omega, left @ right)), strict=True):
        q = np.linalg.qr(a @ y)[0]
        u, s, vt = np.linalg.svd(q.T @ a, full_matrices=False)
        want = (q @ u[:, :rank] * s[:rank]) @ vt[:rank]
        assert relative_error(code, want) < tolerance
        conditions.append(np.linalg.cond(a @ y))
    assert 300 < conditions[3] < 1e3  # of those in float32, which leaves four digits


def test_float64_parameters_have_float64_moments():
    with jax.enable_x64(True):
        grads = [jnp.asarray(g, jnp.float64) for g in gradients((5, 8), steps=10)]
        tx = lro.mlorc_scale_by_adam(RANK, b1=0.7, b2=0.95, **EXACT)
        updates = on_one_leaf(tx, grads)
    for u, want in zip(
        updates, reference.mlorc_adam(grads, RANK, 0.7, 0.95), strict=True
    ):
        assert u.dtype == np.float64
        assert relative_error(u, want) < 1e-9


def test_the_formulas_are_not_those_of_the_uncompressed_optimizers():
    # Or the two tests above would hold without any compression.
    grads = gradients((5, 8))
    adam, lion = (
        reference.adam(grads, 0.7, 0.95, 1e-6),
        reference.lion(grads, 0.8, 0.95),
    )
    mlorc_adam = reference.mlorc_adam(grads, RANK, 0.7, 0.95, 1e-6)
    mlorc_lion = reference.mlorc_lion(grads, RANK, 0.8, 0.95)
    assert relative_error(mlorc_adam[-1], adam[-1]) > 0.1
    assert np.mean(mlorc_lion[-1] != lion[-1]) > 0.05


SKETCHES = {
    "default": {},
    "deterministic": DETERMINISTIC,
    "the paper's": {"oversample": 0, "power_iters": 1, "warm_start": False},
}


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=str)
def test_at_full_rank_mlorc_adam_is_adam(shape, sketch):
    grads = gradients(shape)
    tx = lro.mlorc_scale_by_adam(8, **SKETCHES[sketch], matrices=lro.MatrixAxes())
    expected = on_one_leaf(optax.scale_by_adam(b1=0.8), grads)
    assert relative_error(on_one_leaf(tx, grads), expected) < 1e-5


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=str)
def test_at_full_rank_mlorc_lion_is_lion(shape, sketch):
    grads = gradients(shape)
    tx = lro.mlorc_scale_by_lion(8, **SKETCHES[sketch], matrices=lro.MatrixAxes())
    expected = on_one_leaf(optax.scale_by_lion(), grads)
    for u, want in zip(on_one_leaf(tx, grads), expected, strict=True):
        np.testing.assert_array_equal(u, want)


# The two tiers: the fast path, and the engine that composes it of its parts


def composed_adam(sketch):
    return lro.compress_state(
        optax.scale_by_adam(b1=0.8),
        {
            "mu": lro.LowRank(RANK, **sketch),
            "nu": lro.LowRank(RANK, nonnegative=True, **sketch),
        },
    )


def composed_lion(sketch):
    codec = lro.LowRank(RANK, **sketch)
    return lro.compress_state(optax.scale_by_lion(), {"mu": codec})


TIERS = {
    "adam": (lambda sketch: lro.mlorc_scale_by_adam(RANK, **sketch), composed_adam),
    "lion": (lambda sketch: lro.mlorc_scale_by_lion(RANK, **sketch), composed_lion),
}
# Large enough for the default sketch to be one.
TREE = {"wide": (8, 12), "tall": (12, 8), "b": (8,), "embed": (9, 5)}


def decoded(state):
    """All moments at full size, by field and leaf."""
    fields = {"mu": lro.LowRank(RANK), "nu": lro.LowRank(RANK, nonnegative=True)}
    return {
        (f, leaf): codec.decode(x) if isinstance(x, tuple) else x
        for f, codec in fields.items()
        for leaf, x in (optax.tree.get(state, f) or {}).items()
    }


@pytest.mark.parametrize("sketch", ["default", "deterministic"])
@pytest.mark.parametrize("name", TIERS)
def test_the_tiers_agree(name, sketch):
    fast, composed = (make(SKETCHES[sketch]) for make in TIERS[name])
    params = random_like(TREE, 0)
    grads = random_grads(params, STEPS)
    one, last_one = run(fast, params, grads)
    other, last_other = run(composed, params, grads)
    # Each step rounds sums of at most 12 products, relative to the largest entry, in
    # two sketches, a truncation and a reconstruction; averages remember 1 / (1 - b1)
    # = 10 steps at most: 4 * 12 * 10 roundings of 2^-24.
    tolerance = 4 * 12 * 10 * 2**-24
    a, b = decoded(last_one), decoded(last_other)
    assert len(a) == len(TREE) * len(fast.init(params).inner_state[1:])
    for field in a:
        scale = np.max(np.abs(b[field]))
        np.testing.assert_allclose(a[field], b[field], rtol=0, atol=tolerance * scale)
    # The root and quotient of the update amplify this where a second moment is small.
    assert relative_error(flat(one), flat(other)) < 10 * tolerance


def flat(updates):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(updates)])


@pytest.mark.parametrize("name", TIERS)
@pytest.mark.parametrize("order", [1, -1], ids=["fast first", "composed first"])
def test_the_tiers_exchange_their_states(name, order):
    first, second = (make(SKETCHES["default"]) for make in TIERS[name][::order])
    params = random_like(TREE, 0)
    assert jax.tree.structure(first.init(params)) == jax.tree.structure(
        second.init(params)
    )
    grads = random_grads(params, STEPS)
    _, state = run(first, params, grads[:5])
    handed_over, _ = run(second, params, grads[5:], state)
    alone, _ = run(first, params, grads)
    assert relative_error(flat(handed_over), flat(alone[5:])) < 1e-3


# How leaves are seen


METHODS = {
    "adam": lambda **kwargs: lro.mlorc_scale_by_adam(RANK, **EXACT | kwargs),
    "adam, mu": lambda **kwargs: lro.mlorc_scale_by_adam(
        RANK, compress=("mu",), **EXACT | kwargs
    ),
    "lion": lambda **kwargs: lro.mlorc_scale_by_lion(RANK, **EXACT | kwargs),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_kernel_with_heads_is_its_reshaped_matrix(name):
    grads = gradients((5, 2, 4), steps=5)
    axes = lro.MatrixAxes(rows=0, cols=(1, 2))
    updates = on_one_leaf(METHODS[name](matrices=axes), grads)
    expected = on_one_leaf(METHODS[name](), [g.reshape(5, 8) for g in grads])
    assert relative_error([u.reshape(5, 8) for u in updates], expected) < 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_the_transposed_leaf_gets_the_transposed_update(name):
    grads = gradients((5, 8), steps=5)
    mirrored = on_one_leaf(METHODS[name](), [g.T for g in grads])
    expected = on_one_leaf(METHODS[name](), grads)
    assert relative_error([u.T for u in mirrored], expected) < 1e-5


# Around any optimizer with momentum


WRAPPED = {  # and how many moments a matrix has in it
    "trace": (optax.trace(0.9), 1),
    "nesterov": (optax.trace(0.9, nesterov=True), 1),
    "lion": (optax.scale_by_lion(), 1),
    "adam": (optax.scale_by_adam(b2=0.9), 2),
    "adopt": (optax.contrib.scale_by_adopt(), 2),
    "muon": (optax.contrib.muon(-1.0), 1),
    "chain": (optax.chain(optax.scale_by_adam(b2=0.9), optax.scale(1.0)), 2),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_at_full_rank_it_is_the_optimizer_inside(name):
    inner, _ = WRAPPED[name]
    params = random_like({"w": (5, 8), "v": (8, 5), "b": (8,)}, 0)
    grads = random_grads(params, 6)
    updates, _ = run(
        lro.mlorc_compress(inner, rank=8, matrices=lro.MatrixAxes()), params, grads
    )
    expected, _ = run(inner, params, grads)
    assert relative_error(flat(updates), flat(expected)) < 1e-4


@pytest.mark.parametrize("name", WRAPPED)
def test_every_momentum_is_compressed_and_it_learns(name):
    inner, moments = WRAPPED[name]
    tx = lro.mlorc_compress(inner, rank=RANK)
    params = start = random_like({"w": (5, 8), "b": (8,)}, 0)
    state, update = tx.init(params), jax.jit(tx.update)

    def is_code(x):
        return hasattr(x, "left")

    codes = [x for x in jax.tree.leaves(state, is_leaf=is_code) if is_code(x)]
    shapes = [(code.left.shape, code.right.shape) for code in codes]
    assert shapes == [((5, RANK), (RANK, 8))] * moments
    for _ in range(60):
        updates, state = update(params, state, params)
        params = jax.tree.map(lambda p, u: p - 0.02 * u, params, updates)
    for leaf in params:
        assert norm(params[leaf]) < 0.8 * norm(start[leaf])


def test_only_the_fields_that_are_named():
    tx = lro.mlorc_compress(optax.scale_by_adam(), rank=RANK, fields=("nu",))
    inner = tx.init(random_like({"w": (5, 8)}, 0)).inner_state
    assert inner.mu["w"].shape == (5, 8)
    assert inner.nu["w"].left.shape == (5, RANK)


def test_around_lion_it_is_mlorc_lion():
    grads = gradients((5, 8))
    around = lro.mlorc_compress(optax.scale_by_lion(), rank=RANK, **EXACT)
    expected = reference.mlorc_lion(grads, RANK)
    for u, want in zip(on_one_leaf(around, grads), expected, strict=True):
        np.testing.assert_array_equal(u, want)


# Sizes (M-7)


@pytest.mark.parametrize("r", [4, 30])
@pytest.mark.parametrize(
    ("make", "per_matrix"),
    [
        (lambda r: lro.mlorc_scale_by_adam(r, matrices=lro.MatrixAxes()), 2),
        (lambda r: lro.mlorc_scale_by_lion(r, matrices=lro.MatrixAxes()), 1),
        (lambda r: lro.mlorc_adamw(0.1, r, matrices=lro.MatrixAxes()), 2),
        (lambda r: lro.mlorc_lion(0.1, r, matrices=lro.MatrixAxes()), 1),
        (
            lambda r: lro.mlorc_compress(
                optax.trace(0.9), rank=r, matrices=lro.MatrixAxes()
            ),
            1,
        ),
    ],
    ids=["adam", "lion", "adamw", "lion with rate", "trace"],
)
def test_state_size(make, per_matrix, r):
    m, n = 40, 24
    params = {"w": jax.ShapeDtypeStruct((m, n), jnp.float32)}
    tx = make(r)
    arrays = jax.tree.leaves(jax.eval_shape(tx.init, params))
    counters = [x for x in arrays if x.ndim == 0]
    assert len(counters) <= 2
    kept = per_matrix * min(r, n) * (m + n)
    assert lro.state_bytes(tx, params) == 4 * (kept + len(counters))
    state = tx.init({"w": jnp.zeros((m, n))})
    assert lro.state_bytes(tx, params) == sum(x.nbytes for x in jax.tree.leaves(state))


def test_the_ablations_keep_one_moment_whole():
    params = {"w": jax.ShapeDtypeStruct((40, 24), jnp.float32)}
    for field in ("mu", "nu"):
        tx = lro.mlorc_scale_by_adam(4, compress=(field,))
        assert lro.state_bytes(tx, params) == 4 * (40 * 24 + 4 * (40 + 24) + 2)


@pytest.mark.parametrize("shape", [(96, 200), (200, 96)], ids=str)
@pytest.mark.parametrize(
    "method", [lro.mlorc_adamw, lro.mlorc_lion], ids=["adam", "lion"]
)
def test_no_large_matrix_is_transposed(method, shape):
    """Whichever side is the shorter one, the leaf is used as it lies in memory."""
    tx, params = method(0.1, 4), {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    state = jax.eval_shape(tx.init, params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    text = jax.jit(step).lower(params, state, params).compile().as_text()
    large = r"= f32\[(96,200|200,96)\]\S* "
    assert re.search(large + r"fusion\(", text)
    assert not re.search(large + r"(transpose|copy)\(", text)


# Whole optimizers


@pytest.mark.parametrize(
    ("alias", "method"),
    [
        (
            lambda **kwargs: lro.mlorc_adamw(
                0.1, RANK, b1=0.7, b2=0.95, eps=1e-3, **EXACT, **kwargs
            ),
            lro.mlorc_scale_by_adam(RANK, b1=0.7, b2=0.95, eps=1e-3, **EXACT),
        ),
        (
            lambda **kwargs: lro.mlorc_lion(
                0.1, RANK, b1=0.7, b2=0.95, **EXACT, **kwargs
            ),
            lro.mlorc_scale_by_lion(RANK, b1=0.7, b2=0.95, **EXACT),
        ),
    ],
    ids=["adamw", "lion"],
)
def test_whole_optimizers_are_their_parts(alias, method):
    params = random_like({"w": (5, 8), "b": (8,), "frozen": (5, 8)}, 0)
    grads = random_grads(params, 4)
    mask = {"w": True, "b": True, "frozen": False}
    updates, _ = run(alias(weight_decay=0.5, mask=mask), params, grads)
    directions, _ = run(method, params, grads)
    for u, d in zip(updates, directions, strict=True):
        expected = {
            "w": -0.1 * (d["w"] + 0.5 * params["w"]),
            "b": -0.1 * (d["b"] + 0.5 * params["b"]),
            "frozen": -0.1 * d["frozen"],
        }
        assert_close(u, expected)


# Numbers


@pytest.mark.parametrize(
    ("tx", "field", "decay", "steps"),
    [
        (lro.mlorc_adamw(0.1, matrices=lro.MatrixAxes()), "nu", 0.999, 1000),
        (lro.mlorc_adamw(0.1, matrices=lro.MatrixAxes()), "mu", 0.8, 20),
        (lro.mlorc_lion(0.1, matrices=lro.MatrixAxes()), "mu", 0.99, 300),
    ],
    ids=["second moment", "first moment", "lion"],
)
def test_moments_of_bfloat16_parameters_keep_decaying(tx, field, decay, steps):
    # Rounded to bfloat16 after each step, 0.999 v would be v again (M-1.4).
    params = {"w": jnp.ones((5, 8), jnp.bfloat16)}
    zero = jax.tree.map(jnp.zeros_like, params)
    _, state = tx.update(params, tx.init(params), params)

    def step(state, _):
        return tx.update(zero, state, params)[1], None

    def moment(state):
        code = optax.tree.get(state, field)["w"]
        assert code.left.dtype == code.right.dtype == jnp.float32
        return code.left @ code.right

    after = moment(jax.lax.scan(step, state, length=steps)[0])
    before = moment(state)
    assert np.min(before) > 0
    np.testing.assert_allclose(after, decay**steps * before, rtol=2e-3)


# Errors


@pytest.mark.parametrize(
    "make",
    [
        lambda rank: lro.mlorc_scale_by_adam(rank),
        lambda rank: lro.mlorc_scale_by_adam(rank, compress=("mu",)),
        lambda rank: lro.mlorc_scale_by_lion(rank),
        lambda rank: lro.mlorc_compress(optax.trace(0.9), rank=rank),
        lambda rank: lro.mlorc_adamw(0.1, rank),
        lambda rank: lro.mlorc_lion(0.1, rank),
    ],
    ids=["adam", "adam-mu", "lion", "compress", "adamw", "lion-alias"],
)
def test_ranks_that_are_none(make):
    with pytest.raises(ValueError, match="`rank` must be at least 1, got 0"):
        make(0)
    with pytest.raises(TypeError, match="`rank` must be a Python int.*got 2.0"):
        make(2.0)


@pytest.mark.parametrize("compress", [(), ("mu", "v"), ("momentum",)], ids=str)
def test_moments_that_adam_does_not_have(compress):
    with pytest.raises(ValueError, match="`compress` must name 'mu', 'nu' or both"):
        lro.mlorc_scale_by_adam(compress=compress)


def test_an_optimizer_without_momentum():
    params = {"w": jnp.ones((5, 8))}
    with pytest.raises(ValueError, match="momentum of an optimizer without any"):
        lro.mlorc_compress(optax.scale_by_rms(), fields=("mu",)).init(params)
    with pytest.raises(ValueError, match="has the fields mu, nu"):
        lro.mlorc_compress(optax.scale_by_adam(), fields=("trace",)).init(params)


def test_sketches_that_are_none():
    with pytest.raises(ValueError, match="`oversample` must not be negative, got -1"):
        lro.mlorc_scale_by_lion(oversample=-1)
    with pytest.raises(ValueError, match="`power_iters` must not be negative, got -1"):
        lro.mlorc_scale_by_adam(power_iters=-1)


def test_gradients_of_low_rank_have_derivatives():
    """Of a rank below that of the codes, where values of zero come many times."""
    tx, ones = lro.mlorc_scale_by_adam(2, matrices=lro.MatrixAxes()), jnp.ones((8, 12))

    @jax.jit
    def after_two_updates(t):
        x, state = ones, tx.init({"w": ones})
        for _ in range(2):
            grad = 2 * x * jnp.cos(t) + t
            updates, state = tx.update({"w": grad}, state)
            x = x - 0.1 * updates["w"]
        return jnp.sum(x**2)

    want = (after_two_updates(1e-2) - after_two_updates(-1e-2)) / 2e-2
    np.testing.assert_allclose(jax.grad(after_two_updates)(0.0), want, rtol=1e-2)


# What of a gradient is multiplied, and by what.
OUTLIERS = {
    "an entry": (np.s_[3, 5], 1e6),
    "six entries": ((np.arange(6) * 7, np.arange(6) * 5), 1e4),
    "a row": (np.s_[3], 1e5),
    "all": (np.s_[:], 1e4),
}


@pytest.mark.parametrize("outlier", OUTLIERS)
@pytest.mark.parametrize("tier", ["xla", "interpret cuda"])
def test_an_outlier_in_noise_does_not_stay(outlier, tier):
    """Of gradients without any structure, a flat V is all that factors can keep."""
    shape, when, (where, factor) = (48, 96), 8, OUTLIERS[outlier]
    grads = np.array(gradients(shape, when + 25))
    spoiled = grads.copy()
    spoiled[when][where] *= factor
    tx = lro.mlorc_scale_by_adam(4)

    def norms(grads):
        def step(state, grad):
            update, state = tx.update({"w": grad}, state)
            return state, jnp.linalg.norm(update["w"])

        return jax.lax.scan(step, tx.init({"w": jnp.ones(shape)}), grads)[1]

    scope = contextlib.nullcontext() if tier == "xla" else interpreted("cuda")
    with scope:
        usual, found = (np.asarray(jax.jit(norms)(x)) for x in (grads, spoiled))
    ratio = found / usual
    np.testing.assert_array_equal(ratio[:when], 1)
    # Adam too goes five times as far where all gradients grow at once.
    assert ratio.max() < (8 if outlier == "all" else 4.5)
    assert ratio[-1] < 1.2


@pytest.mark.parametrize("where", [np.s_[2, 3], np.s_[:]], ids=["entry", "all"])
def test_what_a_gradient_adds_has_the_bound_that_is_documented(where):
    """In float64 by the formula, at full rank, where nothing is lost."""
    b1, b2, eps, shape = 0.8, 0.99, 1e-8, (5, 8)
    grads = np.array(gradients(shape, 9))
    grads[6][where] *= 1e4
    full = {"w": lro.MatrixAxes()}
    tx = lro.mlorc_scale_by_adam(5, b1=b1, b2=b2, eps=eps, matrices=full)
    m, v = np.zeros(shape), np.zeros(shape)
    state = tx.init({"w": jnp.ones(shape)})
    for t, grad in enumerate(grads):
        g = np.float64(grad)
        most = np.inf
        if t:
            longer = max(1, 100 * (1 - b2) / (1 - b2**t))
            most = 0.1 * np.sqrt(v.size) * v.mean() * longer
        scale = min(1, np.sqrt(most / ((1 - b2) * np.mean(g**2))))
        assert (scale < 1) == (t == 6)
        m = b1 * m + (1 - b1) * scale * g
        v = b2 * v + np.minimum((1 - b2) * g**2, most)
        m_hat, v_hat = m / (1 - b1 ** (t + 1)), v / (1 - b2 ** (t + 1))
        updates, state = tx.update({"w": jnp.asarray(grad)}, state)
        expected = m_hat / (np.sqrt(v_hat) + eps)
        most_of_all = (1 - b1) / np.sqrt((1 - b2) * (1 - b1**2 / b2))
        expected = np.clip(expected, -most_of_all, most_of_all)
        assert relative_error(updates["w"], expected) < 1e-3


def test_the_last_step_that_is_counted_is_one_like_others():
    params = {"w": jnp.ones((8, 6))}
    tx = lro.mlorc_scale_by_adam(2)
    _, state = tx.update(params, tx.init(params))
    late = state._replace(step=jnp.int32(2**31 - 1))
    updates, _ = tx.update(params, late)
    assert_close(updates, tx.update(params, late._replace(step=jnp.int32(10**6)))[0])


@pytest.mark.parametrize(
    ("make", "tier", "waiting"),
    [
        (lro.mlorc_scale_by_adam, "xla", True),
        (lro.mlorc_scale_by_adam, "pallas", False),
        (lro.mlorc_scale_by_lion, "xla", False),
    ],
)
def test_on_gpu_leaves_wait_for_one_another_where_a_second_moment_is_stored(
    make, tier, waiting
):
    tx = make(rank=2)

    def barriers(count):
        params = {f"w{i}": jnp.ones((32, 48)) for i in range(count)}
        with lro.kernels.dispatch(tier):
            traced = jax.jit(tx.update).trace(params, tx.init(params), params)
            lowered = traced.lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("optimization_barrier")

    assert (barriers(2) > barriers(1)) == waiting
