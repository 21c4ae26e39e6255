"""What is not fit for an update: an error that says what, or the update without it."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from registry import METHODS, PERIOD, example_params
from running import assert_close, random_grads, random_like

import lowrank_optax as lro

BY_NAME = {method.name: method for method in METHODS}


# Calls are checked in these, whatever chain they stand in: an optimizer is one of them
# in a chain of Optax's.
TRANSFORMATIONS = [m.name for m in METHODS if not m.is_alias]


@pytest.fixture(params=TRANSFORMATIONS)
def method(request):
    return BY_NAME[request.param]


def make(tx, params):
    """A state of zeros: what is looked at here are shapes."""
    shapes = jax.eval_shape(tx.init, params)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


# Gradients


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_where_there_is_no_gradient_nothing_happens(name):
    tx, moments = BY_NAME[name].tx, BY_NAME[name].moments
    params = example_params()
    grads = random_grads(params, 1)[0]
    state = tx.init(params)
    some = {**grads, "down": None, "embed": None}
    # Weights may hold what is no array there, as a whole Equinox model does.
    whole = params | {"embed": jax.nn.relu}
    updates, new = jax.jit(lambda g, state: tx.update(g, state, whole))(some, state)
    assert updates.pop("embed") is None and updates.pop("down") is None
    part, given = {"up": params["up"]}, {"up": grads["up"]}
    want, last = jax.jit(tx.update)(given, tx.init(part), part)
    assert_close(updates, want)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    for field in moments:
        # Each half of `two_rates` has a field of the name.
        trees = (
            [x for _, x in optax.tree.get_all_with_path(s, field)]
            for s in (state, new, last)
        )
        for before, after, own in zip(*trees, strict=True):
            assert_close(after, {**before, "up": own["up"]})


def test_a_hole_keeps_the_types_of_the_state(method):
    params = example_params()
    state = jax.eval_shape(method.tx.init, params)
    for hole in ({"up": None}, {"down": {"kernel": None}, "embed": {"table": None}}):
        grads = params | hole
        updates, new = jax.eval_shape(method.tx.update, grads, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


def test_matrices_stay_what_they_are_beside_what_has_no_gradient():
    # Queries tell the axes of the output.
    params = random_like({"query": {"kernel": (32, 4, 8)}, "out": (4, 8, 32)}, 0)
    part = {"query": None, "out": params["out"]}
    for name in TRANSFORMATIONS:
        tx = BY_NAME[name].tx
        state = jax.eval_shape(tx.init, params)
        updates, new = jax.eval_shape(tx.update, part, state, params)
        assert updates["query"] is None and updates["out"].shape == (4, 8, 32)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


def test_a_gradient_of_another_shape_is_refused_by_its_path(method):
    params = example_params()
    state = make(method.tx, params)
    for leaf, shape in ((("up", "kernel"), (4, 7)), (("up", "bias"), (1,))):
        grads = example_params()
        grads[leaf[0]][leaf[1]] = jnp.ones(shape)
        match = rf"'up/{leaf[1]}' of shape .* by a gradient of shape \({shape[0]},"
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(method.tx.update, grads, state, params)
    with pytest.raises(ValueError, match="parameters alone has 'up/bias'.*give None"):
        jax.eval_shape(
            method.tx.update, params | {"up": {"kernel": grads}}, state, params
        )


def test_only_arrays_can_be_optimized(method):
    params = example_params()
    looks = (lro.describe, lro.state_bytes, lro.memory_report)
    asked = [method.tx.init] + [functools.partial(look, method.tx) for look in looks]
    for other in (1.0, "name", jax.nn.relu, jax.random.key(0)):
        for ask in asked:
            with pytest.raises(TypeError, match="'up/bias'.*must be an array"):
                ask(params | {"up": params["up"] | {"bias": other}})
    grads = params | {"embed": {"table": 0.0}}
    with pytest.raises(
        TypeError, match="'embed/table'.*must be an array of numbers, got 0.0"
    ):
        method.tx.update(grads, make(method.tx, params), params)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_matrices_without_numbers_change_nothing(name):
    tx, params = BY_NAME[name].tx, example_params()
    empty = {k: jnp.zeros(s) for k, s in (("a", (0, 6)), ("b", (4, 0)), ("c", (0, 0)))}
    update, both = jax.jit(tx.update), params | empty
    updates, state = update(both, tx.init(both), both)
    assert all(updates.pop(k).shape == x.shape for k, x in empty.items())
    assert_close(updates, update(params, tx.init(params), params)[0])
    chex.assert_tree_all_finite(state)


# States

RANKED = [
    (name, rank)
    for name in TRANSFORMATIONS
    for rank in ("rank", "max_rank")
    if rank in BY_NAME[name].kwargs
]


@pytest.mark.parametrize(("name", "rank"), RANKED)
@pytest.mark.parametrize(("made", "used"), [(2, 4), (4, 2)])
def test_a_state_of_another_rank_is_refused(name, rank, made, used):
    params = random_like({"up": {"kernel": (8, 12)}, "bias": (3,)}, 0)
    old, new = (BY_NAME[name].make(**{rank: r}) for r in (made, used))
    state = make(old, params)
    fields = "basis|mu|nu|trace|ema"
    match = rf"'up/kernel' .*'.*({fields}).*' has shape \(.*\b{made}\b.*\), and must"
    match += rf" have \(.*\b{used}\b.*\).*shrink"
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(new.update, params, state, params)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_state_that_was_cast_with_the_parameters_is_refused(name):
    params, tx = example_params(), BY_NAME[name].tx

    def cast(x):
        return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x

    state = jax.tree.map(cast, make(tx, params))
    match = "parameter '.*' with .*'.*' is in bfloat16, and must be in float32.*cast"
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(tx.update, params, state, params)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_state_of_another_method_is_refused(name):
    params = example_params()
    state = make(optax.contrib.schedule_free_adamw(0.1), params)
    with pytest.raises(ValueError, match="state of another transformation.*tx.init"):
        jax.eval_shape(BY_NAME[name].tx.update, params, state, params)


def test_a_shrunk_state_asks_for_the_transformation_that_fits():
    params = random_like({"w": (8, 12)}, 0)
    params["w"] = params["w"][:, :1] * jnp.ones((1, 12))  # of rank 1
    tx = lro.adaptive_rank(optax.scale_by_adam(), max_rank=4)
    _, state = tx.update(params, tx.init(params), params)
    new, cut = lro.rank.shrink(tx, state, params, multiple_of=2)
    assert cut.basis["w"].shape == (12, 2)
    want = new.update(params, cut, params)
    with pytest.raises(ValueError, match="'w'.*'basis'.*rank.fit"):
        tx.update(params, cut, params)
    for again in (
        lro.rank.fit(tx, cut),
        lro.rank.shrink(tx, cut, params, multiple_of=8)[0],
    ):
        chex.assert_trees_all_equal(again.update(params, cut, params), want)
        chex.assert_trees_all_equal_shapes_and_dtypes(again.init(params), cut)


# Numbers of other widths


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_under_64_bits_every_type_stays(method, dtype):
    # Of these shapes and names, residuals and codes have states too.
    shapes = {"q_proj": (6, 8), "tall": (4096, 6), "bias": (6,), "embed": (5, 4)}
    with jax.enable_x64(True):
        params = {k: jax.ShapeDtypeStruct(s, dtype) for k, s in shapes.items()}
        tx = method.make()
        state = jax.eval_shape(tx.init, params)
        updates, new = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.parametrize("name", [m.name for m in METHODS if "inner" in m.kwargs])
def test_narrow_moments_stay_narrow_and_are_carried_in_float32(name):
    method, params = BY_NAME[name], example_params()
    if method.moments != ("mu", "nu"):
        inner = optax.trace(0.9, accumulator_dtype=jnp.bfloat16)
    else:
        inner = optax.scale_by_adam(mu_dtype=jnp.bfloat16)
    tx = method.make(inner=inner)
    state = tx.init(params)
    updates, new = jax.eval_shape(tx.update, params, state, params)
    assert any(x.dtype == "bfloat16" for x in jax.tree.leaves(new))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


# The end of what is counted


def last_steps(state):
    """The state as if all that counts updates were about to end."""

    def late(path, x):
        name = getattr(path[-1], "name", "")
        counts = x.dtype == jnp.int32 and name in ("step", "count")
        return jnp.full_like(x, 2**31 - 2) if counts else x

    return jax.tree_util.tree_map_with_path(late, state)


PERIODIC = [n for n in TRANSFORMATIONS if "update_every" in BY_NAME[n].kwargs]


@pytest.mark.parametrize("name", PERIODIC)
def test_refreshes_go_on_after_the_largest_step(name):
    tx, params = BY_NAME[name].tx, example_params()
    update, state = jax.jit(tx.update), tx.init(params)
    bases = []
    for t, g in enumerate(random_grads(params, 3 * PERIOD)):
        state = last_steps(state) if t == 1 else state
        _, state = update(g, state, params)
        trees = [x for _, x in optax.tree.get_all_with_path(state, "basis")]
        found = [x["up"]["kernel"] for x in trees]
        # Of `two_rates`, one half has the matrices.
        (basis,) = (x for x in found if not isinstance(x, optax.MaskedNode))
        bases.append(basis)
    later = bases[PERIOD:]
    changes = sum(bool(jnp.any(x != y)) for x, y in zip(later, later[1:], strict=False))
    assert changes in (1, 2)  # one period in which the count starts anew
    assert not any(jnp.any(x < 0) for x in jax.tree.leaves(state) if x.dtype == "int32")


def test_the_age_of_a_residual_does_not_wrap():
    params = {"q_proj": random_like({"w": (6, 8)}, 0)["w"]}
    tx = BY_NAME["galore_plus_project"].tx
    state = tx.init(params)
    kept = state.recovery["q_proj"]._replace(age=jnp.int32(2**31 - 1))
    updates, new = tx.update(params, state._replace(recovery={"q_proj": kept}), params)
    assert new.recovery["q_proj"].age == 2**31 - 1
    chex.assert_tree_all_finite(updates)


# Generators of random numbers


KEYED = [
    name
    for name in TRANSFORMATIONS
    if {"matrices", "key"} <= set(inspect.signature(BY_NAME[name].factory).parameters)
]


@pytest.mark.parametrize("name", KEYED)
def test_keys_of_any_kind_draw_for_stacks(name):
    params = random_like({"w": (3, 4, 6), "stacks": (2, 3, 4, 6)}, 0)

    def update(key):
        tx = BY_NAME[name].make(matrices=lro.MatrixAxes(), key=key)
        return tx.update(params, tx.init(params), params)

    want = jax.eval_shape(update, jax.random.key(0))
    for key in (jax.random.PRNGKey(0), jax.random.key(0, impl="unsafe_rbg")):
        assert jax.eval_shape(update, key) == want


def test_seeds_do_not_depend_on_the_default_generator():
    def bases(key):
        tx = lro.golore_project(
            optax.identity(), rank=2, switch_step=0, key=key, matrices=lro.MatrixAxes()
        )
        params = random_like({"w": (3, 4, 6)}, 0)
        return tx.update(params, tx.init(params), params)[1].basis["w"]

    want = bases(0)
    chex.assert_trees_all_equal(bases(jax.random.PRNGKey(0)), want)
    with jax.default_prng_impl("unsafe_rbg"):
        chex.assert_trees_all_equal(bases(0), want)
    one, other = (bases(jax.random.key(i, impl="unsafe_rbg")) for i in range(2))
    for x, y in ((one[0], one[1]), (one, other)):
        assert not jnp.allclose(x, y)


# Numbers of other kinds


def assert_kept(method, params):
    """An update by shapes alone, of what an update by arrays then must be."""
    state = jax.eval_shape(method.tx.init, params)
    updates, new = jax.eval_shape(method.tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    assert {k: x.dtype for k, x in updates.items()} == {
        k: x.dtype for k, x in params.items()
    }
    return state


def test_floats_of_eight_bits(method):
    dtype = "float8_e4m3fn"
    shapes = {"q_proj": (6, 8), "bias": (6,), "embed": (5, 4)}
    params = {k: jax.ShapeDtypeStruct(s, dtype) for k, s in shapes.items()}
    state = assert_kept(method, params)
    assert {x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim > 1} <= {4}
    table = lro.describe(method.tx, params)
    assert {row.dtype for row in table} == {dtype}
    assert lro.state_bytes(method.tx, params) > 0


def test_floats_of_eight_bits_move_as_those_of_sixteen():
    tx = BY_NAME["galore_adamw"].tx
    params = {"w": jnp.round(random_like({"w": (4, 6)}, 0)["w"] * 4) / 4}
    found = []
    for dtype in (jnp.float8_e4m3fn, jnp.bfloat16):
        own = jax.tree.map(lambda x, d=dtype: x.astype(d), params)
        updates, _ = tx.update(own, tx.init(own), own)
        found.append(updates["w"].astype(jnp.float32))
    assert_close(*found, rtol=2**-3, atol=2**-9)  # the smallest number


NUMBERS = {"ids": jnp.arange(24).reshape(4, 6), "on": jnp.ones(3, bool)}


def test_integers_and_booleans_keep_their_types(method):
    assert_kept(method, random_like({"w": (6, 8), "bias": (6,)}, 0) | NUMBERS)


@pytest.mark.parametrize("name", ["galore_project", "accumulate_gradients"])
def test_integers_and_booleans_do_not_move(name):
    tx, params = BY_NAME[name].tx, example_params()
    both = params | NUMBERS

    def loss(params):
        return sum(jnp.sum(x * x) for x in jax.tree.leaves(params) if x.dtype == "f4")

    grads = jax.grad(loss, allow_int=True)(both)  # of a type of its own where int
    want, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
    for given in (grads, grads | NUMBERS):
        updates, _ = tx.update(given, tx.init(both), both)
        new = optax.apply_updates(both, updates)
        chex.assert_trees_all_equal({k: new[k] for k in NUMBERS}, NUMBERS)
        assert_close({k: updates[k] for k in params}, want)


def test_an_integer_is_no_gradient_of_a_float(method):
    params = random_like({"w": (6, 8), "bias": (6,)}, 0)
    grads = params | {"bias": jnp.arange(6)}
    state = jax.eval_shape(method.tx.init, params)
    with pytest.raises(TypeError, match="'bias' of dtype float32 by .* dtype int32"):
        jax.eval_shape(method.tx.update, grads, state, params)


# Adam-mini has blocks of real numbers, and refuses others by their path.
COMPLEX = [name for name in TRANSFORMATIONS if "adam_mini" not in name]


@pytest.mark.parametrize("name", COMPLEX)
def test_a_complex_gradient_turned_turns_its_update(name):
    method, turn = BY_NAME[name], jnp.exp(0.7j).astype(jnp.complex64)
    parts = random_like({"re": (4, 6), "im": (4, 6)}, 0)
    params = {"c": parts["re"] + 1j * parts["im"]}
    state = method.tx.init(params)
    one, new = method.tx.update(params, state, params)
    other, _ = method.tx.update({"c": turn * params["c"]}, state, params)
    if "lion" not in name:  # the sign of a complex number is not Lion's
        assert_close(other["c"], turn * one["c"])
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


# Traces


def test_nothing_keeps_what_was_traced(method):
    params = example_params()
    with jax.checking_leaks():
        tx = method.make()
        lro.describe(tx, params)
        state = tx.init(params)
        jax.eval_shape(tx.update, params, state, params)
        lro.rank.shrink(tx, state, params)
        lro.diagnostics.state_metrics(state)


# Derivatives


def after_two_updates(method, params):
    def loss(params):
        return sum(jnp.sum(jnp.tanh(x) ** 2) for x in jax.tree.leaves(params))

    state = method.tx.init(params)
    for _ in range(2):
        updates, state = method.tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, method.descend(updates, 0.1))
    return loss(params)


def test_updates_have_derivatives_in_reverse_mode(method):
    derivative = jax.jit(jax.grad(lambda p: after_two_updates(method, p)))
    for seed in range(6):
        params = random_like({"w": (4, 6), "bias": (6,)}, seed)
        grads = derivative(params)
        chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
        chex.assert_tree_all_finite(grads)


@pytest.mark.parametrize("name", ["galore_project-trace", "mlorc_compress"])
def test_derivatives_are_those_of_differences(name):
    params, along = (random_like({"w": (4, 6), "bias": (6,)}, i) for i in (0, 1))

    @jax.jit
    def at(t):
        moved = jax.tree.map(lambda x, d: x + t * d, params, along)
        return after_two_updates(BY_NAME[name], moved)

    want = (at(1e-2) - at(-1e-2)) / 2e-2
    assert_close(jax.grad(at)(0.0), want, rtol=2e-2)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_traced_parameter_is_not_asked_where_it_lies(name, monkeypatch):
    """JAX answers by an error, for whose text it searches the whole program."""
    asked = []

    def init(params):
        traced = type(jax.tree.leaves(params)[0])
        monkeypatch.setattr(traced, "sharding", property(asked.append), raising=False)
        return BY_NAME[name].tx.init(params)

    jax.eval_shape(init, example_params())
    assert not asked
