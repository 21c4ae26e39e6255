"""Two rates are the partition that one would write by hand."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from registry import METHODS, PERIOD, example_params, one_of_each
from running import assert_close, random_grads, random_like, run
from test_default_matrices import MODELS, tree_of

import lowrank_optax as lro

OPTAX = {
    "adamw": (optax.adamw, {"learning_rate": 0.02}),
    "lion": (optax.lion, {"learning_rate": 0.02}),
    "sgd": (optax.sgd, {"learning_rate": 0.02}),
}
FACTORIES = OPTAX | {m.name: (m.factory, m.kwargs) for m in METHODS if m.is_alias}
LABELS = {
    "up": {"kernel": "low", "bias": "rest"},
    "embed": {"table": "rest"},
}


@pytest.mark.parametrize("name", FACTORIES)
def test_equals_a_partition_written_by_hand(name):
    factory, kwargs = FACTORIES[name]
    low, rest = {"learning_rate": 0.02}, {"learning_rate": 0.05}
    if "weight_decay" in inspect.signature(factory).parameters:
        low, rest = low | {"weight_decay": 0.1}, rest | {"weight_decay": 0.3}
    dense = {f"dense_{k}": x for k, x in rest.items()}
    both = {
        "ours": lro.two_rates(factory)(**kwargs | low, **dense),
        "by hand": optax.partition(
            {"low": factory(**kwargs | low), "rest": factory(**kwargs | rest)}, LABELS
        ),
    }
    tx = optax.GradientTransformation(
        lambda params: {k: tx.init(params["p"]) for k, tx in both.items()},
        lambda grads, state, params: ({}, {}),
    )

    def update(grads, state, params):
        found = {
            k: tx.update(grads["p"], state[k], params["p"]) for k, tx in both.items()
        }
        return {k: x for k, (x, _) in found.items()}, {
            k: x for k, (_, x) in found.items()
        }

    params = {"p": one_of_each()}
    grads = random_grads(params, 2)
    updates, state = run(tx._replace(update=update), params, grads)
    for u in updates:
        assert_close(u["ours"], u["by hand"])
    ours, by_hand = (jax.tree.leaves(state[k]) for k in both)
    assert sorted(x.size for x in ours) == sorted(x.size for x in by_hand)


@pytest.mark.filterwarnings("ignore:Kept at full rank")
@pytest.mark.filterwarnings("ignore:No name tells")
@pytest.mark.parametrize("name", MODELS)
def test_every_leaf_is_what_it_is_for_the_method_alone(name):
    """Though each instance sees a part: a bias is told by the kernel beside it."""
    params = tree_of(MODELS[name])
    alone = lro.galore_adamw(1e-2, 4)
    tx = lro.two_rates(lro.galore_adamw)(1e-2, 4, dense_learning_rate=3e-2)
    assert lro.describe(tx, params) == lro.describe(alone, params)
    both = jax.eval_shape(lro.two_rates(optax.adamw)(1e-2).init, params)
    mu = optax.tree.get(both.inner_states["matrices"], "mu")
    is_left_out = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    seen = jax.tree.map(lambda x: not is_left_out(x), mu, is_leaf=is_left_out)
    rule = lro.default_matrices(params)
    wanted = jax.tree.map(lambda x: x is not None, rule, is_leaf=lambda x: x is None)
    assert jax.tree.leaves(seen) == jax.tree.leaves(wanted)


# Of Haiku: nothing but the kernel tells that `b` is a bias.
HAIKU = {"query": {"w": (16, 2, 4), "b": (2, 4)}}


@pytest.mark.parametrize("factory", [lro.galore_adamw, lro.mlorc_adamw, lro.ldadamw])
def test_a_bias_of_two_axes_has_the_rate_and_the_state_of_a_bias(factory):
    params = jax.tree.map(jnp.ones, HAIKU, is_leaf=lambda x: isinstance(x, tuple))
    tx = lro.two_rates(factory)(1e-3, 1, dense_learning_rate=1.0)
    (bias, kernel) = lro.describe(tx, params)
    assert bias.view is None and kernel.view
    updates, _ = run(tx, params, random_grads(params, 1))
    sizes = jax.tree.map(lambda u: float(jnp.max(jnp.abs(u))), updates[0])["query"]
    assert sizes["b"] > 0.9 and sizes["w"] < 0.1


def test_by_default_both_rates_are_one():
    params, plain = example_params(), lro.galore_adamw(0.02, 2, weight_decay=0.1)
    tx = lro.two_rates(lro.galore_adamw)(0.02, 2, weight_decay=0.1)
    grads = random_grads(params, 2)
    assert_close(run(tx, params, grads)[0], run(plain, params, grads)[0])


def test_a_factory_without_matrices_takes_them():
    params = example_params()
    tx = lro.two_rates(optax.sgd)(
        1.0, dense_learning_rate=2.0, matrices=lro.matrix_rules({"down": None})
    )
    updates, _ = tx.update(params, tx.init(params), params)
    sizes = {"up": {"kernel": -1, "bias": -2}, "down": {"kernel": -2}}
    sizes["embed"] = {"table": -2}
    assert_close(updates, jax.tree.map(lambda s, x: s * x, sizes, params))


def test_a_factory_of_any_arguments_is_given_the_matrices():
    def factory(learning_rate, **kwargs):
        return lro.galore_adamw(learning_rate, **kwargs)

    params = random_like({"w": (16, 24), "v": (16, 24)}, 0)
    given = {"rank": 4, "matrices": {"w": None, "v": lro.MatrixAxes()}}
    found = [
        run(
            lro.two_rates(make)(0.01, dense_learning_rate=0.1, **given),
            params,
            random_grads(params, 2),
        )
        for make in (factory, lro.galore_adamw)
    ]
    assert_close(*found)
    with pytest.raises(TypeError, match="unexpected keyword argument 'matrices'"):
        lro.two_rates(lambda learning_rate, **kw: optax.sgd(learning_rate, **kw))(
            0.1, matrices=lro.MatrixAxes()
        )


def test_both_rates_and_decays_are_state_where_they_are_injected():
    tx = lro.inject_hyperparams(lro.two_rates(lro.galore_adamw))(
        learning_rate=0.1,
        rank=2,
        dense_learning_rate=lambda count: 0.5**count,
        dense_weight_decay=0.3,
    )
    params = example_params()
    state = tx.init(params)
    assert float(state.hyperparams["dense_weight_decay"]) == pytest.approx(0.3)
    assert "rank" not in state.hyperparams
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    updates, state = jax.jit(tx.update)(params, state, params)
    assert_close(updates["up"]["kernel"], jnp.zeros((4, 6)))
    assert float(jnp.max(jnp.abs(updates["embed"]["table"]))) > 0.5
    updates, state = jax.jit(tx.update)(params, state, params)
    assert float(state.hyperparams["dense_learning_rate"]) == 0.5


def test_what_is_not_there_has_no_gradient_in_either_half():
    params = example_params()
    tx = lro.two_rates(lro.galore_adamw)(0.1, 2, dense_learning_rate=0.2)
    state = tx.init(params)
    holes = params | {"up": {"kernel": None, "bias": None}}
    updates, after = tx.update(holes, state, params)
    assert updates["up"] == {"kernel": None, "bias": None}
    whole, _ = tx.update(params, state, params)
    assert_close(updates["down"], whole["down"])
    for group in ("matrices", "dense"):
        mu = optax.tree.get(after.inner_states[group], "mu")
        old = optax.tree.get(state.inner_states[group], "mu")
        assert_close(mu["up"], old["up"])


def test_state_is_placed_as_that_of_the_method_alone():
    mesh = AbstractMesh((4, 2), ("fsdp", "tp"))

    def leaf(shape, *spec):
        placed = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed)

    params = {"w": leaf((8, 12), "fsdp", "tp"), "embed": leaf((8, 4), "fsdp", None)}
    alone = lro.state_shardings(lro.galore_adamw(0.1, 2), params, mesh)
    tx = lro.two_rates(lro.galore_adamw)(0.1, 2)
    found = lro.state_shardings(tx, params, mesh)
    for group, name in (("matrices", "w"), ("dense", "embed")):
        for field in ("mu", "nu"):
            own = optax.tree.get(found.inner_states[group], field)[name]
            assert own.spec == optax.tree.get(alone, field)[name].spec


def test_unused_ranks_are_freed():
    params = {"w": jnp.ones((6, 8)), "b": jnp.ones(8)}  # ones are of rank 1
    tx = lro.two_rates(lro.adarankgrad_adamw)(0.1, 4, dense_learning_rate=0.2)
    _, state = tx.update(params, tx.init(params), params)
    smaller, cut = lro.rank.shrink(tx, state, params, multiple_of=2)
    basis = optax.tree.get(cut.inner_states["matrices"], "basis")
    assert basis["w"].shape == (8, 2)
    updates, _ = smaller.update(params, cut, params)
    assert_close(updates, tx.update(params, state, params)[0])


def test_what_has_no_rate_is_refused():
    match = "Cannot give galore_project two rates: it has no argument `learning_rate`"
    with pytest.raises(TypeError, match=match):
        lro.two_rates(lro.galore_project)
    with pytest.raises(TypeError, match="missing a required argument"):
        lro.two_rates(lro.galore_adamw)(rank=PERIOD)
    with pytest.raises(ValueError, match="names \\['typo'\\]"):
        matrices = {"typo": lro.MatrixAxes()}
        lro.two_rates(optax.sgd)(0.1, matrices=matrices).init(example_params())


def test_the_signature_names_and_annotates_what_is_added():
    def factory(learning_rate: float, *, weight_decay: float = 0.1, **rest: float):
        return optax.adamw(learning_rate, weight_decay=weight_decay)

    parameters = inspect.signature(lro.two_rates(factory)).parameters
    kinds = {name: p.kind.name for name, p in parameters.items()}
    named = dict.fromkeys(
        ("matrices", "dense_learning_rate", "dense_weight_decay"), "KEYWORD_ONLY"
    )
    assert kinds == {
        "learning_rate": "POSITIONAL_OR_KEYWORD",
        "weight_decay": "KEYWORD_ONLY",
        **named,
        "rest": "VAR_KEYWORD",
    }
    assert all(parameters[name].default is None for name in named)
    own = inspect.signature(lro.galore_adamw, eval_str=True).parameters["matrices"]
    assert parameters["matrices"].annotation == own.annotation
    assert parameters["dense_learning_rate"].annotation == float | None
