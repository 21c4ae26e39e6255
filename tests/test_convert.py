"""States of other ranks and other bytes, as another transformation keeps them."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from registry import METHODS, example_params
from running import assert_close, random_grads, random_like, run
from test_quantize import quantized

import lowrank_optax as lro
from lowrank_optax._src.parts.codec import BlockInt8Code

SHAPES = {"up": (24, 256), "down": (160, 28), "bias": (4200,), "norm": (3,)}
RATE = 0.1


@pytest.fixture(scope="module")
def params():
    return random_like(SHAPES, 0)


def trained(tx, params, steps=3):
    """A state as it is after some steps, among them a block's largest below zero."""
    grads = random_grads(params, steps)
    for g in grads:
        g["up"] = g["up"].at[0, 0].set(-9.0)
    return run(tx, params, grads)[1]


def mu_and_nu(state):
    return tuple(optax.tree.get(state, name) for name in ("mu", "nu"))


def assert_rounded(found, x, signed):
    """To the nearest numbers of the map, but for ties, which float32 may break."""
    x = np.asarray(x)
    largest = np.abs(x).max()
    half_a_step = 0.45 / (64 if signed else 128)
    assert np.max(np.abs(found - x)) <= 1.001 * half_a_step * largest
    expected = quantized(np.atleast_2d(x), signed).reshape(x.shape)
    assert np.mean(np.abs(found - expected) > 1e-6 * largest) < 1e-3


def test_what_fits_stays_as_it_is():
    params = example_params()
    for method in METHODS:
        state = jax.eval_shape(method.tx.init, params)
        same = lro.convert_state(method.tx, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(same, state)


PAIRS = {
    "adamw": (optax.adamw(RATE, weight_decay=0.0), lro.adamw_8bit(RATE)),
    "galore": (
        lro.galore_adamw(RATE, rank=20),
        lro.galore_adamw_8bit(RATE, rank=20),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_numbers_become_bytes_and_bytes_the_numbers_that_they_stand_for(name, params):
    wide, narrow = PAIRS[name]
    state = trained(wide, params)
    in_bytes = lro.convert_state(narrow, state, params)
    lro.check_state(narrow, in_bytes, params)
    back = lro.convert_state(wide, in_bytes, params)
    for moments, again, signed in zip(
        mu_and_nu(state), mu_and_nu(back), (True, False), strict=True
    ):
        for leaf, x in moments.items():
            if x.size < 4096:
                np.testing.assert_array_equal(again[leaf], x)
            else:
                assert_rounded(again[leaf], x, signed)
    # The next step is that of the numbers: nothing else was lost, the count neither.
    grads = random_grads(params, 1, seed=9)[0]
    (ours,), new = run(narrow, params, [grads], in_bytes)
    (theirs,), _ = run(wide, params, [grads], back)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert int(optax.tree.get_all_with_path(new, "step")[0][1]) == 4


def test_labels_are_no_fields(params):
    """A label that is named as a first moment says nothing of the second ones."""
    labels = dict.fromkeys(SHAPES, "m")

    def labelled(tx):
        return optax.partition({"m": tx}, labels)

    wide, narrow = map(labelled, PAIRS["adamw"])
    old = trained(wide, params)
    plain = lro.convert_state(
        PAIRS["adamw"][1], trained(PAIRS["adamw"][0], params), params
    )
    found = lro.convert_state(narrow, old, params)
    for x, y in zip(mu_and_nu(found), mu_and_nu(plain), strict=True):
        chex.assert_trees_all_equal(x, y)


class OwnState(NamedTuple):
    nu: Any


class Squares:
    """A rule whose field its dense optimizer lacks: it is kept in a dict."""

    def init(self, view):
        return OwnState(view.zeros("m", "n"))

    def update(self, key, step, grad, state):
        nu = 0.9 * state.nu + 0.1 * grad**2
        return grad, OwnState(nu)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Momentum:
    trace: Any


def of_dataclass():
    def init(params):
        return Momentum(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        trace = jax.tree.map(lambda m, g: 0.9 * m + g, state.trace, updates)
        return trace, Momentum(trace)

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize(
    "made, field",
    [
        (
            lambda: lro.leafwise(
                Squares(), dense=optax.identity(), matrices=lro.MatrixAxes()
            ),
            "nu",
        ),
        (of_dataclass, "trace"),
    ],
)
def test_fields_are_known_in_all_containers(made, field):
    params = random_like({"up": (24, 256)}, 0)
    tx, signed = made(), field == "trace"
    old = run(tx, params, random_grads(params, 3))[1]
    in_bytes = lro.quantize_state(tx, fields={field: "first" if signed else "second"})
    found = lro.convert_state(in_bytes, old, params)
    (x,) = (y for y in jax.tree.leaves(old) if y.ndim == 2)
    (index,) = (y for y in jax.tree.leaves(found) if y.dtype == jnp.uint8)
    (largest,) = (y for y in jax.tree.leaves(found) if y.dtype == jnp.float32)
    code = BlockInt8Code(index, largest)
    assert_rounded(lro.BlockInt8(signed).decode(code), x, signed)


def test_a_converted_state_may_be_donated(params):
    old, tx = PAIRS["adamw"]
    state = lro.convert_state(tx, trained(old, params), params)
    step = jax.jit(
        lambda grads, state: tx.update(grads, state, params), donate_argnums=1
    )
    updates, _ = step(params, state)
    chex.assert_tree_all_finite(updates)


def test_bytes_around_a_method_that_has_codes_of_its_own(params):
    params = {"up": params["up"]}
    inner = lro.scale_by_ldadam(4)
    tx = lro.quantize_state(inner)
    state = trained(inner, params)
    found = lro.convert_state(tx, state, params)
    back = lro.convert_state(inner, found, params)
    np.testing.assert_array_equal(back.own["basis"]["up"], state.own["basis"]["up"])


def test_bytes_become_numbers_of_the_type_that_is_wanted(params):
    params = {"up": params["up"]}
    tx = optax.adamw(RATE, mu_dtype=jnp.bfloat16, weight_decay=0.0)
    narrow = PAIRS["adamw"][1]
    state = trained(narrow, params)
    mu, nu = mu_and_nu(lro.convert_state(tx, state, params))
    code = mu_and_nu(state)[0]["up"]
    assert mu["up"].dtype == jnp.bfloat16 and nu["up"].dtype == jnp.float32
    expected = np.asarray(lro.BlockInt8(True).decode(code))
    np.testing.assert_allclose(np.float32(mu["up"]), expected, rtol=2**-8)


def test_boxes_stay_around_what_was_in_them(params):
    boxed = {"up": nnx.Param(params["up"])}
    old, tx = galore(8), galore(5)
    state = lro.convert_state(tx, old.init(boxed), boxed)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(boxed))


def galore(rank):
    return lro.galore_project(optax.scale_by_adam(), rank=rank)


def test_of_a_basis_the_leading_columns_stay(params):
    state = trained(galore(8), params)
    small = lro.convert_state(galore(5), state, params)
    rows = {"up": np.s_[:5], "down": np.s_[:5], "bias": np.s_[:], "norm": np.s_[:]}
    for leaf in ("up", "down"):
        np.testing.assert_array_equal(small.basis[leaf], state.basis[leaf][:, :5])
    for new, old in zip(mu_and_nu(small), mu_and_nu(state), strict=True):
        for leaf, kept in rows.items():
            np.testing.assert_array_equal(new[leaf], old[leaf][kept])
    (updates,), _ = run(galore(5), params, [params], small)
    assert np.linalg.matrix_rank(updates["up"]) == 5


def test_rank_and_bytes_at_once(params):
    params = {"up": params["up"]}
    tx = lro.galore_adamw_8bit(RATE, rank=16)
    state = trained(lro.galore_adamw(RATE, rank=20), params)
    small = lro.convert_state(tx, state, params)
    mu, nu = mu_and_nu(small)
    for code, x, signed in ((mu["up"], 0, True), (nu["up"], 1, False)):
        whole = mu_and_nu(state)[x]["up"][:16]
        assert_rounded(lro.BlockInt8(signed).decode(code), whole, signed)
    smaller = lro.convert_state(lro.galore_adamw_8bit(RATE, rank=15), state, params)
    for rank in (15, 1):
        lro.convert_state(lro.galore_adamw(RATE, rank=rank), smaller, params)


def test_a_basis_in_half_bytes_keeps_its_columns():
    params = random_like({"up": (520, 530)}, 0)  # large enough for a code

    def made(rank):
        return lro.q_galore_project(optax.scale_by_adam(), rank=rank)

    state = trained(made(16), params, 1)
    small = lro.convert_state(made(9), state, params)
    codec = lro.PackedInt4()

    def basis(state):
        return codec.decode(optax.tree.get(state, "basis")["up"])

    assert state.inner_state.basis["up"].pairs.shape == (520, 8)
    np.testing.assert_array_equal(basis(small), basis(state)[:, :9])


def test_of_factors_the_best_approximation_stays(params):
    def made(rank):
        return lro.mlorc_scale_by_adam(rank)

    state = trained(made(6), params)
    small = lro.convert_state(made(2), state, params)
    for new, old in zip(mu_and_nu(small), mu_and_nu(state), strict=True):
        for leaf in ("up", "down"):
            whole = np.float64(old[leaf].left) @ np.float64(old[leaf].right)
            u, s, v = np.linalg.svd(whole, full_matrices=False)
            best = (u[:, :2] * s[:2]) @ v[:2]
            found = np.asarray(new[leaf].left @ new[leaf].right)
            np.testing.assert_allclose(found, best, atol=1e-4 * s[0])
            rows = np.linalg.norm(new[leaf].right, axis=-1)
            np.testing.assert_allclose(rows, 1.0, rtol=1e-5)


def test_on_a_mesh_as_it_is_told(params):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    params = {"up": jax.device_put(params["up"], NamedSharding(mesh, P(None, "x")))}
    old, tx = lro.galore_adamw(RATE, rank=20), lro.galore_adamw_8bit(RATE, rank=20)
    state = trained(old, params)
    shardings = lro.state_shardings(tx, params, mesh)
    convert = jax.jit(
        lambda state: lro.convert_state(tx, state, params), out_shardings=shardings
    )
    found, expected = convert(state), lro.convert_state(tx, state, params)
    chex.assert_trees_all_equal(found, expected)
    index = mu_and_nu(found)[0]["up"].index
    assert {x.data.shape for x in index.addressable_shards} == {(20, 128)}


BLOCKS_OF_100 = lro.adamw_8bit(0.1, block=100)


@pytest.mark.parametrize(
    ("made", "used", "message"),
    [
        (galore(4), galore(8), r"'basis' of 'up' .*\(24, 4\), must be .*\(24, 8\)"),
        (
            lro.apollo_scale(optax.scale_by_adam(), rank=8),
            lro.apollo_scale(optax.scale_by_adam(), rank=4),
            r"'inner_state/mu' of 'up' .*\(8, 256\), must be .*\(4, 256\)",
        ),
        (optax.trace(0.9), galore(4), "'trace' of 'up'.*must be absent"),
        (lro.adamw_8bit(0.1), lro.mlorc_adamw(0.1), "mu.left' of 'up'.*absent"),
        (
            lro.adamw_8bit(0.1, block=100),
            optax.adamw(0.1),
            "'0/mu/up' in blocks of 256",
        ),
        (
            optax.adamw(0.1),
            lro.adamw_8bit(0.1, block=100),
            "'0/inner_state/mu/up' in b",
        ),
    ],
)
def test_what_differs_in_more_is_refused(made, used, message, params):
    params = {"up": params["up"]}
    state = made.init(params)
    with pytest.raises(ValueError, match=message):
        lro.convert_state(used, state, params)


class Kept(NamedTuple):
    anything: Any


def test_bytes_of_which_nothing_tells_whether_they_have_signs_are_refused(params):
    params = {"up": params["up"]}
    inner = optax.GradientTransformation(
        lambda params: Kept(optax.tree.zeros_like(params)), lambda u, s, p=None: (u, s)
    )
    coded = lro.quantize_state(inner, fields={"anything": "second"})
    state = coded.init(params)
    other = lro.quantize_state(inner, block=64, fields={"anything": "second"})
    for tx in (inner, other):
        with pytest.raises(ValueError, match="bytes of '.*anything/up': nothing tells"):
            lro.convert_state(tx, state, params)
    assert lro.convert_state(coded, state, params) is not None


def test_the_blocks_may_be_named(params):
    params = {"up": params["up"]}
    tx = optax.adamw(0.1)
    state = trained(BLOCKS_OF_100, params)
    found = lro.convert_state(tx, state, params, block=100)
    code = mu_and_nu(state)[0]["up"]
    expected = lro.BlockInt8(True, 100).decode(code)
    np.testing.assert_array_equal(mu_and_nu(found)[0]["up"], expected)


def test_a_smaller_model_is_not_cut_out_of_a_larger_one():
    large, small = {"w": jnp.ones((12, 16))}, {"w": jnp.ones((12, 14))}
    for tx in (optax.scale_by_adam(), galore(4)):
        with pytest.raises(ValueError, match=r"'(inner_state/)?mu' of 'w' \(12, 14\)"):
            lro.convert_state(tx, tx.init(large), small)
    stack, alone = ({"w": jnp.ones((layers, 12, 16))} for layers in (2, 1))
    stacked = lro.galore_adamw(RATE, rank=4, matrices=lro.MatrixAxes())
    for tx in (optax.scale_by_adam(), stacked):
        with pytest.raises(ValueError, match=r"mu' of 'w' \(1, 12, 16\)"):
            lro.convert_state(tx, tx.init(stack), alone)


def test_other_containers_are_refused(params):
    state = galore(4).init(params)
    with pytest.raises(ValueError, match=r"jax.eval_shape\(old.init, params\)"):
        lro.convert_state(galore(4), state._asdict(), params)
