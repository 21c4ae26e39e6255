"""Which fields of a state are first moments, which second ones, and which neither."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from running import assert_close, random_grads, random_like, run

import lowrank_optax as lro
from lowrank_optax._src.leaves.fields import StateFields

# Those of Optax whose state has an array for each parameter.
OPTIMIZERS = {
    "adadelta": optax.scale_by_adadelta(),
    "adafactor": optax.scale_by_factored_rms(min_dim_size_to_factor=1),
    "adafactor, not factored": optax.scale_by_factored_rms(factored=False),
    "adagrad": optax.scale_by_rss(),
    "adam": optax.scale_by_adam(),
    "adamax": optax.scale_by_adamax(),
    "adan": optax.scale_by_adan(),
    "ademamix": optax.contrib.scale_by_ademamix(),
    "amsgrad": optax.scale_by_amsgrad(),
    "belief": optax.scale_by_belief(),
    "dadapt_adamw": optax.contrib.dadapt_adamw(),
    "ema": optax.ema(0.9),
    "lion": optax.scale_by_lion(),
    "novograd": optax.scale_by_novograd(),
    "prodigy": optax.contrib.prodigy(),
    "rms": optax.scale_by_rms(),
    "rprop": optax.scale_by_rprop(0.1),
    "schedule_free": optax.contrib.schedule_free_adamw(0.1),
    "simplified_ademamix": optax.contrib.scale_by_simplified_ademamix(),
    "sm3": optax.scale_by_sm3(),
    "stddev": optax.scale_by_stddev(),
    "trace": optax.trace(0.9),
    "yogi": optax.scale_by_yogi(),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_counts_as_never_negative_never_is(name):
    params, tx = random_like({"w": (6, 8), "b": (8,)}, 0), OPTIMIZERS[name]
    layout, state = StateFields(tx).layout(params), tx.init(params)
    smallest = dict.fromkeys(layout.names, 0.0)
    for grads in random_grads(params, 4):
        _, state = tx.update(grads, state, params)
        for (field, _), x in layout.get(state).items():
            low = [float(jnp.min(part)) for part in jax.tree.leaves(x)]
            smallest[field] = min(smallest[field], *low)
    known = [field for field in layout.names if layout.role(field)]
    first = {field for field in known if layout.role(field) == "first"}
    first -= {"mu"} if name == "sm3" else set()  # of squares, each in two vectors
    assert {field for field in known if smallest[field] < 0} == first


def test_adan_in_bytes_keeps_the_signs_of_its_differences():
    params = random_like({"w": (64, 64)}, 0)
    grads = random_grads(params, 3)
    with pytest.warns(UserWarning, match="fields 'g'.*fields="):
        tx = lro.quantize_state(optax.scale_by_adan())
        _, state = run(tx, params, grads)
    _, exact = run(optax.scale_by_adan(), params, grads)
    decode = lro.BlockInt8(signed=True).decode
    stored, want = decode(state.inner_state.v["w"]), exact.v["w"]
    assert jnp.mean(jnp.sign(stored) == jnp.sign(want)) > 0.99
    assert state.inner_state.n["w"].index.dtype == jnp.uint8


# Of one's own


class Adam(NamedTuple):
    mu: Any
    nu: Any
    age: Any
    steps: jax.Array


def scale_by_ones_own_adam():
    def init(params):
        mu, nu, age = (jax.tree.map(jnp.zeros_like, params) for _ in range(3))
        return Adam(mu, nu, age, jnp.zeros([]))

    def update(grads, state, params=None):
        # What is not a second moment, though it has the name.
        nu = jax.tree.map(lambda v, g: 0.9 * v + g, state.nu, grads)
        mu = jax.tree.map(lambda m, g: 0.9 * m + g, state.mu, grads)
        return jax.tree.map(jnp.add, mu, nu), state._replace(mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


WHOLE = {"rank": 64, "matrices": lro.MatrixAxes()}
COMPRESSED = {
    "bytes": lro.quantize_state,
    "factors": functools.partial(lro.mlorc_compress, **WHOLE),
}


@pytest.mark.parametrize("how", COMPRESSED)
def test_no_name_makes_a_stranger_never_negative(how):
    compress, inner = COMPRESSED[how], scale_by_ones_own_adam()
    params = random_like({"w": (64, 64)}, 0)
    grads = random_grads(params, 3)
    with pytest.warns(UserWarning, match="the state fields 'nu', 'age'. If") as said:
        state = compress(inner).init(params).inner_state
    assert len(said) == 1
    chex.assert_trees_all_equal((state.nu, state.age), inner.init(params)[1:3])
    assert not isinstance(state.mu["w"], jax.Array)
    with pytest.raises(ValueError, match=r"'nu'.*signs.*fields=\{'nu': 'first'\}"):
        compress(inner, fields=("mu", "nu")).init(params)

    tx = compress(inner, fields={"mu": "first", "nu": "first"})
    updates, last = run(tx, params, grads)
    expected, _ = run(inner, params, grads)
    assert_close(updates, expected, rtol=0.05, atol=0.1)
    chex.assert_trees_all_equal_shapes(last.inner_state.mu, last.inner_state.nu)
    with pytest.raises(ValueError, match="'first' or 'second', got 'third' for 'nu'"):
        compress(inner, fields={"nu": "third"})


@pytest.mark.parametrize("role", ["first", "second"])
@pytest.mark.parametrize("name", ["nu", "0/nu"])
def test_a_role_that_is_named(name, role):
    inner = optax.chain(scale_by_ones_own_adam())
    tx = lro.mlorc_compress(inner, rank=2, fields={name: role})
    params = {"w": -jnp.ones((16, 24))}
    _, state = tx.update(params, tx.init(params))
    assert_close(state.inner_state[0].mu["w"], params["w"])
    updates, _ = tx.update(params, state)
    if role == "first":
        assert_close(updates["w"], 3.8 * params["w"])
    else:  # the -1 that was stored is read as nothing below zero
        assert jnp.all(updates["w"] >= -2.9 - 1e-5)


# In a list below each parameter


class Slots(NamedTuple):
    slots: Any
    count: jax.Array


def scale_by_adam_in_lists():
    """Adam of which one list for each parameter holds both moments."""
    adam = optax.scale_by_adam()

    def init(params):
        slots = jax.tree.map(lambda p: [jnp.zeros_like(p), jnp.zeros_like(p)], params)
        return Slots(slots, jnp.zeros([], jnp.int32))

    def update(grads, state, params=None):
        leaves, treedef = jax.tree.flatten(grads)
        lists = treedef.flatten_up_to(state.slots)
        mu, nu = (treedef.unflatten([x[k] for x in lists]) for k in (0, 1))
        given = optax.ScaleByAdamState(state.count, mu, nu)
        updates, (count, *new) = adam.update(grads, given)
        pairs = zip(*map(jax.tree.leaves, new), strict=True)
        return updates, Slots(treedef.unflatten(map(list, pairs)), count)

    return optax.GradientTransformation(init, update)


NAMED = {"slots.0": "first", "slots.1": "second"}
ROTATE = lro.Rotate(first=("slots.0",), second=("slots.1",))
AROUND = {
    "galore": (lro.galore_project, {"rank": 2, "update_every": 2}, {}),
    "reset": (lro.project_gradients, {"rank": 2, "transfer": lro.Reset()}, {}),
    "rotate": (
        lro.project_gradients,
        {"rank": 2, "transfer": lro.Rotate(), "refresh": lro.Every(2)},
        {"transfer": ROTATE},
    ),
    "bytes": (lro.quantize_state, {}, {"fields": NAMED}),
    "factors": (lro.mlorc_compress, {"rank": 2}, {"fields": NAMED}),
    "sum": (
        lambda inner: lro.accumulate_gradients(lro.galore_project(inner, rank=2), 2),
        {},
        {},
    ),
}


@pytest.mark.parametrize("how", AROUND)
def test_arrays_in_a_list_are_fields_of_their_own(how):
    factory, kwargs, changes = AROUND[how]
    params = random_like({"w": (64, 64), "b": (8,)}, 0)
    grads = random_grads(params, 4)
    tx = factory(scale_by_adam_in_lists(), **kwargs | changes)
    plain = factory(optax.scale_by_adam(), **kwargs)
    updates, state = run(tx, params, grads)
    expected, last = run(plain, params, grads)
    # The random numbers of a factor depend on the name of its field.
    close = {"rtol": 0.3, "atol": 0.3} if how == "factors" else {}
    assert_close(updates[:2], expected[:2], **close)
    if how != "factors":
        assert_close(updates, expected, rtol=1e-4)
    shapes = [sorted(x.shape for x in jax.tree.leaves(s)) for s in (state, last)]
    assert shapes[0] == shapes[1]
    assert [row.state_bytes for row in lro.describe(tx, params)] == [
        row.state_bytes for row in lro.describe(plain, params)
    ]


def test_what_is_in_lists_is_named_where_its_role_is_asked():
    params = {"w": jnp.ones((64, 64))}
    inner = scale_by_adam_in_lists()
    with pytest.raises(ValueError, match=r"'slots\.0'.*first or a second moment"):
        lro.project_gradients(inner, rank=2, transfer=lro.Rotate()).init(params)
    with pytest.raises(ValueError, match="fields slots.0, slots.1"):
        lro.quantize_state(inner).init(params)


@pytest.mark.parametrize(
    "tx",
    [
        lro.galore_project(optax.scale_by_sm3(), rank=2),
        lro.mlorc_compress(optax.scale_by_sm3(), rank=2, fields=("nu",)),
    ],
    ids=["projected", "factors"],
)
def test_vectors_in_lists_of_boxed_parameters(tx):
    model = nnx.Linear(64, 48, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    grads = jax.tree.map(jnp.ones_like, params)
    plain = jax.tree.map(jnp.ones_like, nnx.to_pure_dict(params))
    _, state = tx.update(plain, tx.init(plain))
    optimizer.update(model, grads)
    found = jax.tree.leaves(nnx.to_pure_dict(nnx.state(optimizer.opt_state)))
    assert len(found) == len(jax.tree.leaves(state))
    assert lro.state_bytes(tx, params) == lro.state_bytes(tx, plain)


# In a basis that changes


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_are_carried_by_what_they_are(name):
    """Signed ones stay exact in a basis that is turned, and squares never negative."""
    params, tx = random_like({"w": (3, 8)}, 0), OPTIMIZERS[name]
    layout, state = StateFields(tx).layout(params), tx.init(params)
    for grads in random_grads(params, 3):
        _, state = tx.update(grads, state, params)
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    known = dict(layout.known)
    moments = {
        field: x
        for (field, _), x in layout.get(state).items()
        if known[field] and x.shape == (3, 8)
    }
    carried = lro.Rotate(coverage=1.0).carry(moments, jnp.asarray(turn), known)
    for field, x in moments.items():
        if known[field] == "first":
            assert_close(carried[field], turn @ np.asarray(x), atol=1e-5)
        else:
            assert jnp.all(carried[field] >= 0)


def test_carried_signs_of_adan():
    params = random_like({"w": (8, 16)}, 0)
    tx = lro.project_gradients(
        optax.scale_by_adan(),
        rank=8,
        refresh=lro.Every(2),
        transfer=lro.Rotate(first=("g",)),
        matrices=lro.MatrixAxes(),
    )
    grads = random_grads(params, 3)
    _, before = run(tx, params, grads[:2])
    _, after = run(tx, params, grads[:3])
    old, new = (s.basis["w"] @ s.inner_state.v["w"] for s in (before, after))
    # All of the space is in the basis, so that the decoded difference is as without.
    plain = optax.scale_by_adan()
    _, want = run(plain, params, grads[:3])
    assert_close(new, want.v["w"], atol=1e-5)
    assert not np.allclose(old, new)


def test_no_name_of_a_stranger_is_carried_as_never_negative():
    params = random_like({"w": (8, 16)}, 0)
    inner = optax.chain(scale_by_ones_own_adam())
    named = lro.Rotate(first=("age",))
    tx = lro.project_gradients(inner, rank=2, transfer=named)
    with pytest.raises(ValueError, match="'0/nu'.*first or a second moment"):
        tx.init(params)
    named = lro.Rotate(first=("age", "nu"))
    lro.project_gradients(inner, rank=2, transfer=named).init(params)
