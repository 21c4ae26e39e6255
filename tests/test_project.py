"""The gradient-space engine: how it sees leaves, and what it gives to each part."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from running import assert_close, random_grads, random_like, run

import lowrank_optax as lro
from lowrank_optax._src.leaves.transformation import transformation

EXACT = lro.TopSingular("svd")
ADAM = optax.scale_by_adam()
SGD = optax.identity()
PERIOD = 3


def project(inner=ADAM, **changes):
    parts = {"rank": 2, "subspace": EXACT, "refresh": lro.Every(PERIOD)}
    return lro.project_gradients(inner, **parts | changes)


def on_one_leaf(tx, grads):
    """Its update of a leaf named w at each step; weights are zero."""
    params = {"w": jnp.zeros_like(grads[0])}
    return [u["w"] for u in run(tx, params, [{"w": g} for g in grads])[0]]


def gradients(shape, steps=7, seed=0):
    return list(random_like({"g": (steps, *shape)}, seed)["g"])


# One matrix, seen in different ways


@pytest.mark.parametrize("side", ["short", "long", "left", "right"])
@pytest.mark.parametrize("batch", [(3,), (2, 2)], ids=str)
def test_a_stacked_leaf_is_the_loop_over_its_slices(batch, side):
    grads = gradients((*batch, 5, 8))
    stacked = on_one_leaf(project(side=side, matrices=lro.MatrixAxes()), grads)
    tx = project(side=side)
    for index in np.ndindex(*batch):
        alone = on_one_leaf(tx, [g[index] for g in grads])
        assert_close([u[index] for u in stacked], alone, atol=1e-5)


def test_a_layer_axis_in_the_middle_is_a_loop_too():
    embed, layers, heads, width = 5, 2, 2, 4
    grads = gradients((embed, layers, heads, width))
    axes = lro.MatrixAxes(rows=0, cols=(2, 3))
    stacked = on_one_leaf(project(matrices=axes), grads)
    tx = project()
    for i in range(layers):
        alone = on_one_leaf(tx, [g[:, i].reshape(embed, -1) for g in grads])
        assert_close([u[:, i].reshape(embed, -1) for u in stacked], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "axes", "flat"),
    [
        ((5, 2, 4), lro.MatrixAxes(rows=0, cols=(1, 2)), (5, 8)),
        ((2, 4, 5), lro.MatrixAxes(rows=(0, 1), cols=2), (8, 5)),
    ],
    ids=["into heads", "out of heads"],
)
def test_a_kernel_with_heads_is_its_reshaped_matrix(shape, axes, flat):
    grads = gradients(shape)
    updates = on_one_leaf(project(matrices=axes), grads)
    expected = on_one_leaf(project(), [g.reshape(flat) for g in grads])
    assert_close([u.reshape(flat) for u in updates], expected)


OPPOSITE = {"short": "short", "long": "long", "left": "right", "right": "left"}


@pytest.mark.parametrize("side", OPPOSITE)
def test_the_transposed_leaf_gets_the_transposed_update(side):
    grads = gradients((5, 8))
    updates = on_one_leaf(project(side=side), grads)
    mirrored = on_one_leaf(project(side=OPPOSITE[side]), [g.T for g in grads])
    assert_close([u.T for u in mirrored], updates)


@pytest.mark.parametrize(
    ("side", "basis", "moments"),
    [
        ("short", {"tall": 5, "wide": 5}, {"tall": 8, "wide": 8}),
        ("long", {"tall": 8, "wide": 8}, {"tall": 5, "wide": 5}),
        ("left", {"tall": 8, "wide": 5}, {"tall": 5, "wide": 8}),
        ("right", {"tall": 5, "wide": 8}, {"tall": 8, "wide": 5}),
    ],
)
def test_sides_decide_the_shapes_of_the_state(side, basis, moments):
    params = random_like({"tall": (8, 5), "wide": (5, 8)}, 0)
    state = jax.eval_shape(project(side=side).init, params)
    assert {k: x.shape for k, x in state.basis.items()} == {
        k: (size, 2) for k, size in basis.items()
    }
    for field in (state.inner_state.mu, state.inner_state.nu):
        assert {k: x.shape for k, x in field.items()} == {
            k: (2, size) for k, size in moments.items()
        }


@pytest.mark.parametrize(("side", "same"), [("short", "right"), ("long", "left")])
def test_which_side_of_a_square_matrix(side, same):
    grads = gradients((6, 6), steps=2)
    updates = {s: on_one_leaf(project(side=s), grads) for s in ("left", "right", side)}
    assert_close(updates[side], updates[same], rtol=0, atol=0)
    other = ({"left", "right"} - {same}).pop()
    assert not np.allclose(updates[side][1], updates[other][1], atol=0.1)


# What a subspace is


@pytest.mark.parametrize(
    "method", ["svd", "gram_eigh", "rsvd", "subspace_iteration", "warm"]
)
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)], ids=str)
def test_sgd_at_full_rank_is_sgd(method, shape):
    grads = gradients(shape, steps=5)
    subspace = lro.TopSingular(method)
    tx = project(SGD, rank=8, subspace=subspace, matrices=lro.MatrixAxes())
    assert_close(on_one_leaf(tx, grads), grads, atol=1e-5)


@pytest.mark.parametrize("side", ["short", "long", "left", "right"])
def test_at_a_refresh_all_sides_give_the_best_approximation(side):
    grads = gradients((5, 8), steps=3)
    tx = project(SGD, side=side, refresh=lro.Every(1))
    for u, g in zip(on_one_leaf(tx, grads), grads, strict=True):
        left, s, right = np.linalg.svd(np.asarray(g, np.float64))
        assert_close(u, (left[:, :2] * s[:2]) @ right[:2], atol=1e-5)


def test_between_refreshes_the_update_stays_in_the_subspace():
    grads = gradients((5, 8), steps=PERIOD + 1)
    updates = on_one_leaf(project(rank=2), grads)
    ranks = [np.linalg.matrix_rank(np.hstack(updates[:t]), 1e-5) for t in (1, 3, 4)]
    assert ranks == [2, 2, 4]


class Reports(NamedTuple):
    size: jax.Array
    whole: jax.Array
    chance: jax.Array
    overlap: jax.Array


@dataclasses.dataclass(frozen=True)
class Reporter:
    """Renews as `due_at` says, and keeps what the engine tells it."""

    due_at: tuple[int, ...]

    def init(self, view, phase):
        return Reports(*4 * [jnp.zeros(view.batch_shape)])

    def due(self, state, step):
        return jnp.any(step == jnp.array(self.due_at))

    def after(self, state, due, seen):
        shape = state.size.shape
        return Reports(*(jnp.broadcast_to(x, shape).astype(jnp.float32) for x in seen))


def test_what_a_refresh_is_told():
    grads = gradients((2, 5, 8), steps=4)
    tx = project(refresh=Reporter((2,)), matrices=lro.MatrixAxes())
    state = tx.init({"w": grads[0]})
    old = np.zeros((2, 5, 2))
    changed = []
    for g in grads:
        _, state = jax.jit(tx.update)({"w": g}, state)
        new = np.asarray(state.basis["w"], np.float64)
        report = state.refresh["w"]
        changed.append(not np.array_equal(new, old))
        g = np.asarray(g, np.float64)
        size, whole = (np.linalg.norm(x, axis=(-2, -1)) for x in (new.mT @ g, g))
        share = np.sum((new.mT @ old) ** 2, (-2, -1)) / 2 if changed[-1] else np.ones(2)
        expected = Reports(size, whole, np.full(2, 2 / 5), share)
        assert_close(report, expected, rtol=1e-5, atol=1e-6)
        old = new
    # The start is due whatever the rule says.
    assert changed == [True, False, True, False]


def test_staggered_leaves_are_renewed_one_at_a_time():
    params = random_like({name: (4, 6) for name in "abcd"}, 0)
    tx = project(refresh=lro.Staggered(4))
    state = tx.init(params)
    renewed = []
    for g in random_grads(params, 9):
        old, (_, state) = state, jax.jit(tx.update)(g, state)
        renewed.append(
            [k for k in params if not np.array_equal(state.basis[k], old.basis[k])]
        )
    assert renewed[0] == list("abcd")
    assert all(len(names) == 1 for names in renewed[1:])
    assert sorted(sum(renewed[1:5], [])) == list("abcd")
    assert renewed[1:5] == renewed[5:]


@dataclasses.dataclass(frozen=True)
class Witness:
    """No basis: shows the largest gradient, the old basis and the step."""

    def select(self, key, grad, old, step):
        numbers = jnp.stack([jnp.max(jnp.abs(grad)), jnp.sum(old), 1.0 * step])
        return jnp.broadcast_to(numbers, old.shape)


def test_what_a_subspace_is_given():
    grads = gradients((5, 8), steps=2)
    tx = project(SGD, rank=3, subspace=Witness(), refresh=lro.Every(1))
    state = tx.init({"w": grads[0]})
    total = 0.0
    for step, (g, size) in enumerate(zip(grads, (1e-20, 1e20), strict=True)):
        _, state = tx.update({"w": size * g}, state)
        largest = np.max(np.abs(size * np.asarray(g)))  # on its own scale
        np.testing.assert_allclose(  # signs are the engine's
            abs(state.basis["w"][0]), [largest, abs(total), step], rtol=1e-6
        )
        total = np.sum(state.basis["w"])


def test_a_first_basis_has_the_same_signs_however_it_is_found():
    u, v = (
        np.linalg.qr(x)[0] for x in random_like({0: (9, 4), 1: (14, 4)}, 0).values()
    )
    grads = {"w": jnp.asarray(u * [5.0, 3.0, 2.0, 1.0] @ v.T)}
    first, *others = (
        run(project(subspace=lro.TopSingular(method)), grads, [grads])[1].basis["w"]
        for method in ("svd", "gram_eigh", "rsvd", "subspace_iteration", "warm")
    )
    for basis in others:
        assert_close(basis, first, rtol=0, atol=1e-3)


@dataclasses.dataclass(frozen=True)
class OnlySelects:
    """A subspace of one's own, with nothing but what the law asks for."""

    def select(self, key, grad, old, step):
        return lro.TopSingular().select(key, grad, old, step)


# Scaled, with signs of the old basis that turn, a zero and a broken gradient.
SIZES = (1, 1e12, 0, 1e-9, 1, 1)


def of_sizes(shape):
    grads = [
        {"w": size * g, "stack": jnp.stack([g, 1e-3 * size * g[::-1]])}
        for size, g in zip(SIZES, gradients(shape, steps=6), strict=True)
    ]
    grads[4]["stack"] = grads[4]["stack"].at[0, 1, 2].set(jnp.nan)
    return grads


def test_a_subspace_of_ones_own_is_used_as_those_of_the_library():
    grads = of_sizes((5, 8))
    found = [
        run(
            project(subspace=subspace, refresh=lro.Every(1), matrices=lro.MatrixAxes()),
            grads[0],
            grads,
        )
        for subspace in (lro.TopSingular(), OnlySelects())
    ]
    (updates, state), (expected, expected_state) = found
    for new, old in zip(updates, expected, strict=True):
        assert_close(new, old, rtol=1e-4, atol=1e-5)
    assert_close(state.basis, expected_state.basis, rtol=1e-4, atol=1e-5)


def test_a_subspace_by_leaf_may_be_one_that_is_drawn_and_not_stored():
    grads = of_sizes((5, 8))
    drawn = lro.RandomGaussian()
    by_leaf = {"w": drawn, "stack": lro.TopSingular()}

    def found(subspace):
        tx = project(
            subspace=subspace,
            recovery=lro.ScaleGradient(limiter=None),
            matrices=lro.MatrixAxes(),
        )
        return run(tx, grads[0], grads)

    mixed, kept = found(lambda view: by_leaf[view.path])
    for name, subspace in by_leaf.items():
        updates, state = found(subspace)
        for new, old in zip(mixed, updates, strict=True):
            np.testing.assert_array_equal(new[name], old[name])
        np.testing.assert_array_equal(kept.basis[name], state.basis[name])
    assert kept.basis["w"].shape == () and kept.basis["stack"].shape[-1] == 2
    # At rank 4, moments of 5 x 8 are smaller than at full rank, and with a basis not.
    tx = project(
        rank=4, subspace=lambda view: drawn, recovery=lro.ScaleGradient(limiter=None)
    )
    assert jax.tree.leaves(tx.init({"w": grads[0]["w"]}).basis)


@pytest.mark.parametrize("subspace", [lro.TopSingular(), EXACT, lro.EnergyRank(1, 0.5)])
def test_at_a_refresh_the_gradient_is_projected_to_the_new_basis(subspace):
    grads = of_sizes((5, 8))
    tx = project(
        SGD, subspace=subspace, refresh=lro.Every(1), matrices=lro.MatrixAxes()
    )
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    for grad in grads:
        updates, state = update(grad, state)
        for name, g in grad.items():
            basis = np.asarray(state.basis[name], np.float64)
            g = np.asarray(g, np.float64)
            size = np.linalg.norm(g, axis=(-2, -1), keepdims=True)
            fine = np.isfinite(size) & (size > 0)
            size = np.where(fine, size, 1)
            error = np.where(fine, updates[name] - basis @ (basis.mT @ g), 0) / size
            np.testing.assert_allclose(error, 0, atol=1e-6)


@dataclasses.dataclass(frozen=True)
class Turned(lro.TopSingular):
    """Another basis of the same subspace: derived, with a `select` of its own."""

    def select(self, key, grad, old, step):
        return super().select(key, grad, old, step)[..., ::-1]


def test_a_derived_subspace_is_asked_for_its_own_basis():
    grads = [{"w": g} for g in gradients((5, 8), steps=1)]
    turned, whole = (
        run(project(subspace=subspace), grads[0], grads)
        for subspace in (Turned("svd"), EXACT)
    )
    basis = turned[1].basis["w"]
    expected = whole[1].basis["w"][..., ::-1]
    signs = jnp.sign(jnp.sum(basis * expected, axis=-2))  # which are the engine's
    assert_close(basis, signs * expected, rtol=1e-6, atol=1e-6)
    moment = turned[1].inner_state.mu["w"]
    assert_close(moment, 0.1 * basis.T @ grads[0]["w"], rtol=1e-5, atol=1e-6)


class Told(NamedTuple):
    size: jax.Array
    phase: jax.Array


@dataclasses.dataclass(frozen=True)
class OnceSmall:
    """Due at the step after one whose projected gradient was small."""

    below: float

    def init(self, view, phase):
        return Told(jnp.full([], jnp.inf), jnp.full([], phase, jnp.float32))

    def due(self, state, step):
        return state.size < self.below

    def after(self, state, due, seen):
        return state._replace(size=seen.size)


def test_a_rule_decides_by_what_it_was_told_at_the_step_before():
    sizes = (1.0, 1.0, 1e-3, 1.0, 1.0, 1e-3, 1e-3, 1.0)
    grads = gradients((5, 8), steps=len(sizes))
    tx = project(refresh=OnceSmall(0.5))
    state, renewed = tx.init({"w": grads[0]}), []
    for step, (size, g) in enumerate(zip(sizes, grads, strict=True)):
        old, (_, state) = state, jax.jit(tx.update)({"w": size * g}, state)
        if not np.array_equal(state.basis["w"], old.basis["w"]):
            renewed.append(step)
    assert renewed == [0, 3, 6, 7]


def test_the_phases_of_the_leaves_are_their_shares_of_the_cost():
    params = random_like({"a": (4, 6), "b": (8, 9), "c": (2, 4, 6), "d": (6,)}, 0)
    tx = project(refresh=OnceSmall(0.5), matrices=lro.MatrixAxes())
    phases = {k: v.phase for k, v in tx.init(params).refresh.items() if k != "d"}
    assert_close(phases, {"a": 12 / 144, "b": 60 / 144, "c": 120 / 144})


@dataclasses.dataclass(frozen=True)
class Random:
    """A Gaussian matrix: shows the key."""

    def select(self, key, grad, old, step):
        return jax.random.normal(key, old.shape)


def random_bases(key):
    params = random_like({"a": (4, 6), "b": (4, 6)}, 0)
    tx = project(SGD, subspace=Random(), refresh=lro.Every(1), key=key)
    state, bases = tx.init(params), []
    for _ in range(2):
        _, state = tx.update(params, state)
        bases += [np.abs(state.basis["a"]), np.abs(state.basis["b"])]
    return bases


def test_keys_differ_by_leaf_and_step_and_repeat_by_seed():
    bases = random_bases(7)
    for i, one in enumerate(bases):
        assert not any(np.allclose(one, other) for other in bases[:i])
    assert_close(random_bases(jax.random.key(7)), bases, rtol=0, atol=0)
    assert not np.allclose(random_bases(8)[0], bases[0])


def test_new_basis_vectors_have_the_sign_of_the_old_ones():
    tx = project(refresh=lro.Every(1))
    grads = gradients((5, 8), steps=8)
    state = tx.init({"w": grads[0]})
    update = jax.jit(tx.update)
    old = jnp.zeros((5, 2))
    for g in grads:
        _, state = update({"w": g}, state)
        assert np.all(np.sum(state.basis["w"] * old, axis=0) >= 0)
        old = state.basis["w"]


# Safety


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_the_first_usable_gradient_chooses_the_basis(bad):
    tx = project(refresh=lro.Every(100))
    good = gradients((5, 8), steps=1)[0]
    state = tx.init({"w": good})
    for _ in range(2):
        _, state = tx.update({"w": jnp.full((5, 8), bad)}, state)
        basis = state.basis["w"]
        gram = basis.T @ basis
        assert np.allclose(gram, np.eye(2), atol=1e-5) or np.all(basis == 0)
    _, state = tx.update({"w": good}, state)
    _, fresh = tx.update({"w": good}, tx.init({"w": good}))
    basis, expected = state.basis["w"], fresh.basis["w"]
    assert_close(basis @ basis.T, expected @ expected.T, atol=1e-5)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_slice_without_a_usable_gradient_keeps_its_basis(bad):
    grads = gradients((2, 5, 8), steps=2)
    tx = project(refresh=lro.Every(1), matrices=lro.MatrixAxes())
    _, old = tx.update({"w": grads[0]}, tx.init({"w": grads[0]}))
    grad = grads[1].at[0].set(bad)
    _, new = tx.update({"w": grad}, old)
    assert_close(new.basis["w"][0], old.basis["w"][0], rtol=0, atol=0)
    assert not np.allclose(new.basis["w"][1], old.basis["w"][1], atol=0.1)


# Transfers


class Scaled(NamedTuple):
    momenta: Any


def momentum(decay):
    """`optax.trace` under a name that nobody knows."""

    def update(updates, state, params=None):
        new = jax.tree.map(lambda g, m: g + decay * m, updates, state.momenta)
        return new, Scaled(new)

    return optax.GradientTransformation(
        lambda params: Scaled(jax.tree.map(jnp.zeros_like, params)), update
    )


def test_rotation_asks_what_an_unknown_moment_is():
    grads = gradients((5, 8), steps=2 * PERIOD)
    with pytest.raises(ValueError, match=r"'momenta' of shape \(2, 8\).*first=\.\.\."):
        on_one_leaf(project(momentum(0.9), transfer=lro.Rotate()), grads)
    named = lro.Rotate(first=("momenta",))
    updates = on_one_leaf(project(momentum(0.9), transfer=named), grads)
    known = on_one_leaf(project(optax.trace(0.9), transfer=lro.Rotate()), grads)
    assert_close(updates, known)


def test_rotation_keeps_a_momentum_that_both_subspaces_hold():
    # Gradients of one column space: what is rotated loses nothing.
    fixed = random_like({"a": (5, 2)}, 3)["a"]
    grads = [fixed @ x for x in gradients((2, 8))]
    updates = on_one_leaf(project(optax.trace(0.9), transfer=lro.Rotate()), grads)
    assert_close(updates, on_one_leaf(optax.trace(0.9), grads), rtol=1e-4, atol=1e-4)


def test_reset_starts_the_momentum_again():
    grads = gradients((5, 8), steps=PERIOD + 1)
    tx = project(optax.trace(0.9), transfer=lro.Reset())
    last = on_one_leaf(tx, grads)[-1]
    assert_close(last, on_one_leaf(tx, grads[-1:])[0], atol=1e-5)


# Recoveries


class Error(NamedTuple):
    value: jax.Array


@dataclasses.dataclass(frozen=True)
class Feedback:
    """Adds what the last projection left out; gives the rest of this one, unscaled."""

    def init(self, view):
        return Error(view.zeros("m", "n"))

    def prepare(self, grad, state):
        return grad + state.value

    def recover(self, grad, coeff, direction, basis, scale, state):
        rest = grad.matrix - basis @ coeff
        return scale * (basis @ direction) + 0.1 * rest, Error(rest)


def test_what_a_recovery_is_given():
    grads = gradients((5, 8), steps=5)
    tx = project(optax.scale(2.0), recovery=Feedback(), scale=3.0)
    state = tx.init({"w": grads[0]})
    error = np.zeros((5, 8))
    for g in grads:
        updates, state = jax.jit(tx.update)({"w": g}, state)
        basis = np.asarray(state.basis["w"], np.float64)
        whole = np.asarray(g) + error
        inside = basis @ basis.T @ whole
        error = whole - inside
        assert_close(updates["w"], 6 * inside + 0.1 * error, atol=1e-5)
        assert_close(state.recovery["w"].value, error, atol=1e-5)


def test_a_non_finite_gradient_does_not_stay_in_a_recovery():
    grads = gradients((5, 8), steps=2)
    tx = project(optax.trace(0.9), recovery=Feedback())
    _, old = tx.update({"w": grads[0]}, tx.init({"w": grads[0]}))
    _, new = tx.update({"w": grads[1].at[0, 0].set(jnp.nan)}, old)
    assert_close(new.recovery, old.recovery, rtol=0, atol=0)
    assert_close(new.inner_state, old.inner_state, rtol=0, atol=0)


# The inner optimizer


def test_the_inner_optimizer_sees_projected_parameters():
    params = random_like({"w": (5, 8), "b": (8,)}, 0)
    grads = random_like(params, 1)
    times = optax.stateless(lambda g, p: jax.tree.map(jnp.multiply, g, p))
    tx = project(times)  # what adds them, as weight decay, is refused
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    basis = state.basis["w"]
    expected = {
        "w": basis @ ((basis.T @ grads["w"]) * (basis.T @ params["w"])),
        "b": grads["b"] * params["b"],
    }
    assert_close(updates, expected, atol=1e-5)


def test_the_inner_optimizer_may_be_a_chain():
    grads = gradients((5, 8))
    inner = optax.chain(ADAM, optax.scale(-2.0))
    updates = on_one_leaf(project(inner, transfer=lro.Rotate()), grads)
    expected = on_one_leaf(project(ADAM, transfer=lro.Rotate()), grads)
    assert_close(updates, [-2 * u for u in expected])


# Errors


@pytest.mark.parametrize(
    ("rank", "error", "message"),
    [
        (0, ValueError, "`rank` must be at least 1, got 0"),
        (-3, ValueError, "`rank` must be at least 1, got -3"),
        (2.0, TypeError, "`rank` must be a Python int.*got 2.0 of type float"),
        (True, TypeError, "`rank` must be a Python int.*got True"),
        (np.bool_(True), TypeError, "`rank` must be a Python int.*of type bool"),
        (jnp.array(2), TypeError, "`rank` must be a Python int.*inject_hyperparams"),
        (np.int64(0), ValueError, "`rank` must be at least 1, got 0"),
    ],
)
def test_ranks_that_are_none(rank, error, message):
    with pytest.raises(error, match=message):
        project(rank=rank)


# Each by a number of its own, what is the least and the most, and what is outside.
RANGES = {
    "update_every": (lro.Every, (1, 10**9), (0, 0.5, math.nan)),
    "threshold": (lro.OnConvergence, (0, 1), (-0.1, 2, np.float32(1.5), math.nan)),
    "max_interval": (lambda x: lro.OnConvergence(max_interval=x), (1,), (0,)),
    "max_stretch": (lambda x: lro.WhenDrifted(200, max_stretch=x), (1, 64), (0, 0.5)),
    "weight_power": (lambda x: lro.ImportanceSampled(weight_power=x), (0, 9.0), (-1,)),
    "leading": (lro.Hybrid, (0, 2), (-1,)),
    "max_residual_energy": (lambda x: lro.EnergyRank(1, x), (0, 1), (-0.1, 1.1)),
    "min_rank": (lro.EnergyRank, (1, 3), (0,)),
    "limiter": (lro.FiraResidual, (1, 1.01, math.inf), (0.99, 0, math.nan)),
    "density": (lro.SparseResidual, (1e-9, 1), (0, 0.0, 1.1, -1)),
    "warmup": (lambda x: lro.SparseResidual(warmup=x), (1, 50), (0, 0.5)),
    "coverage": (lro.Rotate, (1e-9, 1), (0, 1.1)),
}


@pytest.mark.parametrize("name", RANGES)
def test_numbers_have_ranges(name):
    make, inside, outside = RANGES[name]
    for value in inside:
        make(value)
    for value in outside:
        with pytest.raises(ValueError, match=f"`{name}` must be .*, got "):
            make(value)


def test_a_number_of_vectors_is_whole():
    for value in (1.5, True):
        with pytest.raises(TypeError, match="`leading` must be a Python int"):
            lro.Hybrid(value)


def test_other_arguments_that_cannot_be():
    with pytest.raises(ValueError, match="Unknown side 'up'.*short, .*left, right"):
        project(side="up").init({"w": jnp.ones((5, 8))})
    for refresh in (lro.Every, lro.Staggered):
        for zero in (0, np.int32(0), np.array(0)):
            with pytest.raises(ValueError, match="`update_every` must be at least 1"):
                refresh(zero)
    with pytest.raises(ValueError, match="Unknown method 'qr'.*svd, gram_eigh"):
        lro.TopSingular("qr")


def test_numbers_of_numpy_are_numbers():
    grads = gradients((5, 8))
    plain = project(scale=0.5, refresh=lro.Every(3))
    expected = on_one_leaf(plain, grads)
    kinds = {np.int64: np.float32, np.array: np.array}
    for whole, real in kinds.items():
        tx = project(rank=whole(2), scale=real(0.5), refresh=lro.Every(whole(3)))
        assert_close(on_one_leaf(tx, grads), expected)


@pytest.mark.parametrize("changed", ["updates", "state"])
def test_an_engine_that_changes_a_structure_is_told(changed):
    def update(updates, state, params):
        again = {"again": updates if changed == "updates" else state}
        return (again, state) if changed == "updates" else (updates, again)

    tx = transformation(lambda params: params, update)
    params = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match="changed the structure .*became .*again"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize("over", [None, 0], ids=["one", "vmap"])
def test_on_tpu_an_update_lies_as_its_weights(over):
    # Else a v6e turns the weights for it, and turns them back.
    shapes = {"a": (16, 24), "b": (24, 16), "bias": (24,)}
    batch = () if over is None else (3,)
    params = {
        k: jax.ShapeDtypeStruct((*batch, *s), "float32") for k, s in shapes.items()
    }
    tx = project(subspace=lro.TopSingular())
    init, update = tx.init, tx.update
    if over is not None:
        init, update = jax.vmap(init), jax.vmap(update)
    state = jax.eval_shape(init, params)
    checks = [jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")]
    for platform, count in (("tpu", 2), ("cuda", 0)):
        export = jax.export.export(
            jax.jit(update), platforms=[platform], disabled_checks=checks
        )
        text = export(params, state).mlir_module()
        assert text.count("@LayoutConstraint") == count


def test_a_schedule_where_a_number_belongs_is_told_where_it_is_taken():
    schedule = optax.constant_schedule(2)
    for name, make in {
        "update_every": lambda: lro.Every(schedule),
        "max_interval": lambda: lro.OnConvergence(max_interval=schedule),
        "scale": lambda: project(scale=schedule),
    }.items():
        match = f"`{name}` must be a number, got the function.*inject_hyperparams"
        with pytest.raises(TypeError, match=match):
            make()


def test_rank_one_is_a_rank():
    for subspace in (lro.TopSingular(), lro.EnergyRank(), lro.RandomOrthonormal()):
        tx = project(rank=1, subspace=subspace)
        assert tx.init({"w": jnp.ones((5, 8))}).basis["w"].shape == (5, 1)
