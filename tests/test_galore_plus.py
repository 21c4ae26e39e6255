"""GaLore+ against its formulas: heads, layouts, the sparse residual, sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from running import (
    assert_close,
    random_grads,
    random_like,
    relative_error,
    run,
)

import lowrank_optax as lro
from lowrank_optax._src.parts.recovery import _entries_of_product

ADAM = optax.scale_by_adam()
STEPS, PERIOD, WARMUP, RANK, HEADS = 50, 10, 13, 3, 4
SHAPE = (10, 16)  # of a query kernel: four heads of width 4
DENSITY = 0.1
KEPT = 16
EXACT = lro.TopSingular("gram_eigh")


def galore_plus(inner=ADAM, **changes):
    settings = dict(rank=RANK, num_heads=HEADS, update_every=PERIOD, density=DENSITY)
    return lro.galore_plus_project(inner, **settings | changes)


def gradients(shape=SHAPE, steps=STEPS):
    """A signal that all heads share, and noise."""
    signal = random_like({"a": (shape[0], 4), "b": (4, *shape[1:])}, 0)
    signal = jnp.tensordot(
        signal["a"] * jnp.array([4.0, 2.0, 1.0, 0.5]), signal["b"], 1
    )
    return list(signal + random_like({"g": (steps, *shape)}, 1)["g"])


def in_query(grads):
    return [{"q_proj": g} for g in grads]


# Heads


@functools.cache
def cross_head(heads, rank, batch=()):
    old = jnp.zeros((*batch, 12, rank))
    return jax.jit(lambda key, g: lro.CrossHead(heads, EXACT).select(key, g, old, 0))


def heads_of(basis, grad, heads):
    """The heads whose columns the basis spans, one matrix."""
    blocks = np.split(np.asarray(grad, np.float64), heads, axis=1)
    return [i for i, g in enumerate(blocks) if np.linalg.norm(basis.T @ g) > 1e-3]


def orthogonal_heads(heads=6, width=2):
    """A gradient of which no two heads have a direction in common."""
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 12)))[0]
    return (q[:, : heads * width] * np.tile([2.0, 1.0], heads)).astype(np.float32)


@pytest.mark.parametrize(
    ("rank", "expected"), [(1, 1), (2, 1), (3, 2), (5, 3), (12, 6)]
)
def test_as_many_heads_as_the_rank_needs(rank, expected):
    grad = orthogonal_heads()
    drawn = []
    for i in range(12):
        basis = np.asarray(cross_head(6, rank)(jax.random.key(i), grad), np.float64)
        np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-5)
        drawn.append(tuple(heads_of(basis, grad, 6)))
        assert len(drawn[-1]) == expected
    # All heads together are always the same.
    assert (len(set(drawn)) >= 4) == (expected < 6)


def test_the_basis_is_the_drawn_heads_leading_subspace():
    grad = np.asarray(gradients((12, 24), 1)[0])
    basis = np.asarray(cross_head(4, 3)(jax.random.key(1), grad), np.float64)
    errors = []
    for block in np.split(grad, 4, axis=1):
        exact = reference.top_singular(block, 3)
        errors.append(np.linalg.norm(basis @ basis.T - exact @ exact.T))
    assert np.sum(np.array(errors) < 1e-3) == 1


def test_heads_are_drawn_anew_for_each_matrix_and_uniformly():
    stack = np.stack([orthogonal_heads()] * 100)
    counts = np.zeros(6)
    for i in range(3):
        bases = cross_head(6, 2, (100,))(jax.random.key(i), stack)
        for basis in np.asarray(bases, np.float64):
            counts[heads_of(basis, stack[0], 6)] += 1
    assert counts.sum() == 300
    # Chi-square with 5 degrees of freedom: above 20.5 once in a thousand.
    assert np.sum((counts - 50) ** 2 / 50) < 20.5


def test_all_layouts_of_a_kernel_are_one():
    grads = gradients(steps=PERIOD + 2)
    tx = galore_plus(subspace=EXACT)
    flat, _ = run(tx, {"query": grads[0]}, [{"query": g} for g in grads])
    layouts = {
        (10, 4, 4): ((0, 1, 2), lro.MatrixAxes(rows=0, cols=(1, 2))),
        (4, 4, 10): ((1, 2, 0), lro.MatrixAxes(rows=2, cols=(0, 1))),
        (16, 10): ((1, 0), lro.MatrixAxes(rows=1, cols=0)),
    }
    for shape, (order, axes) in layouts.items():

        def turn(x, shape=shape, order=order):
            split = x.reshape(10, *([4, 4] if len(shape) == 3 else [16]))
            return jnp.transpose(split, order)

        turned = [{"query": turn(g)} for g in grads]
        # A kernel with an axis of heads needs no number.
        heads = HEADS if len(shape) == 2 else None
        tx = galore_plus(matrices={"query": axes}, num_heads=heads, subspace=EXACT)
        updates, state = run(tx, turned[0], turned)
        assert state.basis["query"].shape == (10, RANK)
        for u, want in zip(updates, flat, strict=True):
            assert u["query"].shape == shape
            got = np.transpose(u["query"], np.argsort(order)).reshape(SHAPE)
            assert_close(got, want["query"], rtol=1e-4, atol=1e-5)


def test_keys_of_grouped_queries_have_their_own_heads():
    grad = orthogonal_heads()
    params = {"q_proj": grad, "k_proj": grad}
    tx = galore_plus(
        rank=2, num_heads=(6, 3), density=0, update_every=1, subspace=EXACT
    )
    state, update = tx.init(params), jax.jit(tx.update)
    drawn = []
    for _ in range(12):
        _, state = update(params, state)
        basis = {k: np.asarray(b, np.float64) for k, b in state.basis.items()}
        queries = heads_of(basis["q_proj"], grad, 6)
        keys = heads_of(basis["k_proj"], grad, 3)
        assert len(queries) == len(keys) == 1
        drawn.append((queries[0] // 2, keys[0]))
    assert any(q != k for q, k in drawn)  # apart from one another
    assert len(set(drawn)) > 3  # and anew at each refresh


PATHS = {
    "q_proj/kernel": "left",
    "layers/0/self_attn/k_proj/kernel": "left",
    "attention/query/kernel": "left",
    "keyProj": "left",
    "wq": "left",
    "wk": "left",
    "v_proj/kernel": "right",
    "query_key_value/kernel": "right",
    "keyboard": "right",
    "mlp/kernel": "right",
}


@pytest.mark.parametrize("path", PATHS)
def test_queries_and_keys_are_told_by_words(path):
    tx = galore_plus(num_heads=2)
    params = {path: jax.ShapeDtypeStruct((20, 8), jnp.float32)}
    assert lro.describe(tx, params)[0].side == PATHS[path]
    recovery = jax.eval_shape(tx.init, params).recovery[path]
    assert isinstance(recovery, optax.MaskedNode) == (PATHS[path] == "right")


# The residual


B1, B2, EPS = 0.8, 0.95, 0.3  # so large that its place and sign can be told


def sparse_residual_adam(grads, bases, kept, scale, b1=B1, b2=B2, eps=EPS):
    """Algorithms 1 and 2 on a query kernel, as GP-1 to GP-8 have them."""
    basis = m = v = None
    delta_m, square = np.zeros(kept), np.zeros(kept)
    support, directions = None, []
    for t, g in enumerate(map(reference.wide, grads), start=1):
        basis = reference.wide(bases.get(t - 1, basis))
        r = basis.T @ g
        m = b1 * (0 if m is None else m) + (1 - b1) * r
        v = b2 * (0 if v is None else v) + (1 - b2) * r**2
        n = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        update = scale * basis @ n
        if support is not None:
            delta_g = (g - basis @ r).reshape(-1)[support]
            delta_m = b1 * delta_m + (1 - b1) * delta_g
            square = b2 * square + (1 - b2) * g.reshape(-1)[support] ** 2
            since = t - WARMUP
            root = np.sqrt(square / (1 - b2**since))
            delta = delta_m / (1 - b1**since) / (root + eps)
            update.reshape(-1)[support] += scale * delta
        if t == WARMUP:
            size = np.abs(basis @ m).reshape(-1)
            support = np.argsort(-size, kind="stable")[:kept]
        directions.append(update)
    return directions, support


def test_galore_plus_adam_follows_the_formulas():
    settings = dict(b1=B1, b2=B2, eps=EPS)
    adam = optax.scale_by_adam(**settings)
    tx = galore_plus(adam, warmup=WARMUP, scale=0.5, **settings)
    grads = gradients()
    state, update = tx.init({"q_proj": grads[0]}), jax.jit(tx.update)
    updates, bases = [], {}
    for step, g in enumerate(in_query(grads)):
        u, state = update(g, state)
        updates.append(u["q_proj"])
        if step % PERIOD == 0:
            bases[step] = np.asarray(state.basis["q_proj"])
        residual = state.recovery["q_proj"]
        assert np.all(np.asarray(state.inner_state.nu["q_proj"]) >= 0)
        assert np.all(np.asarray(residual.square) >= 0)
        assert np.any(residual.mean != 0) == (step >= WARMUP)
    expected, support = sparse_residual_adam(grads, bases, KEPT, 0.5)
    assert len(bases) == STEPS // PERIOD
    assert sorted(np.asarray(residual.index)) == sorted(support)
    without, _ = run(
        galore_plus(adam, density=0, scale=0.5), {"q_proj": grads[0]}, in_query(grads)
    )
    for t, (u, want) in enumerate(zip(updates, expected, strict=True), start=1):
        assert relative_error(u, want) < 1e-4
        assert (relative_error(u, without[t - 1]["q_proj"]) > 0.01) == (t > WARMUP)


@pytest.mark.parametrize("shape", [(7, 9), (2, 3, 8, 5), (1, 6), (6, 1)], ids=str)
@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
def test_the_largest_entries_are_kept(shape, density):
    rng = np.random.default_rng(0)
    *batch, m, n = shape
    basis = np.linalg.qr(rng.standard_normal((*batch, m, min(m, 2))))[0]
    basis = basis.astype(np.float32)
    moment = rng.standard_normal((*batch, basis.shape[-1], n)).astype(np.float32)
    recovery = lro.SparseResidual(density, warmup=1)
    kept = max(1, round(density * m * n))
    age, empty = jnp.ones(batch, jnp.int32), jnp.zeros((*batch, kept))
    state = jax.jit(
        lambda basis, moment, state: recovery.observe(
            basis, {"0/mu": moment}, {"0/mu": "first"}, state
        )
    )(basis, moment, _state(recovery, kept, age, empty))
    size = np.abs(basis @ moment).reshape(*batch, m * n)
    want = np.argsort(-size, axis=-1)[..., :kept]
    np.testing.assert_array_equal(np.sort(state.index, -1), np.sort(want, -1))


def _state(recovery, kept, age, empty):
    tx = galore_plus(matrices=lro.MatrixAxes())
    one = jax.eval_shape(tx.init, {"q": jnp.ones((4, 4))}).recovery["q"]
    return type(one)(jnp.zeros(empty.shape, jnp.int32), empty, empty, age)


def test_a_bad_step_at_the_end_of_the_warmup_postpones_the_choice():
    grads = in_query(gradients(steps=6))
    tx = galore_plus(warmup=3)
    tx = tx._replace(update=jax.jit(tx.update))
    bad = {"q_proj": grads[0]["q_proj"].at[0, 0].set(jnp.nan)}
    state = tx.init(grads[0])
    for g in [*grads[:2], bad]:
        _, state = tx.update(g, state)
    assert not np.any(state.recovery["q_proj"].index)
    for g in [*grads[2:], jax.tree.map(jnp.zeros_like, grads[0])]:
        u, state = tx.update(g, state)
    assert len(set(np.asarray(state.recovery["q_proj"].index))) == KEPT
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((u, state)))


def test_the_residual_begins_after_the_first_period_unless_told():
    grads = in_query(gradients(steps=5))
    settings = dict(update_every=3, subspace=EXACT)
    usual, _ = run(galore_plus(**settings), grads[0], grads)
    low, _ = run(galore_plus(density=0, **settings), grads[0], grads)
    differ = [
        relative_error(u["q_proj"], v["q_proj"]) > 0.01
        for u, v in zip(usual, low, strict=True)
    ]
    assert differ == [False, False, False, True, True]


def test_a_scale_of_its_own_for_the_residual():
    grads = in_query(gradients(steps=3))

    def last(**changes):
        tx = galore_plus(warmup=1, subspace=EXACT, **changes)
        return run(tx, grads[0], grads)[0][-1]["q_proj"]

    low, both = last(density=0, scale=0.5), last(scale=0.5)
    doubled = last(scale=0.5, residual_scale=1.0)
    assert_close(doubled - low, 2 * (both - low), rtol=1e-4, atol=1e-5)
    assert np.count_nonzero(np.abs(both - low) > 1e-6) == KEPT


# Identities, sizes, errors


def test_with_one_head_and_no_residual_it_is_galore():
    params = random_like({"q_proj": (6, 9), "wk": (6, 9), "b": (9,)}, 0)
    grads = random_grads(params, PERIOD + 2)
    iteration = lro.TopSingular("subspace_iteration")
    galore = lro.galore_project(
        ADAM, rank=RANK, update_every=PERIOD, subspace=iteration, scale=0.5
    )
    want, _ = run(galore, params, grads)
    tx = galore_plus(density=0, scale=0.5, num_heads=(1, None))
    got, _ = run(tx, params, grads)
    for u, v in zip(got, want, strict=True):
        assert_close(u, v)


def test_ranks_may_adapt():
    params = random_like({"q_proj": SHAPE, "v_proj": SHAPE}, 0)
    params["q_proj"] = params["q_proj"][:, :1] * jnp.ones(16)
    tx = galore_plus(subspace=lro.EnergyRank(max_residual_energy=0.1))
    _, state = run(tx, params, [params] * 2)
    metrics = lro.diagnostics.state_metrics(state)
    assert metrics["rank/q_proj"] == 1 and metrics["rank/v_proj"] == RANK


@pytest.mark.parametrize(
    "make",
    [
        lambda r, **kw: galore_plus(rank=r, **kw),
        lambda r, **kw: lro.galore_plus_adamw(0.1, r, num_heads=4, **kw),
    ],
    ids=["method", "optimizer"],
)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
def test_state_size(make, shape):
    d, width = shape
    for name in ("q_proj", "k_proj", "up_proj"):
        params = {name: jax.ShapeDtypeStruct(shape, jnp.float32)}
        for r, density in [(4, 0.012), (11, 0.05), (8, 0)]:
            counters, kept = 2, 12 * round(density * d * width)
            if name == "up_proj":
                size = 24 * r + 2 * 40 * r
                kept = 0
            else:
                size = d * r + 2 * r * width
                counters += density > 0  # of the residual
            tx = make(r, density=density)
            assert lro.state_bytes(tx, params) == 4 * (size + counters) + kept


def test_the_residual_needs_no_large_temporary():
    m, n = 256, 384
    params = {"q_proj": jax.ShapeDtypeStruct((m, n), jnp.float32)}

    def temporary(density):
        tx = galore_plus(rank=64, density=density)
        state = jax.eval_shape(tx.init, params)
        update = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state)
        return update.compile().memory_analysis().temp_size_in_bytes

    # Beside the refresh and the update of m n numbers. What is kept takes 1% of m n,
    # rows and columns of factors for it would take 77%.
    assert temporary(0) < 1.6 * 4 * m * n
    assert temporary(0.012) < 2.0 * 4 * m * n


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: lro.SparseResidual(0.0), ValueError, "`density`"),
        (lambda: lro.SparseResidual(jnp.ones(())), TypeError, "`density`"),
        (lambda: lro.SparseResidual(warmup=0), ValueError, "`warmup`"),
        (lambda: galore_plus(density=-0.1), ValueError, "`density`"),
        (lambda: galore_plus(warmup=-1), ValueError, "`warmup`"),
        (lambda: galore_plus(num_heads=0), ValueError, "`num_heads`"),
        (lambda: galore_plus(num_heads=(2, 2.5)), TypeError, "`num_heads`"),
    ],
)
def test_arguments_that_cannot_be(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_does_not_fit_is_refused():
    params = {"q_proj": jnp.ones((6, 9))}
    switch = lro.Switch(5, lro.CrossHead(2), lro.RandomOrthonormal())
    for tx in (
        galore_plus(num_heads=2),
        *(
            lro.project_gradients(optax.trace(0.9), rank=2, subspace=x, side="left")
            for x in (lro.CrossHead(2), switch, lambda view: switch)
        ),
    ):
        with pytest.raises(ValueError, match="2 heads.*divide the 9 columns.*'q_proj'"):
            tx.init(params)
    tx = galore_plus(optax.scale_by_rms(), num_heads=3)
    with pytest.raises(ValueError, match="without momentum.*nu"):
        tx.update(params, tx.init(params))
    huge = {"q_proj": jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)}
    with pytest.raises(ValueError, match="'q_proj'.*int32"):
        jax.eval_shape(galore_plus().init, huge)


def test_galore_plus_adamw_is_its_parts():
    params = random_like({"q_proj": SHAPE, "b": (9,), "frozen": (6, 9)}, 0)
    grads = random_grads(params, 6)
    settings = dict(
        num_heads=2,
        density=0.2,
        warmup=2,
        residual_scale=0.7,
        transfer=lro.Reset(),
        subspace=lro.TopSingular("gram_eigh"),
        side="long",
        key=3,
    )
    tx = lro.galore_plus_adamw(
        0.1,
        2,
        update_every=4,
        scale=0.5,
        b1=0.8,
        b2=0.9,
        eps=1e-3,
        weight_decay=0.5,
        mask={"q_proj": True, "b": True, "frozen": False},
        **settings,
    )
    updates, _ = run(tx, params, grads)
    adam = dict(b1=0.8, b2=0.9, eps=1e-3)
    method = lro.galore_plus_project(
        optax.scale_by_adam(**adam),
        rank=2,
        update_every=4,
        scale=0.5,
        **adam,
        **settings,
    )
    directions, _ = run(method, params, grads)
    for u, d in zip(updates, directions, strict=True):
        expected = {
            "q_proj": -0.1 * (d["q_proj"] + 0.5 * params["q_proj"]),
            "b": -0.1 * (d["b"] + 0.5 * params["b"]),
            "frozen": -0.1 * d["frozen"],
        }
        assert_close(u, expected)


@pytest.mark.parametrize("layers", [1, 32])
def test_the_choice_of_entries_looks_at_an_eighth_of_a_matrix_at_once(layers):
    """Of a stack too, where that of each would be an eighth of the stack."""
    m = n = 256
    recovery = lro.SparseResidual(1 / m, warmup=1)
    age, empty = jnp.ones(layers, jnp.int32), jnp.zeros((layers, n))
    state = _state(recovery, n, age, empty)
    given = jnp.ones((layers, m, 2)), jnp.ones((layers, 2, n)), state

    def choose(basis, moment, state):
        return recovery.observe(basis, {"0/mu": moment}, {"0/mu": "first"}, state)

    usage = jax.jit(choose).lower(*given).compile().memory_analysis()
    looked_at = max(m * n // 8, layers * n) + layers * n  # beside what is kept
    thin = layers * (2 * m + 2 * n + 2 * n)
    # Sizes and places, each also sorted, of four bytes.
    assert usage.temp_size_in_bytes < 1.5 * 4 * (4 * looked_at + thin)


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_entries_of_a_product_in_several_blocks(batch):
    rng = np.random.default_rng(0)
    left, right = (rng.normal(size=(*batch, *s)) for s in ((6, 4), (4, 10)))
    row, col = rng.integers(6, size=(*batch, 7)), rng.integers(10, size=(*batch, 7))
    whole = (left @ right).reshape(-1, 6, 10)
    places = zip(whole, row.reshape(-1, 7), col.reshape(-1, 7), strict=True)
    expected = np.reshape([x[i, j] for x, i, j in places], (*batch, 7))
    given = (jnp.asarray(x) for x in (left, right, row, col))
    assert -(-8 * 4 * 7 // (6 * 10)) > 2  # blocks
    found = _entries_of_product(*given)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_residual_has_the_defaults_of_the_method():
    assert lro.SparseResidual() == lro.SparseResidual(
        density=0.012, warmup=200, b1=0.9, b2=0.999, eps=1e-8, residual_scale=None
    )
    inner, residual = optax.trace(0.9), lro.SparseResidual()
    tx = lro.project_gradients(inner, rank=2, recovery=residual)
    kept = tx.init({"w": jnp.ones((6, 8))}).recovery["w"]
    assert kept.age.dtype == kept.index.dtype == jnp.int32
    assert kept.mean.shape == kept.square.shape == kept.index.shape == (1,)
