"""Bases of many matrices that are renewed at once."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from running import assert_close

import lowrank_optax as lro

RANK = 4
SHAPES = {
    "a": (24, 40),
    "b": (40, 24),
    "c": (24, 40),
    "few": (3, 64),  # of a rank of its own
    "stack": (2, 24, 40),
    "z": (24, 40),
}


@dataclasses.dataclass(frozen=True)
class Alone:
    """Another subspace, asked for one matrix after the other."""

    base: lro.Subspace

    def select(self, key, grad, old, step):
        return self.base.select(key, grad, old, step)


JOINT = {
    "rsvd": lro.TopSingular(),
    "warm": lro.TopSingular("warm"),
    "random": lro.RandomOrthonormal(),
    "heads": lro.CrossHead(4),
}


def project(subspace, **kwargs):
    kwargs = {"rank": RANK, "refresh": lro.Every(2), "side": "left", **kwargs}
    axes = lro.MatrixAxes()
    return lro.project_gradients(
        optax.scale_by_adam(), subspace=subspace, matrices=axes, **kwargs
    )


def gradients(steps, shapes=SHAPES):
    rng = np.random.default_rng(0)

    def one(shape):
        *batch, m, n = shape
        values = 2.0 ** -np.arange(min(m, n))
        left = np.linalg.qr(rng.normal(size=(*batch, m, min(m, n))))[0]
        right = np.linalg.qr(rng.normal(size=(*batch, n, min(m, n))))[0]
        return jnp.asarray((left * values) @ right.mT, jnp.float32)

    return [{k: one(shape) for k, shape in shapes.items()} for _ in range(steps)]


def run(tx, grads):
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    states = []
    for grad in grads:
        updates, state = update(grad, state)
        states.append((updates, state))
    return states


@pytest.mark.parametrize("name", JOINT)
def test_at_once_and_one_after_the_other_are_the_same(name):
    assert JOINT[name].together
    grads = gradients(3)
    for given, expected in zip(
        run(project(JOINT[name]), grads),
        run(project(Alone(JOINT[name])), grads),
        strict=True,
    ):
        assert_close(given, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("after", [lro.RandomOrthonormal(), lro.RandomGaussian()])
def test_a_switch_is_each_of_both_at_its_steps(after):
    late = lro.Switch(2, lro.TopSingular(), after)
    grads = gradients(4)
    switched, early, alone = (
        run(project(x, transfer=lro.Reset()), grads)
        for x in (late, lro.TopSingular(), Alone(late))
    )
    for i, expected in enumerate((early, early, alone, alone)):
        assert_close(switched[i], expected[i], rtol=1e-3, atol=1e-4)
    assert abs(alone[3][1].basis["a"] - early[3][1].basis["a"]).max() > 0.1


def test_a_switch_with_a_select_of_its_own_is_asked_for_it():
    class Other(lro.Switch):
        def select(self, key, grad, old, step):
            return lro.TopSingular().select(key, grad, old, step)

    grads = gradients(1)
    never = Other(0, lro.RandomOrthonormal(), lro.RandomOrthonormal())
    given, expected = (run(project(x), grads) for x in (never, lro.TopSingular()))
    assert_close(given, expected, rtol=1e-3, atol=1e-4)


class Told(NamedTuple):
    overlap: jax.Array


@dataclasses.dataclass(frozen=True)
class Telling(lro.Every):
    """Keeps what it is told of the last renewal."""

    def init(self, view, phase):
        return Told(jnp.full(view.batch_shape, -1.0))

    def after(self, state, due, seen):
        return Told(jnp.where(due, seen.overlap, state.overlap))


@pytest.mark.parametrize("bad", [0.0, jnp.nan], ids=str)
def test_a_gradient_without_a_direction_is_treated_alike_in_a_group_and_alone(bad):
    grads = gradients(4)
    for name in ("a", "stack"):
        grads[2][name] = jnp.full_like(grads[2][name], bad)
    parts = {"refresh": Telling(2), "transfer": lro.Reset()}
    (given, expected) = (
        run(project(subspace, **parts), grads)
        for subspace in (lro.TopSingular(), Alone(lro.TopSingular()))
    )
    for (_, state), (_, want) in zip(given, expected, strict=True):
        assert_close(state, want, rtol=1e-3, atol=1e-4)
    assert not expected[2][1].refresh["a"].overlap.any()
    assert expected[2][1].refresh["b"].overlap.all()


class Reversed:
    def select(self, key, grad, old, step):
        return lro.TopSingular().select(key, grad, old, step)[..., ::-1]


@dataclasses.dataclass(frozen=True)
class Mixed(Reversed, lro.TopSingular):
    """Derived, with a `select` from beside."""


@dataclasses.dataclass(frozen=True)
class Wrapped(Reversed):
    """Passes on all that it has not itself."""

    base: lro.Subspace

    def __getattr__(self, name):
        return getattr(object.__getattribute__(self, "base"), name)


@pytest.mark.parametrize("subspace", [Mixed(), Wrapped(lro.TopSingular())])
def test_a_select_of_ones_own_is_asked(subspace):
    grads = gradients(1)
    (_, given), (_, expected) = (
        run(project(x), grads)[0] for x in (subspace, lro.TopSingular())
    )
    for name in SHAPES:
        overlap = jnp.abs(expected.basis[name].mT @ given.basis[name])
        eye = jnp.broadcast_to(jnp.eye(overlap.shape[-1])[::-1], overlap.shape)
        assert_close(overlap, eye, atol=1e-3)


def test_exact_subspaces_are_of_one_matrix_at_a_time():
    # Their temporaries are as large as a gradient.
    for method in ("svd", "gram_eigh"):
        assert not lro.TopSingular(method).together
        assert not lro.CrossHead(4, lro.TopSingular(method)).together


def calls(leaves, **kwargs):
    """Of Cholesky factorizations, in what is compiled."""
    params = {
        f"w{i}": jax.ShapeDtypeStruct((64, 96), jnp.float32) for i in range(leaves)
    }
    subspace = kwargs.pop("subspace", lro.TopSingular())
    tx = project(subspace, rank=8, **kwargs)
    state = jax.eval_shape(tx.init, params)
    text = jax.jit(tx.update).lower(params, state).compile().as_text()
    return text.count('custom_call_target="lapack_spotrf')


def test_small_problems_of_a_refresh_are_common_calls():
    # A matrix has room for the thin arrays of four such.
    assert calls(1) == calls(4) > 0
    assert calls(8) == 2 * calls(1)
    # Of equal subspaces, be they made for each leaf.
    assert calls(4, subspace=lambda view: lro.TopSingular()) == calls(1)
    # In each of what a subspace is by the step.
    late = lro.Switch(3, lro.TopSingular(), lro.RandomOrthonormal())
    assert calls(4, subspace=late) == calls(1, subspace=late) > calls(1)
    # Where leaves are due apart, nothing is common.
    assert calls(4, refresh=lro.Staggered(2)) == 4 * calls(1, refresh=lro.Staggered(2))


def test_a_leaf_that_waits_for_a_gradient_does_not_renew_the_others():
    grads = gradients(4)
    for grad in grads[:3]:
        grad["a"] *= 0.0
    states = run(project(lro.TopSingular(), refresh=Telling(100)), grads)
    first, last = (states[i][1].basis for i in (0, 3))
    for i in (0, 1, 2):
        assert not states[i][1].basis["a"].any()
        assert states[i][1].refresh["a"].overlap == 0
        assert not states[i][0]["a"].any()
    for name in SHAPES:
        if name == "a":
            basis = last["a"]
            assert_close(basis.T @ basis, np.eye(RANK), atol=1e-5)
        else:
            np.testing.assert_array_equal(last[name], first[name])


def test_a_leaf_that_waits_has_the_others_not_searched():
    searches = []

    class Counting(lro.TopSingular):
        def select_each(self, keys, grads, olds, step):
            jax.debug.callback(lambda: searches.append(len(keys)))
            return super().select_each(keys, grads, olds, step)

    grads = gradients(6)
    for grad in grads[:4]:
        grad["a"] *= 0.0
    run(project(Counting(), refresh=lro.Every(100)), grads)
    jax.effects_barrier()
    # At the start, and once there is a gradient.
    assert searches == [len(SHAPES)] * 2


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_not_finite_spoils_no_other_basis(bad):
    grads, spoiled = gradients(3), gradients(3)
    spoiled[2]["c"] = spoiled[2]["c"].at[1, 2].set(bad)
    fine, kept = (run(project(lro.TopSingular()), x) for x in (grads, spoiled))
    for name in SHAPES:
        new, old = fine[2][1].basis[name], fine[1][1].basis[name]
        assert_close(kept[2][1].basis[name], old if name == "c" else new, atol=1e-6)
