"""I3S against its law of sampling and its formulas, and the sizes of its state."""

import itertools

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
STEP = jnp.zeros([], jnp.int32)
EXACT = lro.TopSingular("gram_eigh")
SUBSPACES = {
    "weighted": lro.ImportanceSampled(),
    "pool": lro.ImportanceSampled(pool=5),
    "hybrid": lro.Hybrid(1),
    "uniform": lro.UniformSampled(),
}


def i3s(inner=ADAM, **changes):
    return lro.i3s_subspace(inner, **{"rank": RANK, "update_every": PERIOD} | changes)


def gradients(shape, steps=STEPS):
    signal = random_like({"a": (*shape[:-1], 4), "b": (*shape[:-2], 4, shape[-1])}, 0)
    signal = signal["a"] * jnp.array([4.0, 2.0, 1.0, 0.5]) @ signal["b"]
    noise = random_like({"g": (steps, *shape)}, 1)["g"]
    return list(signal + 0.5 * noise)


# The law of sampling


DRAWS = 30_000
VALUES = np.array([1.0, 0.6, 0.4, 0.2, 0.1])
# The 99.9% points of chi-square with 2, 5 and 9 degrees of freedom.
CRITICAL = {2: 13.82, 5: 20.52, 9: 27.88}


def drawn(subspace, rank):
    """How often each set of singular vectors is drawn."""
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    v = np.linalg.qr(rng.standard_normal((7, 7)))[0][:, :5]
    grad = jnp.asarray((u * VALUES) @ v.T, jnp.float32)
    grad = grad / jnp.max(jnp.abs(grad))
    old = jnp.zeros((5, rank))

    @jax.jit
    @jax.vmap
    def draw(key):
        cosines = jnp.abs(u.T @ subspace.select(key, grad, old, STEP))
        return jnp.argmax(cosines, axis=0), jnp.max(cosines, axis=0)

    found, cosines = draw(jax.random.split(jax.random.key(1), DRAWS))
    assert np.min(cosines) > 0.999
    found = np.asarray(found)
    assert np.all(np.diff(found, axis=-1) > 0)  # distinct and sorted
    sets, counts = np.unique(found, axis=0, return_counts=True)
    return {tuple(map(int, s)): int(c) for s, c in zip(sets, counts, strict=True)}


def sequential(weights, size):
    """The probability of each set when one after the other is drawn, by weight."""
    law = dict.fromkeys(itertools.combinations(range(len(weights)), size), 0.0)
    for order in itertools.permutations(range(len(weights)), size):
        probability, left = 1.0, sum(weights)
        for i in order:
            probability *= weights[i] / left
            left -= weights[i]
        law[tuple(sorted(order))] += probability
    return law


def chi_square(counts, law):
    assert set(counts) <= set(law)
    expected = {k: DRAWS * p for k, p in law.items()}
    return sum((counts.get(k, 0) - e) ** 2 / e for k, e in expected.items())


def test_importance_sampling_draws_by_singular_values_without_replacement():
    counts = drawn(lro.ImportanceSampled(), 2)
    law = sequential(VALUES, 2)
    assert len(law) == 10 and abs(sum(law.values()) - 1) < 1e-12
    assert chi_square(counts, law) < CRITICAL[9]
    # So many draws can tell this law from its neighbours.
    assert chi_square(counts, sequential(VALUES**1.1, 2)) > CRITICAL[9]
    assert chi_square(counts, sequential(np.ones(5), 2)) > CRITICAL[9]


def test_the_weights_may_be_powers_of_the_singular_values():
    counts = drawn(lro.ImportanceSampled(weight_power=2.0), 2)
    assert chi_square(counts, sequential(VALUES**2, 2)) < CRITICAL[9]


def test_a_pool_draws_among_the_leading_vectors():
    counts = drawn(lro.ImportanceSampled(pool=4), 2)
    assert chi_square(counts, sequential(VALUES[:4], 2)) < CRITICAL[5]


def test_uniform_sampling_takes_all_sets_alike():
    law = dict.fromkeys(itertools.combinations(range(5), 2), 0.1)
    assert chi_square(drawn(lro.UniformSampled(), 2), law) < CRITICAL[9]


def test_hybrid_keeps_the_leaders_and_draws_the_others_uniformly():
    law = dict.fromkeys([(0, 1, 2), (0, 1, 3), (0, 1, 4)], 1 / 3)
    assert chi_square(drawn(lro.Hybrid(2), 3), law) < CRITICAL[2]


# The law of subspaces


def rng_matrix(m, n, rank):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))
    return jnp.asarray(a / max(np.abs(a).max(), 1e-30), jnp.float32)


@pytest.mark.parametrize("name", SUBSPACES)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (4, 4)], ids=str)
def test_bases_are_orthonormal_for_any_gradient(name, shape):
    subspace = SUBSPACES[name]
    assert isinstance(subspace, lro.Subspace)
    old = jnp.zeros((shape[0], 3))
    keys = jax.random.split(jax.random.key(0), 20)
    select = jax.jit(jax.vmap(lambda k, g: subspace.select(k, g, old, STEP), (0, None)))
    for rank in (0, 1, 2, min(shape)):
        bases = np.asarray(select(keys, rng_matrix(*shape, rank)), np.float64)
        assert np.all(np.isfinite(bases))
        if rank == 0:
            continue  # the engine drops what is chosen for a zero gradient
        norms = np.linalg.norm(bases, axis=-2)
        unit = norms > 0
        gram = np.swapaxes(bases, -1, -2) @ bases
        np.testing.assert_allclose(gram, np.eye(3) * unit[:, None], rtol=0, atol=1e-5)
        if rank >= 3:
            assert np.all(unit)


def test_vectors_of_no_weight_come_last():
    # Two of them carry the gradient: a draw of three has to take both, and one other.
    grad, old = rng_matrix(6, 9, 2), jnp.zeros((6, 3))
    for seed in range(20):
        subspace = lro.ImportanceSampled()
        basis = subspace.select(jax.random.key(seed), grad, old, STEP)
        assert relative_error(basis @ (basis.T @ grad), grad) < 1e-3


def test_null_vectors_are_not_drawn_where_others_suffice():
    # Their computed singular values are noise.
    rng = np.random.default_rng(0)
    sides = [np.linalg.qr(rng.standard_normal((n, 16)))[0] for n in (256, 512)]
    grad = jnp.asarray(sides[0] @ sides[1].T * 16, jnp.float32)
    subspace, old = lro.ImportanceSampled(), jnp.zeros((256, 12))
    select = jax.jit(lambda key: subspace.select(key, grad, old, STEP))
    for seed in range(10):
        basis = select(jax.random.key(seed))
        captured = sides[0].T @ np.asarray(basis, np.float64)
        np.testing.assert_allclose(np.sum(captured**2, axis=0), 1.0, atol=1e-3)


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
def test_small_values_are_weights_too(size):
    """Beside one large value, two small groups, as often as the law draws them."""
    values = np.r_[1.0, np.full(4, 1.3 * size), np.full(15, 0.8 * size)]
    rng = np.random.default_rng(0)
    sides = [np.linalg.qr(rng.standard_normal((n, 20)))[0] for n in (20, 32)]
    grad = jnp.asarray(sides[0] * values @ sides[1].T, jnp.float32)
    draws, rank = 400, 5

    def select(key):
        return lro.ImportanceSampled().select(key, grad, jnp.zeros((20, rank)), STEP)

    keys = jax.random.split(jax.random.key(0), draws)
    bases = np.asarray(jax.jit(lambda keys: jax.lax.map(select, keys))(keys))
    taken = np.sum((sides[0].T @ bases) ** 2, axis=(0, -1)) / draws
    # One after the other, in float64.
    law, many = np.zeros(20), 20_000
    for _ in range(many):
        law[rng.choice(20, rank, replace=False, p=values / values.sum())] += 1 / many
    for group in (slice(0, 1), slice(1, 5), slice(5, 20)):
        assert abs(taken[group].sum() - law[group].sum()) < 0.2


def test_slices_of_a_stack_are_drawn_independently():
    grads = jnp.broadcast_to(rng_matrix(6, 9, 6), (40, 6, 9))
    bases = lro.ImportanceSampled().select(
        jax.random.key(0), grads, jnp.zeros((40, 6, 2)), STEP
    )
    projectors = np.asarray(bases @ bases.mT)
    distinct = {tuple(np.round(p, 2).ravel()) for p in projectors}
    assert 5 < len(distinct) <= 15


# The whole method


def run_and_collect_bases(tx, grads):
    """Updates, and the basis at each refresh."""
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    updates, bases = [], {}
    for step, g in enumerate(grads):
        u, state = update(g, state)
        updates.append(u)
        bases |= {step: np.asarray(state.basis)} if step % PERIOD == 0 else {}
        second = optax.tree.get(state.inner_state, "nu", default=np.zeros(1))
        assert np.all(np.asarray(second) >= 0)
    return updates, bases


@pytest.mark.parametrize("transfer", [lro.Keep(), lro.Rotate()], ids=str)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=str)
def test_i3s_adam_follows_the_formulas(shape, transfer):
    grads = gradients(shape)
    tx = i3s(scale=0.25, transfer=transfer)
    updates, bases = run_and_collect_bases(tx, grads)
    turned = shape[0] > shape[1]
    grads = [g.T for g in grads] if turned else grads
    leading = 0
    for step, basis in bases.items():
        u, s, _ = np.linalg.svd(reference.wide(grads[step]), full_matrices=False)
        cosines = np.abs(u.T @ basis)
        chosen = np.argmax(cosines, axis=0)
        assert np.min(np.max(cosines, axis=0)) > 0.999  # each is a singular vector
        assert np.all(np.diff(chosen) > 0)
        leading += list(chosen) == list(range(RANK))
    assert leading < len(bases) == STEPS // PERIOD  # and not only the leading ones
    expected = reference.galore_adam(
        grads, bases, scale=0.25, transfer=type(transfer).__name__.lower()
    )
    for u, want in zip(updates, expected, strict=True):
        assert relative_error(u, want.T if turned else want) < 1e-4


def test_momentum_sgd_with_hybrid_selection_is_algorithm_4():
    grads, b1 = gradients((6, 9)), 0.9
    tx = lro.hybrid_subspace(
        optax.ema(b1, debias=False), rank=RANK, leading=1, update_every=PERIOD
    )
    updates, bases = run_and_collect_bases(tx, grads)
    basis = momentum = None
    for step, (g, u) in enumerate(
        zip(map(reference.wide, grads), updates, strict=True)
    ):
        if step in bases:
            old, basis = basis, reference.wide(bases[step])
            first = reference.top_singular(g, 1)
            assert abs(first[:, 0] @ basis[:, 0]) > 0.999
            if old is None:
                momentum = np.zeros((RANK, 9))
            else:
                momentum = basis.T @ old @ momentum
        momentum = b1 * momentum + (1 - b1) * basis.T @ g
        assert relative_error(u, basis @ momentum) < 1e-4


@pytest.mark.parametrize("sampled", ["i3s", "uniform", "hybrid"])
def test_at_full_rank_sampling_is_galore(sampled):
    params = random_like({"w": (6, 9), "v": (9, 6), "b": (9,)}, 0)
    grads = random_grads(params, PERIOD + 2)
    every = {"matrices": lro.MatrixAxes(), "update_every": PERIOD}
    arguments = every | {"rank": 6}
    tx = {
        "i3s": lambda: i3s(**arguments),
        "uniform": lambda: lro.project_gradients(
            ADAM,
            rank=6,
            subspace=lro.UniformSampled(),
            refresh=lro.Every(PERIOD),
            matrices=lro.MatrixAxes(),
        ),
        "hybrid": lambda: lro.hybrid_subspace(
            ADAM, leading=2, transfer=lro.Keep(), **arguments
        ),
    }[sampled]()
    got, _ = run(tx, params, grads)
    want, _ = run(lro.galore_project(ADAM, subspace=EXACT, **arguments), params, grads)
    for u, v in zip(got, want, strict=True):
        assert_close(u, v)


@pytest.mark.parametrize("rank", [3, 40])
def test_hybrid_with_leaders_only_is_galore(rank):
    params = random_like({"w": (6, 9)}, 0)
    grads = random_grads(params, PERIOD + 2)
    every = {"matrices": lro.MatrixAxes(), "update_every": PERIOD}
    arguments = every | {"rank": rank}
    got, _ = run(
        lro.hybrid_subspace(ADAM, leading=rank, transfer=lro.Keep(), **arguments),
        params,
        grads,
    )
    want, _ = run(lro.galore_project(ADAM, subspace=EXACT, **arguments), params, grads)
    for u, v in zip(got, want, strict=True):
        assert_close(u, v)


def test_with_firas_recovery_it_is_fira_in_a_sampled_subspace():
    params = random_like({"w": (6, 9)}, 0)
    grads = random_grads(params, PERIOD + 2)
    got, state = run(i3s(recovery=lro.FiraResidual(1.1)), params, grads)
    want, _ = run(
        lro.fira_project(
            ADAM,
            rank=RANK,
            update_every=PERIOD,
            limiter=1.1,
            subspace=lro.ImportanceSampled(),
        ),
        params,
        grads,
    )
    for u, v in zip(got, want, strict=True):
        assert_close(u, v)
        assert np.linalg.matrix_rank(np.asarray(u["w"]), 1e-3) == 6
    assert state.recovery["w"].norm > 0


@pytest.mark.parametrize("bad", [0.0, np.nan])
@pytest.mark.parametrize("name", SUBSPACES)
def test_an_unusable_gradient_leaves_the_basis(name, bad):
    g = gradients((6, 9), 1)[0]
    tx = lro.project_gradients(
        ADAM, rank=RANK, subspace=SUBSPACES[name], refresh=lro.Every(1)
    )
    _, before = run(tx, g, [g])
    updates, after = run(tx, g, [bad * g, g], before)
    assert np.all(np.isfinite(updates[1])) and np.any(np.asarray(updates[1]))
    assert np.all(np.isfinite(after.basis))
    _, kept = run(tx, g, [bad * g], before)
    assert_close(kept.basis, before.basis)


# Sizes (M-7) and arguments

M, N, S, L = 40, 24, 24, 40


@pytest.mark.parametrize(
    ("make", "moments"),
    [
        (lambda r: i3s(rank=r, matrices=lro.MatrixAxes()), 2),
        (lambda r: lro.i3s_adamw(0.1, rank=r, matrices=lro.MatrixAxes()), 2),
        (
            lambda r: lro.hybrid_subspace(
                optax.trace(0.9), rank=r, leading=2, matrices=lro.MatrixAxes()
            ),
            1,
        ),
    ],
    ids=["i3s", "adamw", "hybrid"],
)
@pytest.mark.parametrize("r", [4, 30])
def test_state_size(make, moments, r):
    params = {"w": jax.ShapeDtypeStruct((M, N), jnp.float32)}
    rank, counters = min(r, S), moments  # the engine's, and Adam's
    numbers = S * rank + moments * L * rank
    assert lro.state_bytes(make(r), params) == 4 * (numbers + counters)


def test_i3s_adamw_is_its_parts():
    params = random_like({"w": (6, 9), "frozen": (6, 9)}, 0)
    grads = random_grads(params, PERIOD + 2)
    tx = lro.i3s_adamw(
        0.1,
        RANK,
        update_every=PERIOD,
        scale=0.5,
        b1=0.8,
        b2=0.9,
        eps=1e-3,
        weight_decay=0.5,
        mask={"w": True, "frozen": False},
        transfer=lro.Rotate(),
    )
    updates, _ = run(tx, params, grads)
    inner = optax.scale_by_adam(b1=0.8, b2=0.9, eps=1e-3)
    method = i3s(inner, scale=0.5, transfer=lro.Rotate())
    directions, _ = run(method, params, grads)
    for u, d in zip(updates, directions, strict=True):
        assert_close(u["w"], -0.1 * (d["w"] + 0.5 * params["w"]))
        assert_close(u["frozen"], -0.1 * d["frozen"])


def test_arguments_that_cannot_be():
    with pytest.raises(ValueError, match="at most the rank 3, got 4"):
        lro.hybrid_subspace(ADAM, rank=3, leading=4)
    with pytest.raises(ValueError, match="`leading` must be at least 0"):
        lro.hybrid_subspace(ADAM, rank=3, leading=-1)
    with pytest.raises(ValueError, match="`pool` must be at least 1"):
        lro.ImportanceSampled(pool=0)
    with pytest.raises(ValueError, match="`weight_power` must be at least 0"):
        lro.ImportanceSampled(weight_power=-1.0)
