"""What every method must do under JAX, Optax, Flax and Orbax.

One list of methods (`registry.METHODS`) crossed with one test for each way of use. An
alias is a chain of one of the transformations, a weight decay and a learning rate; it
goes through those tests that a chain could fail.
"""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from absl.testing import parameterized
from flax import nnx
from jax._src import core
from models import Model
from registry import (
    GALORE,
    GALORE_OF_ALL,
    METHODS,
    PERIOD,
    example_params,
    one_of_each,
)
from running import assert_close, norm, random_grads, random_like, run, run_eagerly

import lowrank_optax as lro
from lowrank_optax._src.leaves import keys

BY_NAME = {method.name: method for method in METHODS}


TRANSFORMATIONS = [m.name for m in METHODS if not m.is_alias]


# By module, so that all tests of a method run together and share what it compiles.
@pytest.fixture(scope="module", params=TRANSFORMATIONS)
def method(request):
    return BY_NAME[request.param]


@pytest.fixture(scope="module", params=BY_NAME)
def method_or_alias(request):
    return BY_NAME[request.param]


def assert_finite(tree):
    chex.assert_tree_all_finite(tree)


def descend(method, params, state, n, size=0.02):
    """Follow the gradient of ``|p - target|^2 / 2`` where the target is zero."""
    update = jax.jit(method.tx.update)
    for _ in range(n):
        updates, state = update(params, state, params)
        params = jax.tree.map(jnp.add, params, method.descend(updates, size))
    return params, state


# Transformations of JAX


# One on each engine, and one whose subspace is random: pmap sees no more of a method.
ON_ENGINES = [
    "project_gradients",
    "compress_state",
    "mlorc_scale_by_adam",
    "golore_project",
]


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters((m.name, m) for m in METHODS if not m.is_alias)
    def test_equals_the_eager_update(self, method):
        self.check(method)

    @chex.variants(with_pmap=True)
    @parameterized.named_parameters((name, BY_NAME[name]) for name in ON_ENGINES)
    def test_under_pmap(self, method):
        self.check(method)

    def check(self, method):
        params = one_of_each()
        grads = random_grads(params, 2)
        expected, _ = run_eagerly(method.tx, params, grads)
        update = self.variant(method.tx.update)
        state = method.tx.init(params)
        for g, want in zip(grads, expected, strict=True):
            updates, state = update(g, state, params)
            assert_close(updates, want)


def test_one_trace_and_donation_over_refreshes(method_or_alias):
    method = method_or_alias
    params = example_params()
    grads = random_grads(params, 2 * PERIOD + 1)
    expected, _ = run(method.tx, params, grads)
    chex.clear_trace_counter()

    @chex.assert_max_traces(n=1)
    def step(g, state, params):
        return method.tx.update(g, state, params)

    step = jax.jit(step, donate_argnums=(0, 1))
    state = method.tx.init(params)
    for g, want in zip(grads, expected, strict=True):
        old = jax.tree.leaves(state)
        updates, state = step(g, state, params)
        assert_close(updates, want)
        # A placeholder of one number passes through as it is.
        assert all(x.is_deleted() for x in old if x.size > 1)


def conditionals(jaxpr):
    """How many a GPU's host waits for: those that stand in no other's branch."""
    by_platform = {
        x for e in jaxpr.eqns if e.primitive.name == "platform_index" for x in e.outvars
    }
    count = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "cond":
            count += eqn.invars[0] not in by_platform
        else:
            count += sum(map(conditionals, core.jaxprs_in_params(eqn.params)))
    return count


def test_the_host_waits_for_one_conditional_a_step(method_or_alias):
    tx, params = method_or_alias.tx, example_params()
    step = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    of_window = method_or_alias.factory is lro.accumulate_gradients
    assert conditionals(step.jaxpr) <= 1 + of_window


def test_a_scan_of_1000_steps_learns(method_or_alias):
    method = method_or_alias
    start = example_params()

    def step(carry, _):
        params, state = carry
        updates, state = method.tx.update(params, state, params)
        size = 0.02 * (1 - optax.tree.get_all_with_path(state, "step")[0][1] / 1000)
        return (jax.tree.map(jnp.add, params, method.descend(updates, size)), state), 0

    @jax.jit
    def train(params):
        return jax.lax.scan(step, (params, method.tx.init(params)), length=1000)[0]

    params, state = train(start)
    assert_finite(state)
    assert int(optax.tree.get_all_with_path(state, "step")[0][1]) == 1000
    # Flora's random subspaces leave one leaf a fifth to a quarter of the way, depending
    # on how the compiler rounds.
    left = 0.4 if method.name == "flora" else 0.2
    for before, after in zip(
        jax.tree.leaves(start), jax.tree.leaves(params), strict=True
    ):
        assert norm(after) < left * norm(before)


def test_vmap_equals_a_loop(method):
    params = [one_of_each(), jax.tree.map(lambda x: x + 1, one_of_each())]
    grads = [random_grads(params[0], PERIOD + 1, seed) for seed in (1, 50)]
    expected = [run(method.tx, p, g)[0] for p, g in zip(params, grads, strict=True)]

    def stack(*trees):
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    stacked = stack(*params)
    state = jax.vmap(method.tx.init)(stacked)
    update = jax.jit(jax.vmap(method.tx.update))
    for t in range(PERIOD + 1):
        updates, state = update(stack(grads[0][t], grads[1][t]), state, stacked)
        assert_close(updates, stack(expected[0][t], expected[1][t]), atol=1e-5)


# Two aliases too, for the transformations that are theirs alone.
STACKED = ["galore_adafactor", "flora"] + [
    name
    for name in TRANSFORMATIONS
    if "matrices" in inspect.signature(BY_NAME[name].factory).parameters
]


@pytest.fixture
def one_key(monkeypatch):
    """Each matrix of a stack draws by a key of its own; here by that of a leaf alone.

    Compiled bodies know the one or the other.
    """
    monkeypatch.setattr(keys, "_placed", lambda key, _, of: jnp.broadcast_to(key, of))
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("name", STACKED)
def test_a_stacked_leaf_is_the_loop_over_its_slices(name, one_key):
    tx = BY_NAME[name].make(matrices=lro.MatrixAxes())
    params = random_like({"query": (3, 4, 6)}, seed=0)  # more layers than the rank
    grads = random_grads(params, PERIOD + 1)
    stacked, _ = run(tx, params, grads)
    for i in range(3):
        one, *of_one = (jax.tree.map(lambda x, i=i: x[i], t) for t in (params, *grads))
        alone, _ = run(tx, one, of_one)
        for u, want in zip(stacked, alone, strict=True):
            assert_close(u["query"][i], want["query"], rtol=1e-4, atol=1e-5)


def test_abstract_initialisation(method_or_alias):
    method = method_or_alias
    params = example_params()
    abstract = jax.eval_shape(method.tx.init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, method.tx.init(params))
    updates, new = jax.eval_shape(method.tx.update, params, abstract, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, abstract)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


def test_arrays_of_the_state_are_neither_empty_nor_shared(method):
    params = one_of_each()
    state = method.tx.init(params)
    for tree in (state, jax.jit(method.tx.update)(params, state, params)[1]):
        leaves = jax.tree.leaves(tree)
        assert all(x.size for x in leaves)
        buffers = {x.unsafe_buffer_pointer() for x in leaves}
        assert len(buffers) == len(leaves)


# Dtypes


def narrow(tree):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)


NARROW = {
    "bfloat16": narrow,
    "mixed": lambda tree: {k: narrow(x) if k == "up" else x for k, x in tree.items()},
}


@pytest.mark.parametrize("kind", NARROW)
def test_narrow_dtypes_in_and_out_float32_within(method, kind):
    params = NARROW[kind](one_of_each())
    grads = random_grads(params, 2)
    updates, state = run(method.tx, params, grads)
    dtypes = {x.dtype for x in jax.tree.leaves(state)}
    assert dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}

    def wide(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    expected, _ = run(method.tx, wide(params), [wide(g) for g in grads])
    for u, want in zip(updates, expected, strict=True):
        chex.assert_trees_all_equal_shapes_and_dtypes(u, params)
        # The same arithmetic, rounded to eight bits at its end, once in each part of a
        # chain.
        assert_close(wide(u), want, rtol=2**-7)


@pytest.mark.parametrize("kind", NARROW)
def test_the_state_keeps_its_types_under_cond(method_or_alias, kind):
    method = method_or_alias
    params = NARROW[kind](example_params())
    state = method.tx.init(params)

    def update_if(wanted, grads, state):
        return jax.lax.cond(
            wanted,
            lambda: method.tx.update(grads, state, params),
            lambda: (grads, state),
        )

    # The branches of a cond must have equal types, or tracing fails.
    _, new = jax.eval_shape(update_if, True, params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


# Adversarial gradients


BAD = {
    "zero": lambda g: jnp.zeros_like(g),
    "nan": lambda g: g.at[1, 2].set(jnp.nan),
    "inf": lambda g: g.at[1, 2].set(-jnp.inf),
    "rank 1": lambda g: jnp.outer(g[:, 0], g[1]),
    "huge": lambda g: 1e30 * g,
    "tiny": lambda g: 1e-30 * g,
}


@pytest.mark.parametrize("when", [0, PERIOD])
def test_a_bad_gradient_of_a_matrix_leaves_a_usable_state(method, when):
    params = example_params()
    for kind, spoil in BAD.items():
        grads = random_grads(params, when + 1)
        grads[when]["up"]["kernel"] = spoil(grads[when]["up"]["kernel"])
        updates, state = run(method.tx, params, grads)
        assert_finite(state)
        if kind in ("zero", "rank 1", "tiny"):
            assert_finite(updates)
        after, state = descend(method, params, state, 60)
        assert_finite(state)
        for name in ("up", "down", "embed"):
            # A huge gradient stays in second moments for long, as it does in Adam's.
            if kind != "huge" or name != "up":
                assert norm(after[name]) < 0.9 * norm(params[name]), (kind, name)


def test_after_apply_if_finite_a_bad_step_never_was(method):
    params = one_of_each()
    grads = random_grads(params, 3)
    bad = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), grads[0])
    expected, last = run(method.tx, params, grads)
    tx = optax.apply_if_finite(method.tx, max_consecutive_errors=5)
    updates, state = run(tx, params, [bad, grads[0], bad, *grads[1:]])
    for i in (0, 2):
        assert_close(updates[i], jax.tree.map(jnp.zeros_like, params))
    assert_close([updates[i] for i in (1, 3, 4)], expected)
    assert_close(state.inner_state, last)


# Trees and shapes


def test_matrices_smaller_than_the_rank(method):
    # With one row, a random basis is one number. Some are so small that APOLLO's step,
    # which they divide, is huge: not with this key.
    changes = {"key": 2, "rank": 4} if "rank" in method.kwargs else {}
    if "codecs" in method.kwargs:
        changes = {"codecs": {"mu": lro.LowRank(4)}}
    if "matrices" in inspect.signature(method.factory).parameters:
        changes |= {"matrices": lro.MatrixAxes()}  # else they stay at full rank
    changes |= {k: GALORE_OF_ALL for k, x in method.kwargs.items() if x is GALORE}
    tx = method.make(**changes)
    update = jax.jit(tx.update)
    shapes = {"row": (1, 5), "column": (5, 1), "number": (1, 1), "small": (2, 3)}
    start = params = random_like(shapes, seed=3)
    state = tx.init(params)
    for _ in range(60):
        updates, state = update(params, state, params)
        params = jax.tree.map(jnp.add, params, method.descend(updates, 0.02))
    assert_finite(state)
    for name in shapes:
        assert norm(params[name]) < 0.8 * norm(start[name])


@pytest.mark.parametrize("empty", [{}, (), {"a": {}, "b": None}], ids=str)
def test_an_empty_tree(method_or_alias, empty):
    method = method_or_alias
    state = method.tx.init(empty)
    updates, new = method.tx.update(empty, state, empty)
    assert updates == empty
    chex.assert_trees_all_equal_structs(new, state)


def test_a_tree_without_matrices_gets_the_dense_optimizer(method):
    params = random_like({"bias": (3,), "scalar": (), "embed": {"table": (5, 4)}}, 0)
    grads = random_grads(params, 3)
    updates, _ = run(method.tx, params, grads)
    expected, _ = run(method.dense, params, grads)
    assert_close(updates, expected)


def test_leaves_that_are_not_matrices_get_the_dense_optimizer(method_or_alias):
    method = method_or_alias
    params = example_params()
    grads = random_grads(params, 2 * PERIOD)
    updates, _ = run(method.tx, params, grads)
    expected, _ = run(method.dense, params, grads)
    same = []
    for u, want in zip(updates, expected, strict=True):
        assert_close(u["embed"], want["embed"])
        assert_close(u["up"]["bias"], want["up"]["bias"])
        same.append(np.allclose(u["up"]["kernel"], want["up"]["kernel"], rtol=1e-2))
    assert all(same) == method.elementwise  # else matrices get something else


def test_placeholders_do_not_matter(method):
    params = one_of_each()
    grads = random_grads(params, 2)
    holes = {"frozen": optax.MaskedNode(), "none": None}
    updates, _ = run(method.tx, params | holes, [g | holes for g in grads])
    expected, _ = run(method.tx, params, grads)
    assert all(u["none"] is None for u in updates)
    assert all(isinstance(u["frozen"], optax.MaskedNode) for u in updates)
    assert_close([{k: u[k] for k in params} for u in updates], expected)


# Optax's wrappers


def test_chain(method):
    params = one_of_each()
    grads = random_grads(params, 2)
    tx = optax.chain(optax.clip_by_global_norm(1.0), method.tx, optax.scale(-0.1))
    updates, _ = run(tx, params, grads)
    clipped = [jax.tree.map(lambda x, g=g: x / norm(g), g) for g in grads]
    expected, _ = run(method.tx, params, clipped)
    assert_close(updates, jax.tree.map(lambda u: -0.1 * u, expected))


def test_masked(method):
    params = example_params()
    grads = random_grads(params, PERIOD + 1)
    mask = {"up": True, "down": False, "embed": False}
    updates, _ = run(optax.masked(method.tx, mask), params, grads)
    part = {"up": params["up"]}
    expected, _ = run(method.tx, part, [{"up": g["up"]} for g in grads])
    for u, g, want in zip(updates, grads, expected, strict=True):
        assert_close(u, g | want)


def test_partition(method):
    params = example_params()
    grads = random_grads(params, PERIOD + 1)
    labels = {"up": "low", "down": "plain", "embed": "plain"}
    tx = optax.partition({"low": method.tx, "plain": optax.sgd(0.5)}, labels)
    updates, _ = run(tx, params, grads)
    part = {"up": params["up"]}
    expected, _ = run(method.tx, part, [{"up": g["up"]} for g in grads])
    for u, g, want in zip(updates, grads, expected, strict=True):
        assert_close(u, jax.tree.map(lambda x: -0.5 * x, g) | want)


def test_inject_hyperparams_equals_the_plain_method(method_or_alias):
    method = method_or_alias
    params = one_of_each()
    grads = random_grads(params, PERIOD + 1)
    tx = lro.inject_hyperparams(method.factory)(**method.kwargs)
    updates, state = run(tx, params, grads)
    expected, _ = run(method.tx, params, grads)
    # 1 - b2 loses half of its digits in float32, in which it now is.
    assert_close(updates, expected, rtol=2e-4, atol=1e-5)
    numbers = {k for k, v in method.kwargs.items() if isinstance(v, float)}
    assert numbers | {"update_every"} & set(method.kwargs) <= set(state.hyperparams)
    assert "rank" not in state.hyperparams


# The reference form of Fira scales its residual by another function of the scale.
SCALED = [
    m.name
    for m in METHODS
    if "update_every" in m.kwargs and "reference" not in m.kwargs
]


@pytest.mark.parametrize("name", SCALED)
def test_a_schedule_for_the_scale(name):
    method, params = BY_NAME[name], one_of_each()
    grads = random_grads(params, PERIOD + 1)

    def schedule(count):
        return 0.5 * (count + 1)

    tx = lro.inject_hyperparams(method.factory)(**method.kwargs | {"scale": schedule})
    updates, _ = run(tx, params, grads)
    expected, _ = run(method.make(scale=1.0), params, grads)
    unscaled, _ = run(method.make(scale=0.0), params, grads)  # what a recovery adds
    for t, (u, want, rest) in enumerate(zip(updates, expected, unscaled, strict=True)):
        one, zero = want["up"]["kernel"], rest["up"]["kernel"]
        wanted = zero + schedule(t) * (one - zero)
        assert_close(u["up"]["kernel"], wanted, rtol=2e-4, atol=1e-5)
        assert_close(u["embed"], want["embed"], rtol=2e-4, atol=1e-5)


def test_a_schedule_must_be_injected():
    def schedule(count):
        return 0.5 * (count + 1)

    for name in SCALED:
        for argument in ("scale", "update_every"):
            match = f"`{argument}` must be a number.*inject_hyperparams.*{argument}="
            with pytest.raises(TypeError, match=match):
                BY_NAME[name].make(**{argument: schedule})


@pytest.mark.parametrize("name", [m.name for m in METHODS if m.is_optimizer])
@pytest.mark.parametrize("injected", [True, False])
def test_a_schedule_for_the_learning_rate(name, injected):
    method, params = BY_NAME[name], one_of_each()
    grads = random_grads(params, PERIOD + 1)

    factory = method.factory
    if injected:
        factory = lro.inject_hyperparams(factory)
    schedules = {
        name: lambda count, rate=rate: rate * (count + 1)
        for name, rate in method.kwargs.items()
        if name.endswith("learning_rate")
    }
    tx = factory(**method.kwargs | schedules)
    updates, _ = run(tx, params, grads)
    expected, _ = run(method.tx, params, grads)
    for t, (u, want) in enumerate(zip(updates, expected, strict=True)):
        wanted = jax.tree.map(lambda x, t=t: (t + 1) * x, want)
        assert_close(u, wanted, rtol=2e-4, atol=1e-5)


def test_multi_steps_equals_the_whole_batch(method):
    params = one_of_each()
    whole = random_grads(params, 2)
    halves = random_grads(params, 2, seed=70)
    grads = []
    for g, h in zip(whole, halves, strict=True):
        grads += [jax.tree.map(jnp.add, g, h), jax.tree.map(jnp.subtract, g, h)]
    tx = optax.MultiSteps(method.tx, every_k_schedule=2)
    updates, _ = run(tx.gradient_transformation(), params, grads)
    expected, _ = run(method.tx, params, whole)
    assert_close(updates[1::2], expected, rtol=1e-4, atol=1e-5)
    assert_close(updates[::2], [jax.tree.map(jnp.zeros_like, params)] * 2)


def test_map_params_finds_each_parameter(method_or_alias):
    method = method_or_alias
    params = example_params()
    state = method.tx.init(params)
    names = jax.tree_util.tree_map_with_path(
        lambda k, _: jax.tree_util.keystr(k), params
    )

    def is_tuple(x):
        return isinstance(x, tuple)

    labelled = optax.tree.map_params(
        method.tx, lambda _, name: name, state, names, is_leaf=is_tuple
    )
    for field in method.moments:
        # Each half of `two_rates` has a field of the name.
        found = optax.tree.get_all_with_path(labelled, field)
        assert found and all(x == names for _, x in found)
    same = optax.tree.map_params(method.tx, lambda x: x, state, is_leaf=is_tuple)
    chex.assert_trees_all_equal(same, state)


def test_extra_arguments_are_accepted(method):
    params = one_of_each()
    state = method.tx.init(params)
    update = jax.jit(method.tx.update)
    updates, _ = update(params, state, params, value=1.0, unknown=None)
    assert_close(updates, update(params, state, params)[0])


@pytest.mark.parametrize("name", [m.name for m in METHODS if "inner" in m.kwargs])
def test_extra_arguments_reach_the_inner_optimizer(name):
    method, params = BY_NAME[name], one_of_each()

    def times_value(updates, state, params=None, *, value, **_):
        return jax.tree.map(lambda u: value * u, updates), state

    def with_value(inner):
        last = optax.GradientTransformationExtraArgs(
            lambda _: optax.EmptyState(), times_value
        )
        return optax.chain(inner, last)

    tx = method.make(inner=with_value(method.kwargs["inner"]))
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params, value=3.0)
    expected, _ = jax.jit(method.tx.update)(params, method.tx.init(params), params)
    assert_close(updates, jax.tree.map(lambda u: 3 * u, expected))


# Flax NNX


def test_nnx_optimizer(method):
    model = Model()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    grads = random_grads(params, 2)
    updates, last = run(method.tx, params, grads)
    for u in updates:
        params = optax.apply_updates(params, u)

    optimizer = nnx.Optimizer(model, method.tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, grads):
        optimizer.update(model, grads)

    for g in grads:
        into = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(into, g)
        step(model, optimizer, into)
    assert_close(
        nnx.to_pure_dict(nnx.state(model, nnx.Param)), params, rtol=1e-4, atol=1e-5
    )
    kept = nnx.as_pure(optimizer.opt_state)
    assert_close(jax.tree.leaves(kept), jax.tree.leaves(last), rtol=1e-4, atol=1e-5)


# Orbax


def test_a_run_resumed_from_a_checkpoint_is_the_uninterrupted_run(method, tmp_path):
    params = one_of_each()
    grads = random_grads(params, PERIOD + 3)
    _, state = run(method.tx, params, grads[:2])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(method.tx.init, params)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    chex.assert_trees_all_equal(restored, state)
    resumed, last = run(method.tx, params, grads[2:], restored)
    expected, uninterrupted = run(method.tx, params, grads)
    chex.assert_trees_all_equal(resumed, expected[2:])
    chex.assert_trees_all_equal(last, uninterrupted)
