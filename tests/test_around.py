"""An optimizer called on some of its leaves at a time, and their order."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from running import assert_close, random_grads, random_like

import lowrank_optax as lro
from lowrank_optax._src.engines.around import ByLeaves
from lowrank_optax._src.engines.order import Order, wait
from lowrank_optax._src.leaves.fields import StateFields, by_leaf

SHAPES = {"a": (4, 6), "b": (6,), "c": (4, 6), "d": {"e": (2, 3), "f": (4,)}}
PARAMS = random_like(SHAPES, 0)
NAMES = ["a", "b", "c", "e", "f"]  # in the order of the leaves


def around(inner, updates, state, params, extra):
    inner = optax.with_extra_args_support(inner)
    leaves, treedef = jax.tree.flatten(updates)
    layout = StateFields(inner).layout(updates)
    weights = None if params is None else dict(enumerate(jax.tree.leaves(params)))
    by_leaves = ByLeaves(
        inner, layout, treedef, state, dict(enumerate(leaves)), weights, extra
    )
    return by_leaves, by_leaf(layout.get(state), range(len(leaves))), treedef


def in_groups(inner, updates, state, params=None, **extra):
    """One update, a group after the other, each with nothing but its own leaves."""
    by_leaves, moments, treedef = around(inner, updates, state, params, extra)
    leaves, weights = jax.tree.leaves(updates), jax.tree.leaves(params)
    out, new = {}, {}
    for group in reversed(by_leaves.groups):  # in whatever order
        directions, found = by_leaves.step(
            {i: leaves[i] for i in group},
            {i: moments[i] for i in group},
            {i: weights[i] for i in group} if weights else {},
        )
        out |= directions
        new |= found
    return treedef.unflatten(out[i] for i in range(len(out))), by_leaves.state(new)


def groups(inner, params=PARAMS, with_params=True):
    state = inner.init(params)
    found = around(inner, params, state, params if with_params else None, {})
    return ["".join(NAMES[i] for i in group) for group in found[0].groups]


MASK = {"a": True, "b": False, "c": True, "d": False}
LABELS = {"a": "one", "b": "two", "c": "one", "d": "two"}
CLIPPED = optax.chain(optax.clip_by_global_norm(0.1), optax.scale_by_adam())


def partitioned(one, two):
    return optax.partition({"one": one, "two": two}, LABELS)


class Norm(NamedTuple):
    count: jax.Array
    norm: jax.Array
    trace: Any


def normed(names):
    """Momentum, with a number that some leaves make and that all know a step later."""

    def init(params):
        return Norm(jnp.int32(0), jnp.ones([]), jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        trace = jax.tree.map(lambda t, g: 0.9 * t + g, state.trace, updates)
        out = jax.tree.map(lambda t: t / state.norm, trace)
        norm = optax.tree.norm({k: updates[k] for k in names})
        return out, Norm(state.count + 1, norm, trace)

    return optax.GradientTransformation(init, update)


INNER = {
    "identity": optax.identity(),
    "adam": optax.scale_by_adam(),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "lion": optax.scale_by_lion(),
    "trace": optax.trace(0.9),
    "adafactor": optax.scale_by_factored_rms(min_dim_size_to_factor=1),
    "trust ratio": optax.scale_by_trust_ratio(),
    "block norms": optax.chain(optax.clip_by_block_rms(0.1), optax.scale_by_adam()),
    "global norm": CLIPPED,
    "norm at the end": optax.chain(
        optax.scale_by_adam(), optax.normalize_by_update_norm()
    ),
    "schedule": optax.chain(
        optax.scale_by_adam(), optax.scale_by_schedule(lambda t: 1.0 / (1 + t))
    ),
    "masked": optax.masked(optax.scale_by_adam(), MASK),
    "masked global norm": optax.masked(CLIPPED, MASK),
    "partition": partitioned(CLIPPED, optax.scale_by_lion()),
    "two norms": partitioned(CLIPPED, CLIPPED),
    "by hyperparameters": optax.inject_hyperparams(optax.adam)(0.1),
    "if finite": optax.apply_if_finite(optax.scale_by_adam(), 3),
    "several steps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "number of one leaf": normed("c"),
    "number of two leaves": normed("ac"),
}  # fmt: skip
EXPECTED = {
    "global norm": ["abcef"],
    "norm at the end": ["abcef"],
    "masked global norm": ["ac", "b", "e", "f"],
    "partition": ["ac", "b", "e", "f"],
    "two norms": ["ac", "bef"],
    "number of two leaves": ["ac", "b", "e", "f"],
    "if finite": ["abcef"],
    "several steps": ["abcef"],
}


@pytest.mark.parametrize("name", INNER)
def test_leaves_that_meet_are_a_group(name):
    assert groups(INNER[name]) == EXPECTED.get(name, NAMES)


def test_leaves_meet_by_their_weights_too():
    def init(params):
        return optax.EmptyState()

    def update(updates, state, params=None):
        size = optax.tree.norm({k: params[k] for k in "bc"})
        return updates | {"a": size * updates["a"]}, state

    assert groups(optax.GradientTransformation(init, update)) == ["abc", "e", "f"]


def test_leaves_meet_over_others():
    """By ones that have met already, whichever came first."""

    def update(updates, state, params=None):
        x = dict(updates)
        x["b"] = x["b"] + jnp.sum(x["c"])
        x["a"] = x["a"] + jnp.sum(x["d"]["e"])
        x["c"] = x["c"] + jnp.sum(x["a"])
        return x, state

    inner = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    assert groups(inner, with_params=False) == ["abce", "f"]


@pytest.mark.parametrize("name", INNER)
def test_groups_make_what_one_call_makes(name):
    inner = optax.with_extra_args_support(INNER[name])
    state = expected_state = inner.init(PARAMS)
    step = jax.jit(lambda *args: in_groups(inner, *args))
    for grads in random_grads(PARAMS, 4):
        updates, state = step(grads, state, PARAMS)
        expected, expected_state = jax.jit(inner.update)(grads, expected_state, PARAMS)
        assert_close(updates, expected)
        assert_close(state, expected_state)
        assert jax.tree.structure(state) == jax.tree.structure(expected_state)


def test_random_numbers_are_those_of_one_call():
    """An optimizer that draws splits its key by how many leaves it is given."""
    inner = optax.add_noise(0.1, 0.5, key=jax.random.key(0))
    grads = random_grads(PARAMS, 1)[0]
    updates, state = in_groups(inner, grads, inner.init(PARAMS))
    expected, expected_state = inner.update(grads, inner.init(PARAMS))
    assert_close(updates, expected)
    noise = {k: updates[k] - grads[k] for k in "ac"}  # of equal shapes
    assert not np.allclose(noise["a"], noise["c"])
    assert_close(
        jax.random.key_data(state.rng_key), jax.random.key_data(expected_state.rng_key)
    )


def test_extra_arguments_reach_every_group():
    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda u: value * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    updates, _ = in_groups(inner, PARAMS, optax.EmptyState(), value=3.0)
    assert_close(updates, jax.tree.map(lambda x: 3 * x, PARAMS))


def test_an_extra_argument_may_be_a_tree_of_the_parameters():
    """As the diagonal of a Hessian is."""

    def update(updates, state, params=None, *, hessian):
        return jax.tree.map(lambda u, h: u / h, updates, hessian), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    hessian = jax.tree.map(lambda x: 2 + jnp.abs(x), PARAMS)
    updates, _ = in_groups(inner, PARAMS, optax.EmptyState(), hessian=hessian)
    assert_close(updates, jax.tree.map(lambda x, h: x / h, PARAMS, hessian))


def test_an_optimizer_may_know_how_many_numbers_there_are():
    def update(updates, state, params=None):
        size = sum(x.size for x in jax.tree.leaves(updates))
        return jax.tree.map(lambda u: u / size, updates), state

    inner = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    updates, _ = in_groups(inner, PARAMS, optax.EmptyState())
    assert_close(updates, inner.update(PARAMS, optax.EmptyState())[0])


def test_without_leaves_the_numbers_of_all_go_on():
    inner = optax.scale_by_adam()
    updates, state = in_groups(inner, {}, inner.init({}))
    assert updates == {} and state.count == 1


def test_moments_may_come_late():
    """To find the groups takes shapes alone."""
    inner = optax.scale_by_adam()
    state, shapes = inner.init(PARAMS), jax.eval_shape(inner.init, PARAMS)
    state = state._replace(mu=shapes.mu, nu=shapes.nu)
    by_leaves, _, _ = around(inner, jax.eval_shape(lambda: PARAMS), state, None, {})
    assert by_leaves.groups == [[0], [1], [2], [3], [4]]


# Order


VALUES = {
    "float32": jnp.array([1.5, -2.0, jnp.inf, 1e-30]),
    "bfloat16": jnp.array([1.5, -2.0, jnp.inf], jnp.bfloat16),
    "int32": jnp.array([2**31 - 1, -1, 0]),
    "uint8": jnp.array([0, 1, 255], jnp.uint8),
    "bool": jnp.array([True, False]),
    "scalar": jnp.int32(3),
    "keys": jax.random.split(jax.random.key(3), 2),
}
LAST = [jnp.ones((2, 2)), jnp.array([jnp.nan, 1.0]), jnp.array(-jnp.inf)]


@pytest.mark.parametrize("name", VALUES)
def test_waiting_changes_nothing(name):
    x = VALUES[name]
    for transform in (lambda f: f, jax.jit):
        found = transform(wait)(x, LAST)
        assert found.dtype == x.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            found, x = map(jax.random.key_data, (found, x))
        np.testing.assert_array_equal(found, x)


@pytest.mark.parametrize("last", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int32", "uint8"])
def test_on_cpu_the_program_depends_on_what_is_waited_for(name, last):
    x, y = VALUES[name], VALUES[last]
    compiled = jax.jit(lambda x, y: wait(x, [y])).lower(x, y).compile().as_text()
    entry = compiled[compiled.index("ENTRY") :]
    (line,) = [line for line in entry.splitlines() if "parameter(1)" in line]
    assert entry.count(line.split("=")[0].strip().removeprefix("%")) > 1


def lowered(platform, dense):
    x = jnp.ones((4, 4))
    traced = jax.jit(lambda x, y: wait(x, [y], dense)).trace(x, x)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("dense", [False, True])
def test_elsewhere_nothing_is_added(dense):
    assert "stablehlo.add" in lowered("cpu", dense)
    for platform in ("tpu", "cuda"):
        assert "stablehlo.add" not in lowered(platform, dense)
        assert "multiply" not in lowered(platform, dense)
    # On GPU, leaves that have dense temporaries take turns.
    assert ("optimization_barrier" in lowered("cuda", dense)) == dense
    assert "optimization_barrier" not in lowered("tpu", dense)


def test_the_first_leaf_waits_for_nothing_and_others_for_the_last():
    x, waited = jnp.ones(3), []
    order = Order()
    assert order.start(x) is x
    order.end({"a": jnp.ones(2), "none": jnp.ones(0)})
    order.end(())  # a leaf without numbers: the one before stays the last

    def start(x):
        waited.append(order.start(x))
        return waited[-1]

    assert len(jax.make_jaxpr(start)(x).eqns) > 0


def test_fields_below_a_parameter_are_named_by_what_is_below_it():
    inner = lro.mlorc_compress(optax.trace(0.9), rank=2)
    params = {"up": {"kernel": jnp.ones((8, 12))}, "bias": jnp.ones(3)}
    found = StateFields(inner).layout(params)
    places = {where for where in found.where if where}
    kernel, bias = 1, 0
    assert {("inner_state/trace.left", kernel), ("inner_state/trace", bias)} <= places
    assert ("inner_state/trace.right", kernel) in places
    assert found.codes == {"inner_state/trace.left", "inner_state/trace.right"}
