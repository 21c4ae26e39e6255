"""AdaRankGrad against its formulas: rank, refresh rule, trajectory, sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from running import assert_close, random_grads, random_like, relative_error
from running import run_eagerly as run

import lowrank_optax as lro
from lowrank_optax._src.leaves.context import one_layer
from lowrank_optax._src.parts.laws import Seen

ADAM = optax.scale_by_adam()
KEY = jax.random.key(0)


def spectrum(m, n, values, seed=0):
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((m, len(values))))[0]
    v = np.linalg.qr(rng.standard_normal((n, len(values))))[0]
    return (u * values) @ v.T


_select = jax.jit(
    lambda key, grad, old, allowed, min_rank: lro.EnergyRank(min_rank, allowed).select(
        key, grad, old, 0
    ),
    static_argnums=4,
)


def select(grad, max_rank, allowed=0.48, min_rank=1, key=KEY):
    """The basis that a gradient is given, without an older one."""
    grad = np.asarray(grad, np.float32)
    old = jnp.zeros((*grad.shape[:-1], max_rank))
    return np.asarray(_select(key, grad, old, allowed, min_rank), np.float64)


def ranks(basis):
    return np.any(basis != 0, axis=-2).sum(-1)


# The rank


@pytest.mark.parametrize("allowed", [1e-3, 1e-6, 3e-7, 1e-8, 1e-10, 0.0])
def test_small_residuals_are_told_apart(allowed):
    """Below 1e-7, a total minus what is kept would be rounding."""
    values = 0.3 ** np.arange(12)
    left_out = np.append(np.cumsum(values[:0:-1] ** 2)[::-1], 0) / np.sum(values**2)
    want = 1 + np.sum(left_out > allowed)
    assert ranks(select(spectrum(24, 32, values), 12, allowed)) == want


def residual_energy(a, q):
    return np.linalg.norm(a - q @ (q.T @ a)) ** 2 / np.linalg.norm(a) ** 2


def searched_rank(a, min_rank, max_rank, allowed):
    """Algorithm 2 with what AR-1 to AR-3 mend: midpoints, branches, squared norms."""
    q = np.linalg.svd(a)[0]
    while max_rank - min_rank >= 1:
        middle = (min_rank + max_rank) // 2
        if residual_energy(a, q[:, :middle]) > allowed:
            min_rank = middle + 1
        else:
            max_rank = middle
    return min_rank


@pytest.mark.parametrize("min_rank", [1, 3])
def test_the_rank_is_that_of_the_search(min_rank):
    seen = set()
    for seed in range(24):
        decay = [0.5, 0.7, 0.9][seed % 3]
        a = spectrum(16, 20, decay ** np.arange(16), seed)
        for allowed in (0.9, 0.48, 0.1, 0.003):
            want = searched_rank(a, min_rank, 8, allowed)
            singular = np.linalg.svd(a)[0]
            residuals = [residual_energy(a, singular[:, :r]) for r in range(1, 9)]
            if np.min(np.abs(np.array(residuals) - allowed)) < 0.02 * allowed:
                continue  # the sketch may see the other side of the threshold
            basis = select(a / np.abs(a).max(), 8, allowed, min_rank)
            assert ranks(basis) == want
            seen.add(want)
    assert len(seen) >= 4 and {min_rank, 8} <= seen


def test_kept_columns_are_the_leading_singular_vectors_in_order():
    a = spectrum(16, 20, 0.5 ** np.arange(16))
    basis = select(a, 8, 0.05)
    r = ranks(basis)
    assert 1 < r < 8 and not np.any(basis[:, r:])
    cosines = np.sum(basis[:, :r] * reference.top_singular(a, r), axis=0)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-4)


@pytest.mark.parametrize("allowed", [0.0, 1e-9, 0.48, 1.0])
def test_bases_are_orthonormal_or_zero_for_any_gradient(allowed):
    rng = np.random.default_rng(0)
    grads = [
        np.zeros((12, 20)),
        np.ones((12, 20)),
        np.outer(rng.standard_normal(12), rng.standard_normal(20)),
        np.eye(12, 20),
        1e-30 * rng.standard_normal((12, 20)),
    ]
    basis = select(
        np.stack([g / max(np.abs(g).max(), 1e-38) for g in grads]), 6, allowed
    )
    gram = basis.mT @ basis
    eye = np.eye(6) * np.any(basis != 0, axis=-2)[..., None]
    np.testing.assert_allclose(gram, eye, rtol=0, atol=1e-5)
    assert np.all((1 <= ranks(basis)) & (ranks(basis) <= 6))
    assert ranks(basis)[0] == 1
    if allowed == 0.48:
        assert list(ranks(basis)[1:4]) == [
            1,
            1,
            6,
        ]  # 48% of 12 equal values: at least 7


def test_the_matrices_of_a_stack_have_their_own_ranks():
    grads = [spectrum(16, 20, decay ** np.arange(16)) for decay in (0.3, 0.6)]
    want = [searched_rank(g, 1, 8, 0.03) for g in grads]
    for order in ([0, 1], [1, 0]):
        stacked = select(np.stack([grads[i] for i in order]), 8, 0.03)
        assert list(ranks(stacked)) == [want[i] for i in order]
    assert want[0] < want[1] < 8


# The refresh rule


CHANCE = 0.04  # the share of noise in a basis


def convergence_steps(
    measure, sizes, whole, threshold, max_interval, min_interval, decay=0.9
):
    """AR-9 to AR-12 in plain Python: the steps at which a basis is renewed."""
    due, age, average, level = [], None, 0.0, 0.0
    for step, (size, norm) in enumerate(zip(sizes, whole, strict=True)):
        converged = age is not None and age >= min_interval and average <= level
        if age is None or converged or age >= max_interval:
            due.append(step)
            age, average, level = 1, norm, threshold * norm
            shares = []
        else:  # of this step, the next one knows
            average = decay * average + (1 - decay) * size
            if measure == "share":
                average, level = share_average(shares, size, norm, min_interval)
                level *= threshold
            age += 1
    return due


def share_average(shares, size, norm, min_interval, chance=CHANCE):
    """The average of what a basis has beyond noise, and that of the first gradients."""
    shares.append((size / norm) ** 2 - chance)
    average = first = np.mean(shares[:10])
    for i, share in enumerate(shares[10:], start=11):
        average += 0.1 * (share - average)
        first = average if i <= min_interval else first
    return average, max(
        first if min_interval > 10 else np.mean(shares[:min_interval]), 0
    )


SMALL_AT_ONCE = [0, 7, 14, 21, 28, 35, 42, 49, 56]
CONVERGENCE = {
    "flat": ("norm", np.full(60, 0.9), 0.5, 12, 2, [0, 12, 24, 36, 48]),
    "falling": ("norm", 0.9 * 0.95 ** np.arange(60), 0.72, 100, 2, None),
    "small at once": ("norm", np.full(60, 0.1), 0.72, 100, 7, SMALL_AT_ONCE),
    "one dip": ("norm", np.where(np.arange(60) == 9, 0.0, 0.9), 0.72, 100, 1, [0]),
    "maximum below minimum": ("norm", np.full(60, 0.1), 0.72, 20, 30, [0, 20, 40]),
    # A share that is small from the start, but stays.
    "small share": ("share", np.full(60, 0.3), 0.5, 100, 3, [0]),
    "no more than noise": ("share", np.full(60, 0.15), 0.5, 100, 7, SMALL_AT_ONCE),
    "no share is enough": ("share", np.full(60, 0.2), 0.0, 20, 7, [0, 20, 40]),
    "falling share": ("share", 0.9 * 0.95 ** np.arange(60), 0.5, 100, 4, None),
    "rising and falling": (
        "share",
        0.5 + 0.4 * np.sin(np.arange(60) / 6),
        0.5,
        40,
        15,
        None,
    ),
}


@pytest.mark.parametrize("case", CONVERGENCE)
def test_refreshes_on_convergence(case):
    measure, sizes, threshold, longest, shortest, expected = CONVERGENCE[case]
    whole = np.full(60, 1.0) * (0.95 ** np.arange(60) if case == "falling" else 1)
    want = convergence_steps(measure, sizes, whole, threshold, longest, shortest)
    assert len(want) >= 1 and want == (expected or want)
    rule = lro.OnConvergence(threshold, longest, shortest, measure)
    state, due_steps = rule.init(view_of(9, 6), 0.5), []
    for step in range(60):
        # A basis of zero, as at the start, is always due.
        due = rule.due(state, step) | (step == 0)
        seen = (sizes[step], whole[step], CHANCE, 1.0)
        state = rule.after(state, due, Seen(*map(jnp.asarray, seen)))
        due_steps += [step] if due else []
    assert due_steps == want
    if expected is None:
        assert 1 < len(want) < 20


def view_of(*shape, batch=()):
    axes = tuple(range(len(batch), len(batch) + 2))
    shape, batch = (*batch, *shape), tuple(range(len(batch)))
    return lro.MatrixView("", shape, jnp.float32, axes[:1], axes[1:], batch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lro.OnConvergence(0.5, max_interval=0), "`max_interval`.*at least 1"),
        (lambda: lro.OnConvergence(0.5, min_interval=0), "`min_interval`.*at least 1"),
        (lambda: lro.OnConvergence(1.5), "`threshold`"),
        (lambda: lro.OnConvergence(measure="mean"), "measure 'mean'.*share, norm"),
        (lambda: lro.EnergyRank(0), "`min_rank`.*at least 1"),
        (lambda: lro.EnergyRank(max_residual_energy=1.5), r"\[0, 1\]"),
        (lambda: lro.adaptive_rank(ADAM, max_rank=2, min_rank=3), "at most `max_rank`"),
        (lambda: lro.adaptive_rank(ADAM, max_rank=0), "`max_rank`.*at least 1"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def converging(refresh):
    return lro.project_gradients(optax.trace(0.9), rank=4, refresh=refresh)


def ages(tx, grads, bad=()):
    """Steps since the last renewal, after each step."""
    params = {"w": jnp.zeros_like(grads[0])}
    state, update, found = tx.init(params), jax.jit(tx.update), []
    for step, g in enumerate(grads):
        _, state = update({"w": jnp.nan * g if step in bad else g}, state, params)
        found.append(int(optax.tree.get(state, "age")))
    return found


@pytest.mark.parametrize("scale", [2.0**-80, 2.0**66], ids=["tiny", "huge"])
@pytest.mark.parametrize(("every", "measure"), [(1, "norm"), (2, "norm"), (2, "share")])
def test_renewals_do_not_depend_on_the_size_of_gradients(every, measure, scale):
    """Squares of 1e-24 are zero, those of 1e20 infinite."""
    rng = np.random.default_rng(1)
    # Ten of them share a subspace, which the next ten do not.
    sides = np.repeat(rng.standard_normal((4, 16, 2)), 10, axis=0)
    grads = sides @ rng.standard_normal((40, 2, 24)) / 16
    rule = lro.OnConvergence(0.8, max_interval=40, min_interval=3, measure=measure)
    tx = converging(rule)
    tx = lro.accumulate_gradients(tx, every) if every > 1 else tx
    grads = list(jnp.asarray(grads, jnp.float32))
    want = ages(tx, grads)
    assert ages(tx, [scale * g for g in grads]) == want
    assert max(want) < 40 and want.count(1) >= 2


def test_steps_count_whatever_the_gradients_are():
    rng = np.random.default_rng(1)
    grads = list(jnp.asarray(rng.standard_normal((12, 16, 24)), jnp.float32))
    tx = converging(lro.OnConvergence(0.0, max_interval=5, min_interval=3))
    want = ages(tx, grads)
    assert ages(tx, grads, bad=(3, 4, 5, 7)) == want and max(want) == 5
    # Of gradients of zero, none has become small.
    for measure, renewals in {"norm": 2, "share": 1}.items():
        tx = converging(lro.OnConvergence(0.5, 50, 1, measure))
        found = ages(tx, [grads[0], *[0 * g for g in grads]])
        assert found.count(1) == renewals


# The trajectory

STEPS, MAX_RANK, ALLOWED, LONGEST, SHORTEST = 50, 5, 0.1, 14, 4


def gradients(shape, turn):
    """A signal that fades and turns, by so many steps, and a little noise."""
    rng = np.random.default_rng(1)
    grads = []
    for t in range(STEPS):
        values = (0.8 - 0.012 * t) ** np.arange(6)
        signal = np.cos(t / turn) * spectrum(*shape, values, 1)
        signal += np.sin(t / turn) * spectrum(*shape, values, 3)
        noise = 0.01 * rng.standard_normal(shape)
        grads.append((signal + noise) * 1.03 ** -abs(t - 20))  # grows, then fades
    return [jnp.asarray(g, jnp.float32) for g in grads]


def adarankgrad_adam(grads, bases, scale, measure, b1=0.9, b2=0.999, eps=1e-8):
    """Algorithm 3 on one matrix with its basis on the left, as AR-1 to AR-12 have it.

    Args:
      bases: the basis that each step would be given if it refreshes.
    """
    q = m = v = age = None
    average = level = 0.0
    directions, refreshed, shares = [], [], []
    for step, g in enumerate(map(reference.wide, grads)):
        if q is None or age >= LONGEST or (age >= SHORTEST and average <= level):
            old, q = q, reference.wide(bases[step])
            r = ranks(q)
            assert residual_energy(g, q) <= ALLOWED or r == MAX_RANK
            assert r == 1 or residual_energy(g, q[:, : r - 1]) > ALLOWED
            if old is None:
                m = v = np.zeros_like(q.T @ g)
            else:
                m, v = reference.rotate(m, v, q.T @ old)
            average = np.linalg.norm(g)
            level = np.sqrt(1 - ALLOWED) * average
            age = 0
            refreshed.append(step)
            shares = []
        else:
            size, whole, chance = (
                *map(np.linalg.norm, (q.T @ g, g)),
                ranks(q) / len(q),
            )
            average = 0.9 * average + 0.1 * size
            if measure == "share":
                average, level = share_average(shares, size, whole, SHORTEST, chance)
                level *= 0.5
        age += 1
        x = q.T @ g
        m = b1 * m + (1 - b1) * x
        v = b2 * v + (1 - b2) * x**2
        t = step + 1
        n = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        directions.append(scale * q @ n)
    return directions, refreshed


@pytest.mark.parametrize(("shape", "measure"), [((9, 6), "norm"), ((6, 9), "share")])
def test_adarankgrad_adam_follows_the_formulas(shape, measure):
    # An epsilon that hides what float32 leaves of moments that should be zero.
    inner = optax.scale_by_adam(eps=1e-4)
    tx = lro.adaptive_rank(
        inner,
        max_rank=MAX_RANK,
        max_residual_energy=ALLOWED,
        max_interval=LONGEST,
        min_interval=SHORTEST,
        measure=measure,
        scale=0.5,
    )
    grads = gradients(shape, {"norm": 40, "share": 8}[measure])
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    updates, bases, changed = [], [], []
    for step, g in enumerate(grads):
        u, new = update(g, state)
        updates.append(u)
        bases.append(np.asarray(new.basis))
        changed += [step] if np.any(new.basis != state.basis) else []
        state = new
        assert np.all(np.asarray(state.inner_state.nu) >= 0)
        assert bases[-1].shape == (9, MAX_RANK)
    turned = shape[0] < shape[1]
    expected, refreshed = adarankgrad_adam(
        [g.T for g in grads] if turned else grads, bases, 0.5, measure, eps=1e-4
    )
    assert changed == refreshed
    intervals = set(np.diff(refreshed))
    assert len(refreshed) >= 4 and len(intervals) > 1
    assert len({int(ranks(b)) for b in bases}) >= 3
    for u, want in zip(updates, expected, strict=True):
        assert relative_error(u, want.T if turned else want) < 1e-4


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(
            lro.adaptive_rank,
            max_rank=3,
            max_residual_energy=0.1,
            max_interval=9,
            min_interval=2,
        ),
        functools.partial(
            lro.project_gradients, rank=3, refresh=lro.WhenDrifted(1, 0.9)
        ),
    ],
    ids=["adaptive_rank", "WhenDrifted"],
)
def test_the_matrices_of_a_stack_decide_as_they_would_alone(make):
    """When to renew; each step also turns the moments of those that are due alone."""
    rng, shape = np.random.default_rng(4), (6, 9)
    turns, grads = (3.0, 8.0, 1e9), []
    for t in range(24):
        sides = [
            [spectrum(*shape, [1.0, 0.8, 0.5], s + 9 * i) for s in (0, 1)]
            for i in range(3)
        ]
        pairs = zip(turns, sides, strict=True)
        signal = [np.cos(t / k) * a + np.sin(t / k) * b for k, (a, b) in pairs]
        grads.append(np.stack(signal) + 0.01 * rng.standard_normal((3, *shape)))
    tx = make(optax.scale_by_adam(eps=1e-3), matrices=lro.MatrixAxes())

    @jax.jit
    def update(place, g, state):
        with one_layer(place, 3):  # the keys of its place in the stack
            return tx.update({"w": g}, state)

    state = tx.init({"w": jnp.zeros((3, *shape))})
    own, whole = [tx.init({"w": jnp.zeros((1, *shape))})] * 3, jax.jit(tx.update)
    renewed = np.zeros(3)
    for g in np.float32(grads):
        old, (u, state) = state, whole({"w": g}, state)
        renewed += np.any(np.asarray(state.basis["w"] != old.basis["w"]), axis=(1, 2))
        for i in range(3):
            part, own[i] = update(i, g[i : i + 1], own[i])
            assert relative_error(u["w"][i], part["w"][0]) < 1e-4
            of_stack = jax.tree.map(lambda x, i=i: x[i], state.refresh["w"])
            assert_close(of_stack, jax.tree.map(lambda x: x[0], own[i].refresh["w"]))
    assert len(set(renewed)) > 1


def test_at_a_fixed_rank_and_interval_it_is_galore_with_rotation():
    params = random_like({"w": (6, 9), "v": (9, 6), "b": (9,)}, 0)
    grads = random_grads(params, 12)
    tx = lro.adaptive_rank(ADAM, max_rank=3, min_rank=3, max_interval=5, scale=0.5)
    galore = lro.galore_project(
        ADAM, rank=3, update_every=5, transfer=lro.Rotate(), side="long", scale=0.5
    )
    got, _ = run(tx, params, grads)
    want, _ = run(galore, params, grads)
    for u, v in zip(got, want, strict=True):
        assert_close(u, v)


@functools.cache
def renewed_every_other_step():
    tx = lro.adaptive_rank(ADAM, max_rank=3, max_interval=2)
    return tx._replace(update=jax.jit(tx.update))


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_an_unusable_gradient_leaves_a_usable_state(value):
    grads = random_grads({"w": jnp.ones((6, 9))}, 4)
    tx = renewed_every_other_step()
    bad = {"w": jnp.full((6, 9), value)}
    for when in (0, 2):  # both are refreshes
        _, state = run(tx, grads[0], [*grads[:when], bad, *grads[when:]])
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
        assert ranks(np.asarray(state.basis["w"])) >= 1
        updates, _ = run(tx, grads[0], grads[:1], state)
        assert np.linalg.norm(updates[0]["w"]) > 0.1


# Sizes (M-7) and measures


@pytest.mark.parametrize(
    "make",
    [
        lambda r, **kw: lro.adaptive_rank(ADAM, max_rank=r, **kw),
        lambda r, **kw: lro.adarankgrad_adamw(0.1, r, **kw),
    ],
    ids=["method", "optimizer"],
)
def test_state_size(make):
    stack = (3, 40, 24)
    params = {"w": jax.ShapeDtypeStruct(stack, jnp.float32)}
    counters, scalars = 2, 3  # of the engine and of Adam; of the refresh, a matrix
    for r in (4, 11):
        for side, numbers in {
            "long": 40 * r + 2 * 24 * r,
            "short": 24 * r + 2 * 40 * r,
        }.items():
            tx = make(r, side=side, matrices=lro.MatrixAxes())
            expected = 3 * (numbers + scalars) + counters
            assert lro.state_bytes(tx, params) == 4 * expected


def test_metrics_of_the_state_within_jit():
    low, high = spectrum(12, 8, 0.2 ** np.arange(8)), spectrum(6, 10, np.ones(6))
    params = {
        "low": jnp.asarray(low, jnp.float32),
        "stack": jnp.asarray(np.stack([high, 0.1 * np.outer(high[:, 0], high[0])])),
        "bias": jnp.ones(3),
    }
    params["stack"] = params["stack"].astype(jnp.float32)
    tx = lro.adarankgrad_adamw(0.1, 4, matrices=lro.MatrixAxes())

    @jax.jit
    def step(grads, state):
        _, state = tx.update(grads, state, params)
        return lro.diagnostics.state_metrics(state), state

    state = tx.init(params)
    metrics, state = step(params, state)
    want = {
        "rank/low": 1,
        "rank/stack": (4 + 1) / 2,  # 48% of six equal values need four of them
        "rank": (20 * 1 + 16 * (4 + 1)) / (20 + 2 * 16),
        "memory_reduction": 20 * 3 + 16 * 3,
    }
    assert metrics.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6)


def test_metrics_of_states_without_a_basis_to_see():
    params = {"w": jnp.ones((128, 256)), "b": jnp.ones(3)}
    for tx in (
        optax.adam(0.1),
        lro.apollo_scale(ADAM, rank=4),
        lro.compress_state(
            lro.galore_project(ADAM, rank=64), {"basis": lro.BlockInt8(signed=True)}
        ),
    ):
        assert lro.diagnostics.state_metrics(tx.init(params)) == {}
    without_moments = lro.galore_project(optax.identity(), rank=2).init(params)
    metrics = lro.diagnostics.state_metrics(without_moments)
    assert set(metrics) == {"rank/w", "rank", "memory_reduction"}


def test_adarankgrad_adamw_is_its_parts():
    params = random_like({"w": (6, 9), "b": (9,), "frozen": (6, 9)}, 0)
    grads = random_grads(params, 6)
    tx = lro.adarankgrad_adamw(
        0.1,
        3,
        scale=0.5,
        b1=0.8,
        b2=0.9,
        eps=1e-3,
        weight_decay=0.5,
        mask={"w": True, "b": True, "frozen": False},
        min_rank=2,
        max_residual_energy=0.6,
        max_interval=4,
        min_interval=2,
        transfer=lro.Reset(),
        recovery=lro.FiraResidual(),
        side="short",
        key=3,
    )
    updates, _ = run(tx, params, grads)
    method = lro.adaptive_rank(
        optax.scale_by_adam(b1=0.8, b2=0.9, eps=1e-3),
        max_rank=3,
        min_rank=2,
        max_residual_energy=0.6,
        max_interval=4,
        min_interval=2,
        transfer=lro.Reset(),
        recovery=lro.FiraResidual(),
        scale=0.5,
        side="short",
        key=3,
    )
    directions, _ = run(method, params, grads)
    for u, d in zip(updates, directions, strict=True):
        expected = {
            "w": -0.1 * (d["w"] + 0.5 * params["w"]),
            "b": -0.1 * (d["b"] + 0.5 * params["b"]),
            "frozen": -0.1 * d["frozen"],
        }
        assert_close(u, expected)
