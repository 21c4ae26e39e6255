"""State on meshes: where it is put, that it stays there, and that values do not change.

Two simulated devices run the steps; placements alone need none, so they are checked on
an abstract mesh too large to be simulated.
"""

import functools
import inspect
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from registry import METHODS as REGISTRY
from running import assert_close, random_grads, random_like, run

import lowrank_optax as lro

MATRICES = lro.MatrixAxes()
METHODS = {
    "galore, short": lro.galore_project(
        optax.scale_by_adam(), rank=3, update_every=2, matrices=MATRICES
    ),
    "galore, long": lro.project_gradients(
        optax.scale_by_adam(),
        rank=3,
        subspace=lro.TopSingular("gram_eigh"),
        refresh=lro.Staggered(2),
        transfer=lro.Rotate(),
        side="long",
        matrices=MATRICES,
    ),
    "galore_adafactor": lro.galore_adafactor(0.1, 3, update_every=2, matrices=MATRICES),
    "mlorc_adam": lro.mlorc_scale_by_adam(3, matrices=MATRICES),
    "mlorc_lion": lro.mlorc_scale_by_lion(3, matrices=MATRICES),
    "mlorc_compress": lro.mlorc_compress(optax.trace(0.9), rank=3, matrices=MATRICES),
    "accumulated": lro.accumulate_gradients(
        lro.flora_project(optax.trace(0.9), rank=3, matrices=MATRICES), every=2
    ),
}
SHAPES = {
    "rows": (8, 12),
    "columns": (8, 12),
    "tall": (12, 8),
    "stack": (4, 8, 12),
    "bias": (12,),
    "embed": (10, 8),
}
SPECS = {
    "rows": P("x", None),
    "columns": P(None, "x"),
    "tall": P("x", None),
    "stack": P("x", None, None),
    "bias": P("x"),
    "embed": P("x", None),
}


def two_devices(kind=AxisType.Auto):
    return jax.make_mesh((2,), ("x",), axis_types=(kind,))


def place(tree, mesh):
    return {
        k: jax.device_put(x, NamedSharding(mesh, SPECS[k])) for k, x in tree.items()
    }


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_sharded_steps_equal_unsharded_ones_and_keep_their_shardings(name, kind):
    tx, mesh = METHODS[name], two_devices(kind)
    plain = random_like(SHAPES, 0)
    plain_grads = random_grads(plain, 4)
    expected, _ = run(tx, plain, plain_grads)

    with jax.set_mesh(mesh):
        params = place(plain, mesh)
        shardings = lro.state_shardings(tx, params, mesh)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        param_shardings = jax.tree.map(lambda x: x.sharding, params)
        update = tx.update
        step = jax.jit(update, out_shardings=(param_shardings, shardings))
        before = jax.tree.map(jax.typeof, state)
        for g, want in zip(plain_grads, expected, strict=True):
            updates, state = step(place(g, mesh), state, params)
            assert_close(updates, want, rtol=1e-3, atol=1e-4)
        assert jax.tree.map(jax.typeof, state) == before
        for x, sharding in zip(
            jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True
        ):
            assert x.sharding.is_equivalent_to(sharding, x.ndim)


WITH_CAST = lro.compress_state(
    optax.trace(0.9), {"trace": lro.Cast(jnp.bfloat16)}, matrices=MATRICES
)


@pytest.mark.parametrize("row", [1, 60], ids=["first device", "last device"])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize(
    "tx", [*METHODS.values(), WITH_CAST], ids=[*METHODS, "compress_state"]
)
def test_one_bad_entry_on_any_device_does_not_stick(tx, bad, row):
    """The largest of several devices' maxima may not be NaN where one of them is."""
    mesh = two_devices()
    shapes = {"rows": (64, 80), "columns": (64, 80)}
    with jax.set_mesh(mesh):
        params = place(random_like(shapes, 0), mesh)
        step, state = jax.jit(tx.update), tx.init(params)
        for i, g in enumerate(random_grads(params, 4)):
            if i == 1:
                g["rows"] = g["rows"].at[row, 2].set(bad)
                g["columns"] = g["columns"].at[2, row].set(bad)
            updates, state = step(place(g, mesh), state, params)
    chex.assert_tree_all_finite((state, updates))


INJECTED = lro.inject_hyperparams(lro.mlorc_lion)(
    learning_rate=lambda count: 0.1 / (count + 1), rank=3, matrices=MATRICES
)


TWO_RATES = lro.two_rates(lro.galore_adamw)(
    0.1, 3, dense_learning_rate=0.2, matrices=MATRICES
)


@pytest.mark.parametrize("name", [*METHODS, "injected", "two rates"])
def test_types_are_kept_on_explicit_axes(name):
    tx = (METHODS | {"injected": INJECTED, "two rates": TWO_RATES})[name]
    mesh = two_devices(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = place(random_like(SHAPES, 0), mesh)
        for init in (tx.init, jax.jit(tx.init)):
            before = init(params)
            updates, after = jax.jit(tx.update)(params, before, params)
            assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
            assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, before)


@pytest.mark.parametrize("name", [*METHODS, "two rates"])
def test_a_training_from_its_start_is_one_compilation_on_explicit_axes(name):
    tx = (METHODS | {"two rates": TWO_RATES})[name]

    def trained(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=2)[0][0]

    mesh = two_devices(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = place(random_like(SHAPES, 0), mesh)
        found, expected = jax.jit(trained)(params), params
        update, state = jax.jit(tx.update), tx.init(params)
        for _ in range(2):
            updates, state = update(expected, state, expected)
            expected = optax.apply_updates(expected, updates)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


# Placements, on a mesh of 4 x 2

BIG = AbstractMesh((4, 2), ("fsdp", "tp"))


def abstract(shape, *spec):
    return jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(BIG, P(*spec))
    )


def specs(tx, leaf):
    """By field: the spec of the state of one leaf, a full tuple for each array."""
    params = {"w": leaf, "b": abstract((12,), "tp")}
    shardings = lro.state_shardings(tx, params, BIG)
    # Newer jax refuses a weight that cannot be split as it says; shapes need no split.
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    shapes = jax.eval_shape(tx.init, plain)

    def of(field):
        found, like = (optax.tree.get(tree, field)["w"] for tree in (shardings, shapes))
        return jax.tree.map(
            lambda s, x: (*s.spec, *(None,) * x.ndim)[: x.ndim], found, like
        )

    return of, shardings


# By an axis of the weight: what a thin array has that runs along it.
FSDP, TP = ("fsdp", "tp"), ("tp", "fsdp")
BOTH = {
    ("fsdp", None): (FSDP, None),
    ("tp", None): (TP, None),
    (None, "fsdp"): (None, FSDP),
    (None, "tp"): (None, TP),
}


@pytest.mark.parametrize(
    ("side", "shape", "basis", "moments"),
    [
        ("short", (8, 24), ("fsdp", None), (None, "tp")),
        ("short", (24, 8), ("tp", None), (None, "fsdp")),
        ("long", (8, 24), ("tp", None), (None, "fsdp")),
        ("left", (24, 8), ("fsdp", None), (None, "tp")),
    ],
)
@pytest.mark.parametrize("by", ["all", "own"])
def test_long_axes_have_those_of_the_weight_their_own_first(
    by, side, shape, basis, moments
):
    tx = lro.galore_project(optax.scale_by_adam(), rank=3, side=side)
    with lro.split_states(by):
        of, shardings = specs(tx, abstract(shape, "fsdp", "tp"))
    if by == "all":
        basis, moments = (BOTH.get(x, x) for x in (basis, moments))
    assert of("basis") == basis
    assert of("mu") == of("nu") == moments
    assert shardings.step.spec == shardings.inner_state.count.spec == P()
    assert shardings.inner_state.mu["b"].spec == P("tp")
    assert isinstance(shardings.basis["b"], optax.MaskedNode)


@pytest.mark.parametrize(
    ("shape", "left", "right"),
    [
        ((8, 24), (FSDP, None), (None, TP)),
        ((24, 8), (TP, None), (None, FSDP)),
        # Twelve is no multiple of eight: what has been its own stays.
        ((8, 12), (FSDP, None), (None, "tp")),
        ((12, 8), (TP, None), (None, "fsdp")),
    ],
)
def test_factors_have_all_axes_of_the_weight(shape, left, right):
    tx = lro.mlorc_adamw(0.1, 3)
    of, shardings = specs(tx, abstract(shape, "fsdp", "tp"))
    for field in ("mu", "nu"):
        assert (of(field).left, of(field).right) == (left, right)
        assert optax.tree.get(shardings, field)["b"].spec == P("tp")


@pytest.mark.parametrize(
    ("leaf", "axes", "basis", "moments"),
    [
        (
            abstract((4, 8, 12), "fsdp", None, "tp"),
            lro.MatrixAxes(),
            ("fsdp", "tp", None),
            ("fsdp", None, "tp"),
        ),
        (
            abstract((8, 4, 12, 2), "fsdp", None, "tp", None),
            lro.MatrixAxes(rows=0, cols=(2, 3)),
            (None, FSDP, None),
            (None, None, TP),
        ),
        (
            abstract((8, 4, 4), "fsdp", None, "tp"),
            lro.MatrixAxes(rows=0, cols=(1, 2)),
            (FSDP, None),
            # The merged axis is sharded within each of its blocks: no spec says so.
            (None, FSDP),
        ),
        (
            abstract((8, 16), None, ("fsdp", "tp")),
            None,
            (FSDP, None),
            (None, FSDP),
        ),
        (abstract((8, 12)), None, (None, None), (None, None)),
    ],
    ids=["stack", "layers in the middle", "heads", "two mesh axes", "replicated"],
)
def test_batch_axes_keep_theirs_and_merged_axes_that_of_the_first(
    leaf, axes, basis, moments
):
    tx = lro.galore_project(
        optax.scale_by_adam(), rank=3, matrices={"w": axes or MATRICES}
    )
    of, _ = specs(tx, leaf)
    assert of("basis") == basis
    assert of("mu") == moments


def test_what_does_not_divide_an_axis_splits_another_or_none():
    # Ten rows cannot be split in four: only an abstract weight can claim it.
    of, _ = specs(lro.mlorc_scale_by_lion(3), abstract((10, 24), "fsdp", "tp"))
    assert of("mu").left == ("tp", None)
    assert of("mu").right == (None, TP)
    # Nor the state of a leaf at full rank, which loses that axis alone.
    of, _ = specs(optax.scale_by_adam(), abstract((10, 24), "fsdp", "tp"))
    assert of("mu") == (None, "tp")
    # Optax's factored moments are vectors, which have no spec of their own.
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=1)
    weight = abstract((8, 24), "fsdp", "tp")
    of, _ = specs(lro.galore_project(factored, rank=3), weight)
    assert of("basis") == (FSDP, None)
    assert of("v_row") == of("v_col") == (None,)
    of, _ = specs(lro.galore_adafactor(0.1, 3), weight)
    assert of("v_row") == (None,) and of("v_col") == (TP,)
    of, _ = specs(lro.scale_by_adafactor(), abstract((4, 8, 24), "tp", "fsdp", None))
    assert of("v_row") == ("tp", "fsdp") and of("v_col") == ("tp", "fsdp")


def test_codes_of_projected_moments_have_the_axes_of_these():
    tx = lro.q_galore_adamw_8bit(0.1, rank=16)
    params = {"w": abstract((512, 2048), "fsdp", "tp")}
    of, _ = specs(tx, params["w"])
    assert of("mu").index == of("nu").index == (None, TP)
    assert of("mu").largest == (None, TP)  # one of a block of 256
    assert of("basis").pairs == (FSDP, None)
    assert of("basis").largest == ("tp", None)  # two blocks a column
    tx = lro.quantize_state(lro.galore_project(optax.scale_by_adam(), rank=16))
    of, _ = specs(tx, params["w"])
    assert of("mu").index == (None, TP)
    assert of("basis") == (FSDP, None)
    # All of it is found again: a basis, two moments and a scale for 256 numbers each.
    row = lro.describe(tx, params)[0]
    assert row.state_bytes == 4 * 512 * 16 + 2 * (2048 * 16 + 4 * 128)


def test_wrapped_optimizers_are_seen_through():
    method = lro.inject_hyperparams(lro.galore_adamw)(learning_rate=0.1, rank=3)
    tx = optax.chain(optax.clip_by_global_norm(1.0), method)
    of, shardings = specs(tx, abstract((8, 24), "fsdp", "tp"))
    assert of("basis") == (FSDP, None)
    assert of("mu") == (None, TP)
    assert shardings[1].hyperparams["learning_rate"].spec == P()


def test_memory_on_the_fullest_device():
    params = {"w": abstract((8, 24), "fsdp", "tp")}
    tx = lro.mlorc_scale_by_lion(4)
    weights, _, state = lro.memory_report(tx, params, BIG)
    assert (weights.bytes, weights.bytes_per_device) == (4 * 192, 4 * 24)
    # 8 x 4 and 4 x 24 numbers on eight devices, and two counters.
    assert state.bytes == 4 * (8 * 4 + 4 * 24 + 2)
    assert state.bytes_per_device == 4 * (4 + 4 * 3 + 2)
    with lro.split_states("own"):  # on four and on two
        state = lro.memory_report(tx, params, BIG)[2]
    assert state.bytes_per_device == 4 * (2 * 4 + 4 * 12 + 2)


# LLaMA-7B on eight devices, by shapes alone

WIDTH, INNER, VOCABULARY, LAYERS = 4096, 11008, 32000, 2
EIGHT = {
    "fsdp=8": (AbstractMesh((8,), ("fsdp",)), ("fsdp", None)),
    "fsdp=4, tp=2": (BIG, ("fsdp", "tp")),
}


def llama(mesh, spec):
    """Stacks of its layers, every matrix split by all devices."""

    def weight(shape, spec, *batch):
        spec = (*(None,) * len(batch), *spec)
        return jax.ShapeDtypeStruct(
            (*batch, *shape), jnp.float32, sharding=NamedSharding(mesh, P(*spec))
        )

    back, square = spec[::-1], (WIDTH, WIDTH)
    layers = {
        **{k: weight(square, spec, LAYERS) for k in ("q", "k", "v")},
        "o": weight(square, back, LAYERS),
        **{k: weight((WIDTH, INNER), spec, LAYERS) for k in ("gate", "up")},
        "down": weight((INNER, WIDTH), back, LAYERS),
    }
    return {"embed": weight((VOCABULARY, WIDTH), back), "layers": layers}


def at_usual_rank(method):
    """The method as it is used for a model of this size."""
    rank = 4 if "mlorc" in method.name else 1 if "mini" in method.name else 1024
    matrices = lro.matrix_rules({"layers": MATRICES, "embed": None})
    changes = dict.fromkeys({"rank", "max_rank"} & method.kwargs.keys(), rank)
    if "num_heads" in method.kwargs:
        changes["num_heads"] = 32
    if method.name in (  # of another
        "quantize_state",
        "accumulate_gradients",
        "average_gradients",
    ):
        inner = lro.galore_project(optax.scale_by_adam(), rank=rank, matrices=matrices)
        changes[next(iter(method.kwargs))] = inner
    elif "matrices" in inspect.signature(method.factory).parameters:
        changes["matrices"] = matrices
    return method.make(**changes)


@pytest.mark.parametrize("mesh", EIGHT)
def test_a_device_of_eight_has_a_seventh_of_any_state_at_most(mesh):
    params = llama(*EIGHT[mesh])
    shares = {}
    for method in REGISTRY:
        tx = at_usual_rank(method)
        state = lro.memory_report(tx, params, EIGHT[mesh][0])[2]
        shares[method.name] = state.bytes / state.bytes_per_device
    assert {name: x for name, x in shares.items() if x < 7} == {}


def test_a_state_split_as_the_weight_alone_is_larger_than_that_of_adam():
    mesh, spec = EIGHT["fsdp=8"]
    params = llama(mesh, spec)["layers"]["up"]
    bytes_of = {}
    for name, tx in (
        (
            "galore",
            lro.galore_project(optax.scale_by_adam(), rank=1024, matrices=MATRICES),
        ),
        ("adam", optax.scale_by_adam()),
    ):
        for by in ("all", "own"):
            with lro.split_states(by):
                report = lro.memory_report(tx, {"kernel": params}, mesh)
            bytes_of[name, by] = report[2].bytes_per_device
    assert bytes_of["galore", "own"] > 2 * bytes_of["adam", "own"]
    assert bytes_of["galore", "all"] < bytes_of["adam", "all"] / 3


# Annotated NNX parameters


class Annotated(nnx.Module):
    def __init__(self):
        def linear(m, n, *spec):
            init = nnx.with_partitioning(nnx.initializers.normal(1.0), spec)
            return nnx.Linear(m, n, use_bias=False, kernel_init=init, rngs=nnx.Rngs(m))

        self.rows = linear(8, 12, "x", None)
        self.columns = linear(8, 14, None, "x")
        self.norm = nnx.LayerNorm(8, rngs=nnx.Rngs(0))

        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def layer(rngs):
            init = nnx.with_partitioning(nnx.initializers.normal(1.0), (None, "x"))
            return nnx.Linear(8, 12, use_bias=False, kernel_init=init, rngs=rngs)

        # Whose annotation knows nothing of the axis of layers.
        self.layers = layer(nnx.Rngs(3))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_nnx_factors_get_specs_that_fit(name, kind):
    tx, mesh = METHODS[name], two_devices(kind)
    with jax.set_mesh(mesh):
        model = Annotated()
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        assert params["rows"]["kernel"].sharding.spec == P("x", None)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        # Each where the functional interface would put it: on its own shape's axes.
        shardings = lro.state_shardings(tx, params, mesh)
        state = jax.tree.leaves(nnx.as_pure(optimizer.opt_state))
        for x, sharding in zip(state, jax.tree.leaves(shardings), strict=True):
            assert x.sharding.is_equivalent_to(sharding, x.ndim)
        assert any(not x.sharding.is_fully_replicated for x in state)

        grads = random_grads(params, 1)[0]
        into = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(
            into,
            jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), grads, params),
        )
        nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))(
            model, optimizer, into
        )
        after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    # From the host, and so onto one device.
    plain, grads = jax.tree.map(jnp.asarray, jax.device_get((params, grads)))
    expected, _ = run(tx, plain, [grads])
    change = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), after, params)
    assert_close(change, expected[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("compress", [("mu",), ("nu",)], ids=str)
def test_nnx_moments_at_full_rank_of_stacks_annotated_for_one_layer(compress):
    tx = lro.mlorc_scale_by_adam(2, compress=compress, matrices=MATRICES)

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def layer(rngs):
        init = nnx.with_partitioning(nnx.initializers.normal(1.0), (None, "x"))
        # Five rows are not split: in the stack, that is an axis of layers.
        return nnx.Linear(5, 12, use_bias=False, kernel_init=init, rngs=rngs)

    with jax.set_mesh(mesh := two_devices()):
        model = nnx.Dict(layers=layer(nnx.Rngs(0)))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        shardings = jax.tree.leaves(lro.state_shardings(tx, params, mesh))
    state = jax.tree.leaves(nnx.as_pure(optimizer.opt_state))
    for x, sharding in zip(state, shardings, strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    assert any(x.shape == (3, 5, 12) and x.sharding.spec[2] == "x" for x in state)


@pytest.mark.parametrize(
    "tx",
    [
        lro.quantize_state(lro.galore_project(optax.scale_by_adam(), rank=16)),
        lro.q_galore_adamw_8bit(0.1, rank=16),
        # Optax's factored moments, in the boxes of their parameters.
        lro.quantize_state(lro.galore_adafactor(0.1, rank=16, momentum=0.9)),
    ],
    ids=["galore 8-bit", "q-galore", "galore_adafactor 8-bit"],
)
def test_nnx_codes_of_projected_moments_get_specs_that_fit(tx):
    def linear(*spec):
        init = nnx.with_partitioning(nnx.initializers.normal(1.0), spec)
        return nnx.Linear(256, 320, use_bias=False, kernel_init=init, rngs=nnx.Rngs(0))

    with jax.set_mesh(mesh := two_devices()):
        model = nnx.Dict(rows=linear("x", None), columns=linear(None, "x"))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        shardings = jax.tree.leaves(lro.state_shardings(tx, params, mesh))
    state = jax.tree.leaves(nnx.as_pure(optimizer.opt_state))
    for x, sharding in zip(state, shardings, strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    # Of each kernel something is split: the basis of one, the moments of the other.
    assert sum(not x.sharding.is_fully_replicated for x in state) >= 2
    # All but the counts of steps, which are of no leaf.
    paths = jax.tree_util.tree_leaves_with_path(nnx.as_pure(optimizer.opt_state))
    own = sum(x.nbytes for path, x in paths if "kernel" in jax.tree_util.keystr(path))
    rows = lro.describe(tx, nnx.state(model, nnx.Param))
    assert sum(row.state_bytes for row in rows) == own


# Communication

COLLECTIVE = re.compile(
    r"= (?P<shapes>[^=]*?) (?P<operation>all-gather|all-reduce|all-to-all|"
    r"collective-permute|reduce-scatter)(?:-start)?\("
)


def collectives(tx, spec):
    """What a compiled step on a sharded (M, N) matrix moves between devices.

    ``(operation, elements of its largest result)`` of each collective.
    """
    mesh = two_devices()
    grads = {"w": jax.device_put(jnp.ones((M, N)), NamedSharding(mesh, spec))}
    shardings = lro.state_shardings(tx, grads, mesh)
    state = jax.device_put(tx.init(grads), shardings)
    places = {"w": grads["w"].sharding}, shardings
    step = jax.jit(tx.update, out_shardings=places).lower(grads, state).compile()
    found = []
    for match in COLLECTIVE.finditer(step.as_text()):
        shapes = re.findall(r"\[([\d,]*)\]", match["shapes"])
        sizes = [math.prod(int(d) for d in s.split(",") if d) for s in shapes]
        found.append((match["operation"], max(sizes)))
    return found


M, N, THIN_RANK = 64, 96, 4
# Their sketches have 8 and 4 columns more than the rank.
NO_GATHER = {
    "galore, short": (
        lro.galore_project(optax.scale_by_adam(), rank=THIN_RANK),
        THIN_RANK + 8,
    ),
    "galore, long": (
        lro.galore_project(optax.scale_by_adam(), rank=THIN_RANK, side="long"),
        THIN_RANK + 8,
    ),
    "mlorc_adam": (lro.mlorc_scale_by_adam(THIN_RANK), THIN_RANK + 4),
    "mlorc_lion": (lro.mlorc_scale_by_lion(THIN_RANK), THIN_RANK + 4),
}
SPLIT = [P("x", None), P(None, "x")]


@pytest.mark.parametrize("spec", SPLIT, ids=str)
@pytest.mark.parametrize("name", NO_GATHER)
def test_a_step_moves_thin_arrays_only(name, spec):
    # The refresh is part of the compiled program, so it moves no more either.
    tx, columns = NO_GATHER[name]
    moved = collectives(tx, spec)
    assert "all-gather" in {operation for operation, _ in moved}
    assert max(size for _, size in moved) <= columns * N


@pytest.mark.parametrize("spec", SPLIT, ids=str)
def test_an_exact_svd_would_gather_the_gradient(spec):
    # So the test above can see a gather.
    svd = lro.TopSingular("svd")
    tx = lro.galore_project(optax.scale_by_adam(), rank=THIN_RANK, subspace=svd)
    assert ("all-gather", M * N) in collectives(tx, spec)


# Within a shard_map


def test_gradients_of_single_devices_are_refused():
    mesh, tx = two_devices(), METHODS["galore, short"]
    params = {"w": jnp.ones((8, 12)), "b": jnp.ones(12)}
    grads = {"w": jnp.ones((16, 12)), "b": jnp.ones(24)}

    def step(params, grads, average):
        grads = jax.lax.pmean(grads, "x") if average else grads
        return tx.update(grads, tx.init(params), params)[0]

    def trace(average, **kwargs):
        specs = dict(in_specs=(P(), P("x")), out_specs=P() if average else P("x"))
        run = functools.partial(step, average=average)
        return jax.eval_shape(
            jax.shard_map(run, mesh=mesh, **specs, **kwargs), params, grads
        )

    trace(average=True)
    with pytest.raises(ValueError, match=r"'w'.*\(8, 12\).*of 'x'.*pmean\(grads, 'x'"):
        trace(average=False)
    trace(average=False, check_vma=False)


# Checkpoints


@pytest.mark.parametrize("name", ["galore, short", "mlorc_adam"])
def test_a_checkpoint_restored_onto_another_mesh(name, tmp_path):
    tx = METHODS[name]
    plain = random_like(SHAPES, 0)
    grads = random_grads(plain, 4)
    expected, last = run(tx, plain, grads)

    rows = two_devices()
    params = place(plain, rows)
    _, state = run(tx, params, [place(g, rows) for g in grads[:2]], tx.init(params))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)

    # The same two devices as one row of another mesh, the weights split elsewhere.
    other = jax.make_mesh((1, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    spec = {k: P(*(None,) * (len(s) - 1), "b") for k, s in SHAPES.items()}
    params = {
        k: jax.device_put(x, NamedSharding(other, spec[k])) for k, x in plain.items()
    }
    shardings = lro.state_shardings(tx, params, other)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        shardings,
    )
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", abstract)
    chex.assert_trees_all_equal(restored, state)
    for x, s in zip(jax.tree.leaves(restored), jax.tree.leaves(shardings), strict=True):
        assert x.sharding == s
    placed = [
        {k: jax.device_put(x, params[k].sharding) for k, x in g.items()} for g in grads
    ]
    resumed, finished = run(tx, params, placed[2:], restored)
    assert_close(resumed, expected[2:], rtol=1e-3, atol=1e-4)
    assert int(finished.step) == int(last.step) == 4
