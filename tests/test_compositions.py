"""Parts together: what combines does what it says, what makes no sense is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from running import norm, random_grads, random_like, relative_error, run

import lowrank_optax as lro
from lowrank_optax._src.engines import coded

ADAM, MOMENTUM = optax.scale_by_adam(), optax.trace(0.9)
GAUSSIAN, ORTHONORMAL = lro.RandomGaussian(), lro.RandomOrthonormal()
LATE = lro.Switch(4, lro.TopSingular(), GAUSSIAN)
INT8, UINT8 = lro.BlockInt8(signed=True), lro.BlockInt8(signed=False)


def project(inner=ADAM, rank=2, **parts):
    return lro.project_gradients(inner, rank=rank, **parts)


# Refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: project(subspace=GAUSSIAN, recovery=lro.FiraResidual()),
            "FiraResidual with RandomGaussian: FiraResidual requires a basis with "
            "orthonormal columns, RandomGaussian does not provide it",
        ),
        (
            lambda: project(subspace=GAUSSIAN, recovery=lro.SparseResidual()),
            "SparseResidual with RandomGaussian: .* orthonormal",
        ),
        (
            lambda: project(subspace=LATE, recovery=lro.FiraResidual()),
            "FiraResidual with Switch: .* orthonormal",
        ),
        (
            lambda: project(subspace=GAUSSIAN, refresh=lro.WhenDrifted(3)),
            "WhenDrifted with RandomGaussian: .* orthonormal",
        ),
        (
            lambda: project(subspace=ORTHONORMAL, refresh=lro.WhenDrifted(3)),
            "WhenDrifted with RandomOrthonormal: .* chosen by the gradient",
        ),
        (
            lambda: project(subspace=ORTHONORMAL, refresh=lro.OnConvergence(0.5)),
            "OnConvergence with RandomOrthonormal: .* chosen by the gradient",
        ),
        (
            lambda: lro.CrossHead(2, ORTHONORMAL),
            "CrossHead with RandomOrthonormal: .* chosen by the gradient",
        ),
        (
            lambda: project(subspace=lro.CrossHead(2)),
            "CrossHead with side='short': .* requires side='left' or 'right'",
        ),
        (
            lambda: project(subspace=lro.Hybrid(3)),
            "Hybrid with rank 2: Hybrid requires a rank of at least 3",
        ),
        (
            lambda: project(subspace=lro.Switch(4, lro.EnergyRank(3), ORTHONORMAL)),
            "EnergyRank with rank 2: .* at least 3",
        ),
        (
            lambda: project(subspace=lro.ImportanceSampled(pool=1)),
            "ImportanceSampled with rank 2: .* at most 1",
        ),
    ],
)
def test_refused_when_it_is_made(make, message):
    with pytest.raises(ValueError, match="Cannot use " + message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: lro.compress_state(ADAM, {"nu": lro.LowRank(2)}),
            "LowRank with the state field 'nu': it requires numbers that are never "
            "negative, LowRank does not provide it",
        ),
        (
            lambda: lro.compress_state(ADAM, {"mu": lro.LowRank(2, nonnegative=True)}),
            "LowRank with the state field 'mu': .* both signs",
        ),
        (
            lambda: lro.compress_state(optax.chain(ADAM), {"0/mu": UINT8}),
            "BlockInt8 with the state field '0/mu': .* both signs",
        ),
        (
            lambda: lro.compress_state(ADAM, {"nu": lro.PackedInt4()}),
            "PackedInt4 with the state field 'nu': .* small numbers beside large ones",
        ),
        *(
            (
                lambda cast=lro.Cast(dtype): lro.compress_state(ADAM, {"nu": cast}),
                "Cast with the state field 'nu': .* small numbers beside large ones",
            )
            for dtype in ("float16", jnp.float8_e4m3fn, jnp.float8_e5m2)
        ),
        (
            lambda: lro.compress_state(project(), {"basis": lro.LowRank(2)}),
            "LowRank with the state field 'basis': .* independent",
        ),
        (
            lambda: lro.compress_state(optax.scale_by_adan(), {"v": UINT8}),
            "BlockInt8 with the state field 'v': .* both signs",
        ),
        (
            lambda: lro.compress_state(optax.scale_by_adan(), {"n": lro.LowRank(2)}),
            "LowRank with the state field 'n': .* never negative",
        ),
    ],
)
def test_codecs_refused_by_what_the_fields_are(make, message):
    params = {"w": jnp.ones((16, 24))}
    with pytest.raises(ValueError, match="Cannot use " + message):
        make().init(params)


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (
            lro.flora_project(MOMENTUM, rank=2, transfer=lro.Keep()),
            "Keep with RandomGaussian: Keep requires basis vectors with the signs",
        ),
        (
            project(subspace=GAUSSIAN, transfer=lro.Rotate()),
            "Rotate with RandomGaussian: .* orthonormal",
        ),
        (
            project(subspace=lambda view: GAUSSIAN, recovery=lro.FiraResidual()),
            "FiraResidual with RandomGaussian: .* orthonormal",
        ),
        (
            project(subspace=lro.CrossHead(2), side=lambda path: "long"),
            "CrossHead with side='long'",
        ),
        (
            project(optax.scale_by_rms(), recovery=lro.SparseResidual()),
            "SparseResidual .* requires a first moment, .* fields nu",
        ),
        (
            lro.galore_project(
                lro.mlorc_compress(ADAM, rank=2), rank=4, transfer=lro.Rotate()
            ),
            r"Rotate around compressed state: .* requires moments as matrices, and "
            r"'inner_state/mu.left' does not provide one",
        ),
        (
            lro.mlorc_compress(optax.scale_by_factored_rms()),
            "LowRank with the fields v_row, v_col, v: LowRank requires moments with "
            "rows and columns",
        ),
    ],
)
def test_refused_once_the_parameters_are_known(tx, message):
    params = {"w": jax.ShapeDtypeStruct((128, 130), jnp.float32)}
    with pytest.raises(ValueError, match="Cannot use " + message):
        jax.eval_shape(tx.init, params)
    # Where nothing is a matrix, nothing is combined.
    jax.eval_shape(tx.init, {"b": jnp.ones(3)})


def test_second_moments_of_another_form_do_not_rotate():
    mini = lro.scale_by_adam_mini(matrices=lro.MatrixAxes(rows=-1, cols=-2))
    params = {"w": jnp.ones((6, 8))}
    message = r"Rotate with the state field 'nu' of shape \(1, 2\): .* basis vectors"
    with pytest.raises(ValueError, match="Cannot use " + message):
        project(mini, transfer=lro.Rotate()).init(params)
    project(mini, transfer=lro.Reset()).init(params)


class Given:
    """A subspace of one's own that says nothing about itself."""

    def select(self, key, grad, old, step):
        return jnp.eye(old.shape[-2], old.shape[-1])


@pytest.mark.parametrize(
    "tx",
    [
        lro.apollo_scale(ADAM, rank=2),  # only norms of the direction count
        project(subspace=GAUSSIAN, transfer=lro.Reset()),
        project(optax.identity(), subspace=GAUSSIAN),  # no moments to keep
        project(
            subspace=lro.Switch(4, lro.TopSingular(), ORTHONORMAL),
            refresh=lro.WhenDrifted(3),
            recovery=lro.FiraResidual(),
        ),
        project(
            subspace=Given(),
            refresh=lro.WhenDrifted(3),
            transfer=lro.Rotate(),
            recovery=lro.SparseResidual(),
        ),
        project(subspace=lro.CrossHead(2, lro.ImportanceSampled(2)), side="right"),
        project(lro.scale_by_adam_mini(), transfer=lro.Rotate()),  # a block a column
        project(lro.quantize_state(ADAM), rank=32),
        lro.compress_state(optax.scale_by_adan(), {"v": INT8}),
        lro.compress_state(ADAM, {"mu": INT8, "nu": INT8}),  # coarser, but it has 0
        lro.compress_state(ADAM, {"mu": lro.Cast(jnp.float16)}),
        lro.compress_state(ADAM, {"nu": lro.Cast(jnp.bfloat16)}),
        lro.mlorc_compress(optax.chain(optax.scale_by_factored_rms(), MOMENTUM)),
        lro.mlorc_compress(optax.masked(MOMENTUM, {"w": False, "b": True})),
    ],
)
def test_not_refused(tx):
    params = {"w": jnp.ones((128, 130)), "b": jnp.ones(130)}
    jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)


def test_a_lazy_refresh_compares_the_ranks_in_use():
    # A steady gradient of rank 1 is a steady subspace, though three columns are zero.
    grads = {"w": jnp.outer(jnp.arange(1.0, 7), jnp.arange(1.0, 6))}
    parts = {"subspace": lro.EnergyRank(), "refresh": lro.WhenDrifted(1, 0.9)}
    tx = project(rank=4, matrices=lro.MatrixAxes(), **parts)
    state, update = tx.init(grads), jax.jit(tx.update)
    for _ in range(6):
        _, state = update(grads, state)
    assert np.sum(np.any(state.basis["w"] != 0, axis=0)) == 1
    assert state.refresh["w"].stretch == 2
    # What chooses no basis does not show a steady one.
    for nothing in (0.0, jnp.nan):
        spoiled, before = jax.tree.map(lambda g, x=nothing: x * g, grads), state
        for _ in range(20):
            _, state = update(spoiled, state)
        assert state.refresh["w"].stretch == 2
        np.testing.assert_array_equal(state.basis["w"], before.basis["w"])


# What combines


def i3s(inner=ADAM, rank=2, **parts):
    return lro.i3s_subspace(inner, rank=rank, update_every=3, **parts)


def adaptive(inner=ADAM, rank=2, **parts):
    return lro.adaptive_rank(inner, max_rank=rank, max_interval=3, **parts)


def follow(grads, bases, transfer, kind, b1=0.9, b2=0.999, eps=1e-8):
    """Adam in given bases, one a step; what becomes of the rest of the gradient."""
    m = v = old = None
    directions = []
    for t, (g, p) in enumerate(zip(map(reference.wide, grads), bases, strict=True), 1):
        r = p.mT @ g
        if old is None:
            m = v = np.zeros_like(r)
        elif transfer == "rotate" and not np.array_equal(p, old):
            m, v = reference.rotate(m, v, p.mT @ old)
        old = p
        m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r**2
        n = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        phi = np.linalg.norm(n, axis=0) / (np.linalg.norm(r, axis=0) + 1e-8)
        rest = {"drop": 0.0, "fira": (g - p @ r) * phi}
        directions.append(g * phi if kind == "scale" else p @ n + rest[kind])
    return directions


FIRA = lro.FiraResidual(limiter=None)
FOLLOWED = {
    "I3S + Fira": (i3s(recovery=FIRA), "keep", "fira"),
    "I3S + Rotate on convergence": (
        project(
            subspace=lro.ImportanceSampled(),
            refresh=lro.OnConvergence(0.9, max_interval=4, min_interval=2),
            transfer=lro.Rotate(),
        ),
        "rotate",
        "drop",
    ),
    "GoLore + Fira": (
        project(
            subspace=lro.Switch(4, lro.TopSingular(), ORTHONORMAL),
            refresh=lro.Every(3),
            transfer=lro.Rotate(),
            recovery=FIRA,
        ),
        "rotate",
        "fira",
    ),
    "AdaRankGrad + Fira": (adaptive(rank=5, recovery=FIRA), "rotate", "fira"),
    "GaLore+ + adaptive rank": (
        lro.galore_plus_project(
            ADAM,
            rank=5,
            num_heads=2,
            density=0,
            update_every=3,
            subspace=lro.EnergyRank(),
            transfer=lro.Rotate(),
        ),
        "rotate",
        "drop",
    ),
    "APOLLO + I3S": (
        lro.apollo_scale(
            ADAM,
            rank=2,
            update_every=3,
            limiter=None,
            subspace=lro.ImportanceSampled(),
        ),
        "keep",
        "scale",
    ),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_compositions_follow_their_formulas(name):
    tx, transfer, kind = FOLLOWED[name]
    grads = random_grads({"query": jnp.ones((6, 16))}, 10)
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    updates, bases = [], []
    for g in grads:
        u, state = update(g, state)
        updates.append(u["query"])
        bases.append(reference.wide(state.basis["query"]))
    changed = sum(
        not np.array_equal(x, y) for x, y in zip(bases[1:], bases[:-1], strict=True)
    )
    assert changed >= 2
    left = bases[0].shape[0] == 6  # or the longer side, the columns
    expected = follow(
        [g["query"] if left else g["query"].T for g in grads], bases, transfer, kind
    )
    expected = [x if left else x.T for x in expected]
    assert relative_error(updates, expected) < 1e-4


def test_adaptive_ranks_across_heads_are_those_of_one_head():
    energy_rank = lro.EnergyRank(max_residual_energy=0.2)
    tx = lro.galore_plus_project(ADAM, rank=4, num_heads=2, subspace=energy_rank)
    g = random_like({"query": (6, 8)}, 3)
    basis = reference.wide(tx.update(g, tx.init(g))[1].basis["query"])

    def fewest(x):
        energy = np.linalg.svd(x)[1] ** 2
        return 1 + np.sum(np.cumsum(energy) < 0.8 * energy.sum())

    whole = reference.wide(g["query"])
    heads = {fewest(head) for head in np.split(whole, 2, axis=1)}
    assert fewest(whole) not in heads
    assert np.sum(np.any(basis != 0, axis=0)) in heads


def in_bytes(*sizes):
    """Of moments of so many numbers, with a scale for 256 each."""
    return sum(n + 4 * -(-n // 256) for n in sizes)


S, L, R = 256, 512, 32
FACTORED = lro.scale_by_adafactor()
# Each by rank, and the bytes of a matrix of S rows and L columns at rank R.
STORED = {
    "I3S + Adafactor": (lambda r: i3s(FACTORED, r), 4 * (S * R + L + R)),
    "I3S + Adam-mini": (
        lambda r: i3s(lro.scale_by_adam_mini(), r),
        4 * (S * R + L * R + L),
    ),
    "I3S + 8-bit Lion": (
        lambda r: lro.quantize_state(i3s(optax.scale_by_lion(), r)),
        4 * S * R + in_bytes(L * R),
    ),
    "Fira + 8-bit Adam": (
        lambda r: lro.quantize_state(lro.fira_project(ADAM, rank=r, update_every=3)),
        4 * (S * R + 1) + in_bytes(L * R, L * R),
    ),
    "AdaRankGrad + Adafactor": (
        lambda r: adaptive(FACTORED, r),
        4 * (L * R + S + R + 3),
    ),
    "AdaRankGrad + 8-bit Adam": (
        lambda r: lro.quantize_state(adaptive(ADAM, r)),
        4 * (L * R + 3) + in_bytes(S * R, S * R),
    ),
    "Q-GaLore + I3S": (
        lambda r: lro.q_galore_project(
            ADAM, rank=r, update_every=3, subspace=lro.ImportanceSampled()
        ),
        S * R / 2 + 4 * R + 4 * (2 * L * R + 7),
    ),
    "Q-GaLore + Fira": (
        lambda r: lro.compress_state(
            lro.fira_project(ADAM, rank=r, update_every=3), {"basis": lro.PackedInt4()}
        ),
        S * R / 2 + 4 * R + 4 * (2 * L * R + 1),
    ),
    "APOLLO + 8-bit Adam": (
        lambda r: lro.quantize_state(
            lro.apollo_scale(ADAM, rank=r, update_every=3, limiter=None)
        ),
        in_bytes(L * R, L * R),
    ),
    "MLorc + 8-bit factors": (
        lambda r: lro.compress_state(
            lro.mlorc_scale_by_lion(r), {"mu.left": INT8, "mu.right": INT8}
        ),
        in_bytes(S * R, L * R),
    ),
    "LDAdam + 8-bit error": (
        lambda r: lro.compress_state(lro.scale_by_ldadam(r), {"error": INT8}),
        4 * (S * R + 2 * L * R) + in_bytes(S * L),
    ),
    "GaLore + MLorc": (
        lambda r: lro.mlorc_compress(lro.galore_project(ADAM, rank=r), rank=4),
        4 * (S * R + 2 * 4 * (R + L)),
    ),
}


@pytest.mark.parametrize("name", STORED)
def test_the_state_is_the_sum_of_its_parts(name):
    make, expected = STORED[name]
    row = lro.describe(make(R), {"w": jax.ShapeDtypeStruct((S, L), jnp.float32)})[0]
    assert row.state_bytes == expected


@pytest.mark.parametrize("name", [*FOLLOWED, *STORED])
def test_compositions_learn_and_outlast_bad_gradients(name, monkeypatch):
    # So that small matrices are stored in bytes as large ones are.
    monkeypatch.setattr(coded, "ELEMENTWISE_MIN_SIZE", 8)
    tx = STORED[name][0](3) if name in STORED else FOLLOWED[name][0]
    start = params = random_like({"query": (6, 16), "bias": (3,)}, 0)
    state, update = tx.init(params), jax.jit(tx.update)

    def descend(params, state):
        for _ in range(100):
            updates, state = update(params, state, params)
            params = jax.tree.map(lambda p, u: p - 0.02 * u, params, updates)
        return params, state

    learned, _ = descend(params, state)
    for leaf in start:
        assert norm(learned[leaf]) < 0.7 * norm(start[leaf])
    for bad in (0.0, jnp.nan):
        spoiled = params | {"query": params["query"] * bad}
        for before in (tx.init(params), state):
            _, after = update(spoiled, before, params)
            assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after))
            learned, after = descend(params, after)
            assert norm(learned["query"]) < 0.8 * norm(start["query"])
        _, state = update(params, state, params)


@pytest.mark.parametrize("name", ["AdaRankGrad + 8-bit Adam", "APOLLO + 8-bit Adam"])
def test_shrinking_takes_what_there_is(name):
    params = {"w": jnp.outer(jnp.arange(1.0, 7), jnp.arange(1.0, 9))}
    tx = STORED[name][0](3)
    _, state = run(tx, params, [params])
    new, small = lro.rank.shrink(tx, state, params, multiple_of=1)
    bases = {"AdaRankGrad + 8-bit Adam": 1}  # a drawn projection has no unused rank
    moments = optax.tree.get(small, "mu")["w"]
    assert moments.shape[0] == bases.get(name, 3)
    updates, _ = run(new, params, [params], small)
    expected, _ = run(tx, params, [params], state)
    assert relative_error(updates[0]["w"], expected[0]["w"]) < 1e-5
