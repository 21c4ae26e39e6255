"""What the page on trainers says that needs none of them, and what they all ask for."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from page import DOCS, run_sections
from registry import METHODS, one_of_each
from running import assert_close, random_grads, random_like, run
from test_default_matrices import tree_of

import lowrank_optax as lro
from lowrank_optax import MatrixAxes

MODELS = json.loads((Path(__file__).parent / "data/models.json").read_text())
OPTIMIZERS = {method.name: method for method in METHODS if method.is_optimizer}


@pytest.fixture(scope="module")
def general():
    return run_sections("trainers.md", "What trainers ask for")


def test_every_trainer_of_the_page_has_a_test_or_says_that_it_was_not_run():
    sections = DOCS.joinpath("trainers.md").read_text().split("\n## ")[2:]
    tested = {path.stem[5:] for path in Path(__file__).parent.glob("trainers/test_*")}
    assert len(tested) == 4
    for section in sections:
        title = section.partition("\n")[0].lower().split()[0]
        assert (title in tested) != (
            "itself was not run here" in " ".join(section.split())
        )


def injected(method, learning_rate):
    """As a trainer does it that logs the learning rate."""
    factory = optax.inject_hyperparams(
        lambda learning_rate: method.make(learning_rate=learning_rate),
        hyperparam_dtype=jnp.float32,
    )
    return factory(learning_rate=learning_rate)


def test_factories_of_the_learning_rate_may_be_injected_by_optax():
    params = one_of_each()
    for method in OPTIMIZERS.values():
        tx = injected(method, 0.1)
        state = jax.eval_shape(tx.init, params)
        updates, new = jax.eval_shape(tx.update, params, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes((updates, new), (params, state))
        assert set(new.hyperparams) == {"learning_rate"}


@pytest.mark.parametrize("name", ["galore_adamw", "mlorc_adamw"])
def test_a_schedule_that_optax_injects(name):
    method, params = OPTIMIZERS[name], one_of_each()
    grads = random_grads(params, 2)
    rate = method.kwargs["learning_rate"]
    updates, _ = run(injected(method, lambda count: rate * (1 - count)), params, grads)
    expected, _ = run(method.tx, params, grads[:1])
    assert_close(updates, [*expected, jax.tree.map(jnp.zeros_like, params)])


def test_what_binds_a_rank_but_shows_it_is_told_that_it_must_be_a_number():
    for factory in (
        lro.galore_adamw,
        lro.inject_hyperparams(lro.galore_adamw),
        functools.partial(lro.galore_adamw, rank=2),
    ):
        with pytest.raises(TypeError, match="`rank` must be a Python int"):
            optax.inject_hyperparams(factory)(learning_rate=0.1).init(one_of_each())


def test_states_stay_in_place(general):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    where = NamedSharding(mesh, P("x", None))
    params = {"w": jax.device_put(random_like({"w": (16, 24)}, 0)["w"], where)}
    plain = lro.galore_adamw(0.1, rank=2)
    shardings = lro.state_shardings(plain, params, mesh)
    tx = general["in_place"](plain, shardings)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    updates, new = jax.jit(tx.update)(params, state, params)
    for x, place in zip(jax.tree.leaves(new), jax.tree.leaves(shardings), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim)
    expected, _ = jax.jit(plain.update)(params, state, params)
    assert_close(updates, expected)


# MaxText: what its own `get_muon_weight_dimension_numbers` says of these kernels.

SCANNED = {
    "query": MatrixAxes(0, (2, 3)),
    "key": MatrixAxes(0, (2, 3)),
    "value": MatrixAxes(0, (2, 3)),
    "out": MatrixAxes((0, 2), 3),
    "wi_0": MatrixAxes(0, 2),
    "wi_1": MatrixAxes(0, 2),
    "wo": MatrixAxes(0, 2),
    "wq_a": MatrixAxes(0, 2),
    "wkv_a": MatrixAxes(0, 2),
    "wq_b": MatrixAxes(0, (2, 3)),
    "wkv_b": MatrixAxes(0, (2, 3)),
}


def scanned(shapes):
    """DeepSeek's layers, stacked on the second axis."""
    return {
        path.replace("layers_0", "layers"): [shape[0], 3, *shape[1:]]
        for path, shape in shapes.items()
    }


@pytest.mark.parametrize(
    ("rules", "shapes"),
    [
        ("maxtext", MODELS["MaxText Mistral 7B, scanned"]),
        ("maxtext", scanned(MODELS["MaxText DeepSeek V3"])),
        ("mixtral", MODELS["MaxText Mixtral 8x7B, scanned"]),
    ],
    ids=["mistral", "deepseek", "mixtral"],
)
def test_matrices_of_maxtext_are_those_of_its_muon(rules, shapes, general):
    page = run_sections("trainers.md", "MaxText", **general)
    chosen = page[rules](tree_of(shapes))
    flat, _ = jax.tree_util.tree_flatten_with_path(
        chosen, is_leaf=lambda x: x is None or isinstance(x, MatrixAxes)
    )
    found = {jax.tree_util.keystr(k, simple=True, separator="/"): x for k, x in flat}
    assert len(found) == len(shapes)
    for path, axes in found.items():
        ndim = len(shapes[path])
        name = path.removesuffix("/kernel").rpartition("/")[2]
        expected = SCANNED.get(name)
        if "/MoeBlock_0" in path:
            expected = None if name == "gate" else MatrixAxes(2, 3)
        assert numbers(axes, ndim) == numbers(expected, ndim), path


def numbers(axes, ndim):
    """Rows and columns of a leaf, counted from its first axis."""
    if axes is None:
        return None
    groups = ((x,) if isinstance(x, int) else x for x in (axes.rows, axes.cols))
    return [[a % ndim for a in group] for group in groups]


def test_maxtext_gets_its_optimizer(general):
    class Config(NamedTuple):
        adam_weight_decay: float = 0.1

    page = run_sections("trainers.md", "MaxText", **general)
    shapes = {
        "decoder/layers/mlp/wi_0/kernel": [160, 3, 256],
        "decoder/layers/self_attention/kv_a/kernel": [160, 3, 200],
    }
    params = tree_of(shapes)
    tx = page["get_optimizer"](Config(), optax.constant_schedule(0.1))
    ranks = [row.rank for row in lro.describe(tx, params)]
    assert ranks == [128, 128]


# AXLearn


class Transformation(NamedTuple):
    init: object
    update: object
    partition: object


@dataclasses.dataclass(frozen=True)
class Spec:
    shape: tuple[int, ...]
    dtype: object
    mesh_axes: P


class Parameter:
    def __init__(self, value):
        self.value = value


def test_axlearn_gets_specs_of_its_state(general):
    page = run_sections("trainers.md", "AXLearn", **general)
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,))
    plain = lro.galore_adamw(0.1, rank=2)
    tx = page["partitioned"](plain, mesh, Transformation, Spec)
    params = random_like({"up": (16, 24), "bias": (24,)}, 0)
    axes = {"up": P("fsdp", None), "bias": P()}
    specs = {k: Spec(x.shape, x.dtype, axes[k]) for k, x in params.items()}
    found = tx.partition(specs)
    wrapped = {k: Parameter(x) for k, x in params.items()}
    state = tx.init(wrapped)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, state)
    assert found[0].basis["up"].mesh_axes == P("fsdp", None)
    assert found[0].inner_state.mu["up"].mesh_axes == P(None, "fsdp")
    assert found[0].inner_state.mu["bias"].mesh_axes == P(None)
    new = tx.update(params, state, wrapped)
    chex.assert_trees_all_equal(new, plain.update(params, plain.init(params), params))
