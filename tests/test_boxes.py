"""Parameters in boxes, as Flax has them: what is made of them is as without boxes."""

from contextlib import nullcontext

import flax
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from models import Model
from registry import METHODS
from running import assert_close, random_grads

import lowrank_optax as lro

BY_NAME = {method.name: method for method in METHODS}
# An optimizer is one of these in a chain of Optax's, which has no state in boxes.
TRANSFORMATIONS = [method for method in METHODS if not method.is_alias]


# Masks and labels by functions


def is_wide(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def kinds(params):
    return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", params)


def partition(tx):
    return optax.partition({"matrix": tx, "vector": optax.sgd(0.1)}, kinds)


WRAPPERS = {"masked": lambda tx: optax.masked(tx, is_wide), "partition": partition}
ADAM = optax.masked(optax.scale_by_adam(), is_wide)
AROUND = {
    "galore_project": lro.galore_project(ADAM, rank=1),
    "quantize_state": lro.quantize_state(ADAM),
    "mlorc_compress": lro.mlorc_compress(ADAM, rank=1),
    "leafwise": lro.leafwise(BY_NAME["leafwise"].kwargs["rule"], dense=ADAM),
    "galore of 8 bits": lro.galore_project(lro.quantize_state(ADAM), rank=1),
    "partition": lro.galore_project(partition(optax.scale_by_adam()), rank=1),
}
FUNCTIONAL = {
    f"{kind} {method.name}": (wrap, method.tx)
    for kind, wrap in WRAPPERS.items()
    for method in TRANSFORMATIONS
} | {f"inside {name}": (lambda tx: tx, tx) for name, tx in AROUND.items()}


@pytest.fixture(params=FUNCTIONAL)
def masked(request):
    wrap, tx = FUNCTIONAL[request.param]
    return wrap(tx)


def test_a_function_masks_an_nnx_state_as_a_dict(masked):
    boxed = nnx.state(Model(), nnx.Param)
    plain = nnx.to_pure_dict(boxed)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    report = lro.memory_report(masked, boxed, mesh)
    assert report == lro.memory_report(masked, plain, mesh)
    assert report[2].bytes == lro.state_bytes(masked, plain)
    assert lro.describe(masked, boxed) == lro.describe(masked, plain)
    shardings = lro.state_shardings(masked, boxed, mesh)
    state = jax.eval_shape(jax.jit(masked.init, out_shardings=shardings), boxed)
    updates, after = jax.eval_shape(masked.update, boxed, state, boxed)
    assert jax.tree.structure((updates, after)) == jax.tree.structure((boxed, state))


# Each chooses the two kernels of `BY_PATH` by what a box in the leaf's place changes.
BY_PATH = {
    "norm": {"scale": jnp.ones((8, 8))},
    "up": {"kernel": jnp.ones((64, 72)), "bias": jnp.ones(72)},
    "wide": {"kernel": jnp.ones((72, 64))},
}


def by_key(function):
    return lambda tree: jax.tree_util.tree_map_with_path(function, tree)


CHOOSING = {
    "the last key": by_key(lambda path, x: path[-1].key == "kernel"),
    "the key before": by_key(
        lambda path, x: path[-2].key != "norm" and path[-1].key != "bias"
    ),
    "the text": by_key(lambda path, _: jax.tree_util.keystr(path)[-7:] == "ernel']"),
    "the number of keys": by_key(
        lambda path, x: len(path) == 2 and path[0].key != "norm" and x.ndim > 1
    ),
    "the leaf": lambda tree: {
        module: {name: x.ndim > 1 and module != "norm" for name, x in leaves.items()}
        for module, leaves in tree.items()
    },
}


@pytest.mark.parametrize("mask", CHOOSING.values(), ids=CHOOSING.keys())
def test_masks_may_go_by_the_path_or_the_leaf_itself(mask):
    """As of an optimizer whose mask is a tree, with all that looks into its state."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))

    def around(mask):
        adam = optax.masked(optax.scale_by_adam(), mask)
        yield optax.masked(lro.galore_adamw(0.1, rank=2), mask)
        yield optax.masked(lro.mlorc_adamw(0.1, rank=2), mask)
        yield lro.galore_adamw(0.1, rank=2, weight_decay=0.1, mask=mask)
        yield lro.galore_project(adam, rank=2)
        yield lro.quantize_state(adam)
        yield lro.accumulate_gradients(lro.galore_project(adam, rank=2), 2)

    tree = CHOOSING["the leaf"](BY_PATH)
    for tx, expected in zip(around(mask), around(tree), strict=True):
        assert lro.describe(tx, BY_PATH) == lro.describe(expected, BY_PATH)
        assert lro.state_bytes(tx, BY_PATH) == lro.state_bytes(expected, BY_PATH)
        assert lro.memory_report(tx, BY_PATH) == lro.memory_report(expected, BY_PATH)
        jax.tree.map(
            lambda x, y: None,
            lro.state_shardings(tx, BY_PATH, mesh),
            lro.state_shardings(expected, BY_PATH, mesh),
        )
        found = [
            jax.eval_shape(t.update, BY_PATH, t.init(BY_PATH), BY_PATH)
            for t in (tx, expected)
        ]
        assert len({str(jax.tree.leaves(x)) for x in found}) == 1
    inner = [optax.masked(optax.scale_by_adam(), m) for m in (mask, tree)]
    projected = [lro.galore_project(x, rank=2) for x in inner]
    found = [jax.jit(t.update)(BY_PATH, t.init(BY_PATH), BY_PATH)[0] for t in projected]
    assert_close(*found)


@pytest.mark.parametrize(
    "tx",
    [
        *(wrap(BY_NAME["galore_adamw"].tx) for wrap in WRAPPERS.values()),
        *AROUND.values(),
    ],
    ids=[*WRAPPERS, *AROUND],
)
def test_masks_by_functions_train_an_nnx_model(tx):
    model = Model()
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    grads = random_grads(params, 1)[0]
    want, _ = tx.update(grads, tx.init(params), params)
    into = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(into, grads)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))(
        model, optimizer, into
    )
    change = jax.tree.map(jnp.subtract, nnx.to_pure_dict(nnx.state(model)), params)
    assert_close(change, want, rtol=1e-4, atol=1e-5)


def test_a_spec_may_name_what_a_function_masks():
    boxed = nnx.state(Model(), nnx.Param)
    specs = {"up": {"kernel": lro.MatrixAxes(), "bias": lro.MatrixAxes()}}
    tx = optax.masked(lro.mlorc_scale_by_lion(1, matrices=specs), is_wide)
    ranks = {row.path: row.rank for row in lro.describe(tx, boxed)}
    assert ranks["up/kernel"] == 1 and ranks["up/bias"] is None


# Linen's boxes

MESH = AbstractMesh((2, 2), ("mlp", "embed"))
SHAPES = {"up": (16, 8), "wide": (8, 16), "bias": (8,)}
NAMES = {"up": ("mlp", "embed"), "wide": ("embed", "mlp"), "bias": ("embed",)}


def abstract(shape, names):
    sharding = NamedSharding(MESH, P(*names))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


PLAIN = {k: abstract(shape, NAMES[k]) for k, shape in SHAPES.items()}


def boxed_params(box=nn.Partitioned, names=NAMES, **kwargs):
    def put(k, shape):
        return box(jax.ShapeDtypeStruct(shape, jnp.float32), names[k], **kwargs)

    return {k: put(k, shape) for k, shape in SHAPES.items()}


def specs(tree):
    return [
        tuple(getattr(x, "spec", x))
        for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, P))
    ]


def padded(specs, arrays):
    """Each with an entry for each axis."""
    return [
        spec + (None,) * (x.ndim - len(spec))
        for spec, x in zip(specs, arrays, strict=True)
    ]


RANKED = [m for m in TRANSFORMATIONS if {"rank", "max_rank"} & m.kwargs.keys()]


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("method", RANKED, ids=lambda method: method.name)
def test_state_in_boxes_of_linen_has_specs_that_fit(method, rank):
    tx = method.make(**dict.fromkeys({"rank", "max_rank"} & method.kwargs.keys(), rank))
    boxed = boxed_params()
    # A mesh that is not known divides nothing: arrays have axes of their own only.
    for mesh, by in ((MESH, "all"), (None, "own")):
        around = jax.sharding.use_abstract_mesh(mesh) if mesh else nullcontext()
        with around:
            state = jax.eval_shape(tx.init, boxed)
        arrays = jax.tree.leaves(state)
        with lro.split_states(by):
            want = padded(specs(lro.state_shardings(tx, PLAIN, MESH)), arrays)
            assert padded(specs(lro.state_shardings(tx, boxed, MESH)), arrays) == want
        assert padded(specs(nn.get_partition_spec(state)), arrays) == want
        assert any(map(any, want))
    after = jax.eval_shape(tx.update, boxed, state, boxed)
    assert jax.tree.structure(after) == jax.tree.structure((boxed, state))


def test_linen_trains_in_boxes_as_without():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.normal(), ("mlp", "embed"))
            return nn.Dense(16, kernel_init=init)(x)

    x = jnp.ones((4, 24))
    boxed = Model().init(jax.random.key(0), x)
    plain = nn.meta.unbox(boxed)
    tx = lro.quantize_state(lro.galore_project(optax.scale_by_adam(), rank=2))

    def step(params):
        grads = jax.grad(lambda p: jnp.sum(Model().apply(p, x) ** 2))(params)
        return jax.jit(tx.update)(grads, tx.init(params), params)[0]

    updates = step(boxed)
    assert jax.tree.structure(updates) == jax.tree.structure(boxed)
    assert_close(nn.meta.unbox(updates), step(plain))


LOGICAL = {"up": ("m", "e"), "wide": ("e", "m"), "bias": ("e",)}
RULES = (("m", "mlp"), ("e", "embed"))


def test_logical_names_go_by_the_rules():
    tx = lro.galore_adamw(0.1, rank=2)
    want = specs(lro.state_shardings(tx, PLAIN, MESH))
    with_rules = boxed_params(nn.LogicallyPartitioned, LOGICAL, rules=RULES)
    assert specs(lro.state_shardings(tx, with_rules, MESH)) == want
    without = boxed_params(nn.LogicallyPartitioned, LOGICAL)
    with nn.logical_axis_rules(RULES):
        assert specs(lro.state_shardings(tx, without, MESH)) == want
    with pytest.raises(ValueError, match="'bias'.*no axis 'e'.*logical_axis_rules"):
        lro.state_shardings(tx, without, MESH)
    with jax.sharding.use_abstract_mesh(AbstractMesh((8, 8), ("e", "m"))):  # by chance
        logical = nn.get_partition_spec(jax.eval_shape(tx.init, without))
    state = nn.logical_to_mesh_sharding(logical, MESH, RULES)
    arrays = jax.tree.leaves(jax.eval_shape(tx.init, without))
    with lro.split_states("own"):  # no name stands for two axes
        want = specs(lro.state_shardings(tx, PLAIN, MESH))
    assert padded(specs(state), arrays) == padded(want, arrays)


def nnx_params(names, **metadata):
    """Variables that Flax does not place by itself, as the mesh is abstract."""
    return {
        k: nnx.Param(
            jnp.zeros(shape), out_sharding=names[k], eager_sharding=False, **metadata
        )
        for k, shape in SHAPES.items()
    }


@pytest.mark.parametrize("method", RANKED, ids=lambda method: method.name)
def test_logical_names_of_nnx_go_by_its_rules(method):
    tx, first, last = method.tx, RULES[:1], RULES[1:]
    want = specs(lro.state_shardings(tx, PLAIN, MESH))
    with_rules = nnx_params(LOGICAL, sharding_rules=RULES)
    assert specs(lro.state_shardings(tx, with_rules, MESH)) == want
    with flax.core.spmd.logical_axis_rules(first):
        both = nnx_params(LOGICAL, sharding_rules=last)
        assert specs(lro.state_shardings(tx, both, MESH)) == want
    placed = {k: NamedSharding(MESH, P(*names)) for k, names in NAMES.items()}
    boxed = nnx_params(placed)
    assert specs(lro.state_shardings(tx, boxed, MESH)) == want
    # Flax places the boxes of a state by what stands in them.
    for params in (with_rules, boxed):
        state = jax.eval_shape(tx.init, params)
        boxes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        found = [x.get_metadata() for x in boxes if isinstance(x, nnx.Variable)]
        assert found and all(x.get("sharding_rules") == RULES for x in found) == (
            params is with_rules
        )
        assert all(
            isinstance(x["out_sharding"], NamedSharding | None) for x in found
        ) == (params is boxed)


def test_nnx_states_go_by_the_rules_of_logical_names():
    tx = lro.galore_adamw(0.1, rank=2)
    want = specs(lro.state_shardings(tx, PLAIN, MESH))
    boxed = {
        k: nnx.Param(
            jax.ShapeDtypeStruct(shape, jnp.float32),
            out_sharding=LOGICAL[k],
            eager_sharding=False,
        )
        for k, shape in SHAPES.items()
    }
    with nn.logical_axis_rules(RULES):
        assert specs(lro.state_shardings(tx, boxed, MESH)) == want
    with pytest.raises(ValueError, match="no axis 'e'.*logical_axis_rules"):
        lro.state_shardings(tx, boxed, MESH)


# Placements


def sharded(mesh, *spec, **kwargs):
    sharding = NamedSharding(mesh, P(*spec), **kwargs)
    return {"w": jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=sharding)}


@pytest.mark.parametrize("method", TRANSFORMATIONS, ids=lambda method: method.name)
def test_state_is_in_the_kind_of_memory_of_its_parameter(method):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    shapes = jax.eval_shape(method.tx.init, sharded(mesh, "x", None))
    for kind in ("pinned_host", "device"):
        params = sharded(mesh, "x", None, memory_kind=kind)
        shardings = lro.state_shardings(method.tx, params, mesh)
        for x, s in zip(*map(jax.tree.leaves, (shapes, shardings)), strict=True):
            assert s.memory_kind == kind or x.size <= 5  # what rules remember


def test_a_basis_is_made_in_the_memory_of_its_parameter():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("x", None), memory_kind="pinned_host")
    params = {"w": jax.device_put(jnp.ones((8, 16)), sharding)}
    state = lro.galore_project(optax.identity(), rank=2).init(params)
    assert state.basis["w"].sharding.memory_kind == "pinned_host"


def test_specs_that_no_place_follows_from():
    tx = lro.galore_adamw(0.1, rank=2)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    other = jax.make_mesh((1,), ("y",), axis_types=(AxisType.Auto,))
    for call in (lro.state_shardings, lro.memory_report):
        with pytest.raises(ValueError, match=r"'w'.*UNCONSTRAINED.*or None"):
            call(tx, sharded(mesh, P.UNCONSTRAINED, None), mesh)
        with pytest.raises(ValueError, match=r"'w'.*no axis 'x', but \('y',\)"):
            call(tx, sharded(mesh, None, "x"), other)
