"""The Pallas kernels: equal to XLA's tier when interpreted, and they lower."""

import functools
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core
from running import random_like

import lowrank_optax as lro
from benchmarks.kernels import differences, moved
from lowrank_optax._src.kernels import int8, mlorc, plan
from lowrank_optax._src.kernels.dispatch import interpreted
from lowrank_optax._src.linalg import products

PLATFORMS = ["cuda", "tpu"]
PASSES = {"sketches": mlorc.SKETCHES, "projections": mlorc.PROJECTIONS}
# Edges of tiles: 576 columns are 9 steps of 64, which two programs on GPU share as 5
# and 4, and 2 of 512 on TPU; 270 rows are 2 of 256. The stack is seen transposed.
SHAPES = {"wide": (40, 576), "stack": (2, 300, 270)}
DTYPES = {"wide": jnp.float32, "stack": jnp.bfloat16}
ALL = lro.MatrixAxes()
METHODS = {
    "mlorc": lambda rank: lro.mlorc_adamw(1.0, rank, matrices=ALL),
    "algorithm 3": lambda rank: lro.mlorc_adamw(  # with the paper's sketch
        1.0, rank, oversample=0, warm_start=False, matrices=ALL
    ),
    "int8": lambda rank: lro.adamw_8bit(1.0),
}
CALLS_A_LEAF = {"mlorc": 2, "algorithm 3": 2, "int8": 1}


# Of small matrices, on GPU: two whitenings of sketches, and the best codes by them.
OF_SMALL = {"eliminate": 2, "diagonalize": 1}


def names_of_kernels(function, *args):
    """Of each kernel in what a function traces to."""
    text = str(jax.make_jaxpr(function)(*args))
    return re.findall(r"pallas_call\[.*?\n\s+name=(\w+)", text, re.DOTALL)


def kernels_in(function, *args):
    """How many kernels of whole matrices there are in what a function traces to."""
    return sum(x not in OF_SMALL for x in names_of_kernels(function, *args))


def relative(x, y):
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    return np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)


# Choice


def test_the_tier_is_part_of_the_key_of_each_compilation():
    tx = METHODS["mlorc"](2)
    params = {"w": jnp.ones((24, 40))}
    state = tx.init(params)
    traced = []

    @jax.jit
    def step(grads):
        traced.append(kernels_in(tx.update, grads, state, params))
        return grads

    for _ in range(2):  # the second time from the cache
        step(params)
        for platform in PLATFORMS:
            with interpreted(platform):
                step(params)
        with lro.kernels.dispatch("xla"):
            step(params)
    assert traced == [0, 2, 2, 0]


def test_the_tier_holds_within_its_block_alone():
    tx = METHODS["mlorc"](2)
    params = {"w": jnp.ones((24, 40))}
    count = functools.partial(kernels_in, tx.update, params, tx.init(params), params)
    with interpreted("tpu"):
        with lro.kernels.dispatch("xla"):
            assert count() == 0
        assert count() == 2
        with lro.kernels.dispatch("auto"):  # on a CPU
            assert count() == 0
    assert count() == 0


def test_pallas_is_not_imported_unless_it_is_used():
    program = "import lowrank_optax, sys; print(*sys.modules)"
    command = [sys.executable, "-c", program]
    root = pathlib.Path(__file__).parents[1]
    modules = subprocess.check_output(command, text=True, cwd=root).split()
    assert "lowrank_optax.kernels" in modules
    assert "jax.experimental.pallas" not in modules


def test_kernels_are_refused_where_they_cannot_run():
    with pytest.raises(ValueError, match="`tier` must be one of .*, got 'gpu'"):
        lro.kernels.dispatch("gpu")
    tx = METHODS["mlorc"](2)
    params = {"w": jnp.ones((24, 40))}
    with lro.kernels.dispatch("pallas"):
        with pytest.raises(ValueError, match="Only interpret mode .* on CPU"):
            jax.jit(tx.update)(params, tx.init(params), params)


@pytest.mark.parametrize(
    "tx",
    [
        lro.mlorc_adamw(1.0, 2, power_iters=1),
        lro.mlorc_adamw(1.0, 2, compress=("nu",)),
        lro.mlorc_adamw(1.0, 24, matrices=ALL),  # the whole space is its own range
        lro.mlorc_lion(1.0, 2),
        lro.galore_adamw(1.0, rank=2),
        lro.quantize_state(optax.scale_by_adam()),  # which no one can look into
        lro.galore_adamw_8bit(1.0, rank=24, matrices=ALL),
    ],
    ids=["power", "nu", "full", "lion", "galore", "any", "galore 8 bit"],
)
def test_what_has_no_kernel_is_left_to_xla(tx):
    params = {"w": jnp.ones((24, 256))}
    with interpreted("tpu"):
        assert kernels_in(tx.update, params, tx.init(params), params) == 0


@pytest.mark.parametrize("make", [lro.mlorc_adamw, lro.mlorc_lion])
def test_small_matrices_of_all_leaves_are_factored_at_once_on_gpu(make):
    tx = make(1.0, 2)
    params = {"a": jnp.ones((24, 40)), "b": jnp.ones((24, 40)), "c": jnp.ones((40, 24))}
    args = tx.update, params, tx.init(params), params
    with interpreted("cuda"):
        names = names_of_kernels(*args)
    assert {x: names.count(x) for x in OF_SMALL} == OF_SMALL
    with interpreted("tpu"):  # there is no such kernel
        assert not set(names_of_kernels(*args)) & set(OF_SMALL)
    wider = make(1.0, 14)  # 18 columns
    with interpreted("cuda"):
        found = names_of_kernels(wider.update, params, wider.init(params), params)
    assert not set(found) & set(OF_SMALL)


@pytest.mark.parametrize(
    "tx",
    [
        lro.galore_adamw(1.0, rank=4, update_every=2, matrices=ALL),
        lro.i3s_adamw(1.0, rank=4, update_every=2, matrices=ALL),
        lro.ldadamw(1.0, rank=4, matrices=ALL),
        lro.mlorc_lion(1.0, 2, matrices=ALL),
    ],
    ids=["galore", "i3s", "ldadam", "lion"],
)
def test_small_matrices_of_any_method_are_factored_alike_by_kernels(tx):
    params = random_like({"w": (24, 40), "x": (2, 30, 24)}, 0)
    grads = [random_like(params, seed) for seed in range(3)]

    def steps(grads):
        update, state, found = jax.jit(tx.update), tx.init(params), []
        for g in grads:
            direction, state = update(g, state, params)
            found.append(direction)
        return found

    with lro.kernels.dispatch("xla"):
        expected = steps(grads)
    with interpreted("cuda"):
        names = names_of_kernels(tx.update, grads[0], tx.init(params), params)
        found = steps(grads)
        several = jax.vmap(lambda g: tx.update(g, tx.init(params), params)[0])(
            jax.tree.map(lambda *x: jnp.stack(x), *grads)
        )
    assert set(names) & set(OF_SMALL)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert relative(x, y) < 1e-4
    for x, y in zip(*map(jax.tree.leaves, (several, expected[0])), strict=True):
        assert relative(x[0], y) < 1e-4


@pytest.mark.parametrize("warm_start", [True, False])
def test_rank_one_without_oversampling_has_no_weights_of_squares(warm_start):
    tx = lro.mlorc_adamw(1.0, 1, oversample=0, warm_start=warm_start)
    params = random_like({"w": (24, 40), "x": (24, 40)}, 0)

    def last():
        update, state = jax.jit(tx.update), tx.init(params)
        for seed in range(3):
            found, state = update(random_like(params, seed), state, params)
        return found

    with lro.kernels.dispatch("xla"):
        expected = last()
    with interpreted("cuda"):
        found = last()
    for name, x in found.items():
        assert relative(x, expected[name]) < 1e-5


@pytest.mark.parametrize("name", ["galore", "lion", "adam"])
def test_kernels_are_taken_within_a_shard_map_that_checks_what_varies(name):
    tx = {
        "galore": lro.galore_adamw(1.0, rank=4),
        "lion": lro.mlorc_lion(1.0, 2),
        "adam": lro.mlorc_adamw(1.0, 2),
    }[name]
    grads = random_like({"w": (2, 24, 40)}, 0)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.PartitionSpec("d")

    def step(grads):
        mean = jax.tree.map(lambda x: jax.lax.pmean(x[0], "d"), grads)
        return tx.update(mean, tx.init(mean), mean)[0]

    none = jax.sharding.PartitionSpec()
    mapped = jax.shard_map(step, mesh=mesh, in_specs=split, out_specs=none)
    with interpreted("cuda"):
        assert names_of_kernels(mapped, grads)
    with lro.kernels.dispatch("pallas"):
        assert names_of_kernels(mapped, grads)


def test_auto_leaves_old_gpus_to_xla(on_a_gpu, monkeypatch):
    tx, params = lro.galore_adamw(1.0, rank=4), {"w": jnp.ones((24, 40))}
    state = tx.init(params)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for capability, kernels in (("7.5", False), ("8.0", True), ("gfx942", True)):
        device = type("Device", (), {"compute_capability": capability})()
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        jax.clear_caches()
        names = names_of_kernels(tx.update, params, state, params)
        assert bool(names) == kernels, capability


def test_a_shape_without_tiles_is_left_to_xla_and_named():
    tx, params = lro.adamw_8bit(1.0, block=100), {"w": jnp.ones((24, 256))}
    with interpreted("tpu"):
        with pytest.warns(UserWarning, match=r"blocks of 100 .* shape \(62, 100\)"):
            assert kernels_in(tx.update, params, tx.init(params), params) == 0


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Lets "auto" choose as where there is a GPU; what runs is compiled for a CPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.clear_caches()  # which know of one backend a process
    yield
    jax.clear_caches()


@pytest.mark.parametrize("name", METHODS)
def test_auto_takes_kernels_on_one_accelerator(name, on_a_gpu, monkeypatch):
    tx, (grads, state, *_) = METHODS[name](3), steps(name)[1][0]
    update = functools.partial(tx.update, params=grads)
    assert jax.device_count() > 1 and kernels_in(update, grads, state) == 0
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    jax.clear_caches()
    assert kernels_in(update, grads, state) > 0
    with lro.kernels.dispatch("xla"):
        assert kernels_in(update, grads, state) == 0
    # Where there is no kernel in the end, as here, it is the plain update.
    found, _ = jax.jit(lambda g, s: tx.update(g, s, grads))(grads, state)
    for x, y in zip(*map(jax.tree.leaves, (found, steps(name)[1][0][2])), strict=True):
        assert relative(x, y) < 1e-5


def test_auto_takes_kernels_on_a_mesh_within_shard_map_alone(on_a_gpu):
    tx, params = METHODS["mlorc"](2), {"w": jnp.ones((24, 40))}
    state = tx.init(params)
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 1), ("a", "b"), axis_types=kinds)

    def within(names):
        replicated = jax.sharding.PartitionSpec()
        mapped = jax.shard_map(
            tx.update,
            mesh=mesh,
            in_specs=replicated,
            out_specs=replicated,
            axis_names=names,
            check_vma=False,
        )
        return kernels_in(jax.jit(mapped), params, state, params)

    assert within({"a", "b"}) > 0
    assert within({"a"}) == 0  # "b" may still split
    with jax.set_mesh(mesh):
        assert kernels_in(jax.jit(tx.update), params, state, params) == 0


def test_wider_and_small_leaves_are_left_to_xla():
    with jax.enable_x64(True), interpreted("tpu"):
        for name in ("mlorc", "int8"):
            wide, small = jnp.ones((24, 256), jnp.float64), jnp.ones((2, 2))
            tx, params = METHODS[name](2), {"wide": wide, "small": small}
            assert kernels_in(tx.update, params, tx.init(params), params) == 0


# Equality


def gradients(name, seed, scale):
    """Of which no two singular values are close: their vectors are well defined."""
    shapes = dict(SHAPES)
    if name == "int8":
        shapes["wide"] = (40, 512)  # two blocks a row
    return {
        k: (scale * x / jnp.sqrt(1 + jnp.arange(x.shape[-1]))).astype(DTYPES[k])
        for k, x in random_like(shapes, seed).items()
    }


@functools.cache
def steps(name):
    """A compiled update, and by XLA's tier ``(gradients, state, update, next state)``.

    The last gradient is zero.
    """
    tx = METHODS[name](3)
    grads = [gradients(name, t, scale) for t, scale in enumerate((1.0, 0.1, 0.0))]
    state = tx.init(grads[0])
    update = jax.jit(lambda updates, state: tx.update(updates, state, grads[0]))
    found = []
    for g in grads:
        direction, new = update(g, state)
        found.append((g, state, direction, new))
        state = new
    return update, found


def moments(state):
    return {f: getattr(state[0].inner_state, f) for f in ("mu", "nu")}


def check_states(name, new, expected):
    assert jax.tree.structure(new) == jax.tree.structure(expected)
    if name != "int8":
        for field, codes in moments(new).items():
            for k in SHAPES:
                wanted = jnp.matmul(*moments(expected)[field][k])
                # The inverse of a sketch magnifies what sums in another order.
                assert relative(jnp.matmul(*codes[k]), wanted) < 1e-4, (field, k)
        return
    for x, y in zip(*map(jax.tree.leaves, (new, expected)), strict=True):
        if x.dtype == jnp.uint8:  # ties may be broken otherwise
            far = np.abs(np.asarray(x, int) - np.asarray(y, int))
            assert far.max() <= 1 and far.astype(bool).mean() < 5e-3
        else:
            assert relative(x, y) < 1e-5


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_that_of_the_xla_tier(name, platform):
    update, found = steps(name)
    with interpreted(platform):
        calls = len(SHAPES) * CALLS_A_LEAF[name]
        assert kernels_in(update, *found[0][:2]) == calls
        for grads, state, direction, new in found:
            got, got_state = update(grads, state)
            for k, x in got.items():
                assert x.dtype == DTYPES[k] and jnp.isfinite(x).all()
                # Where V alone crosses zero, 1 / sqrt(V) has no correct digits.
                if name == "int8" or grads[k].any():
                    tolerance = 1e-5 if DTYPES[k] == jnp.float32 else 4e-3
                    assert relative(x, direction[k]) < tolerance, k
            check_states(name, got_state, new)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_decay_near_one_keeps_its_digits(platform):
    update, ((grads, state, _, new), *_) = steps("mlorc")
    with interpreted(platform):
        _, got = update(grads, state)
    # 1 - 0.999 has four digits if 0.999 is rounded to float32 before.
    for k in SHAPES:
        x, y = (jnp.matmul(*moments(s)["nu"][k]) for s in (got, new))
        assert relative(x, y) < 5e-6


@pytest.mark.parametrize("warm_start", [False, True])
def test_faint_directions_count_without_oversampling(warm_start):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 3)))[0] for n in (40, 96))
    values = np.array([1, 1e-2, 1e-3])
    params = {"w": jnp.asarray((u * values) @ v.T, jnp.float32)}
    tx = lro.mlorc_adamw(1.0, 3, oversample=0, warm_start=warm_start)
    state, update = tx.init(params), jax.jit(tx.update)
    with interpreted("cuda"):
        for _ in range(3):
            _, state = update(params, state, params)
    mu = np.asarray(jnp.matmul(*moments(state)["mu"]["w"]))
    kept = np.diagonal(u.T @ mu @ v) / (1 - 0.8**3)
    np.testing.assert_allclose(kept, values, rtol=1e-2)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", PASSES)
def test_passes_at_a_rank_that_takes_matrix_products(name, platform):
    one = PASSES[name]
    sizes = {"m": 70, "n": 576, "r": 20, "l": 24, "1": 1}
    rng = np.random.default_rng(0)
    arrays = [
        jnp.asarray(rng.uniform(0.5, 1.5, (2, *(sizes[a] for a in axes))), jnp.float32)
        * (rng.choice([-1.0, 1.0]) if axes != "11" else 0.5)
        for axes in one.ins
    ]
    whole = one.at_once(*arrays)
    tiled = one(platform, True, *arrays)
    for x, y in zip(tiled, whole, strict=True):
        assert x.shape == y.shape and relative(x, y) < 1e-5


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("name", METHODS)
def test_bad_gradients_do_not_stay(name, bad):
    update, found = steps(name)
    grads, state = found[1][:2]
    spoiled = grads | {"wide": grads["wide"].at[3, 5].set(bad)}
    with interpreted("cuda"):
        got, new = update(spoiled, state)
    assert not jnp.isfinite(got["wide"]).all() and jnp.isfinite(got["stack"]).all()
    for field, old in moments(state).items():
        kept = moments(new)[field]
        assert (kept["stack"][0] != old["stack"][0]).any()
        # The matrix keeps what it had; in bytes, the block (of two a row) that saw it.
        blocks = (40, 2) if name == "int8" else (1,)
        for x, y in zip(kept["wide"], old["wide"], strict=True):
            changed = (x.reshape(*blocks, -1) != y.reshape(*blocks, -1)).any(-1)
            assert not changed[3, 0] if name == "int8" else not changed
            assert name != "int8" or changed.sum() > 70


@pytest.mark.parametrize("name", ["mlorc", "int8"])
def test_numbers_may_be_traced(name):
    make = {"mlorc": lro.mlorc_adamw, "int8": lro.adamw_8bit}[name]
    numbers = {"b1": 0.8, "b2": 0.95, "eps": 1e-6}
    params = {"w": random_like((24, 256), 0)}
    tx = lro.inject_hyperparams(make)(1e-2, **numbers)
    state, update, traced = tx.init(params), jax.jit(tx.update), []
    with interpreted("cuda"):
        assert kernels_in(update, params, state, params) == CALLS_A_LEAF[name]
        for b2 in (0.95, 0.9):
            state.hyperparams["b2"] = jnp.float32(b2)
            got, new = update(params, state, params)
            traced.append((got["w"], new.inner_state[0].inner_state.nu["w"]))
        assert update._cache_size() == 1  # other numbers are no other program
    for b2, (direction, code) in zip((0.95, 0.9), traced, strict=True):
        plain = make(1e-2, **numbers | {"b2": b2})
        expected, new = plain.update(params, plain.init(params), params)
        assert relative(direction, expected["w"]) < 1e-5
        fixed = moments(new)["nu"]["w"]
        if name == "mlorc":
            assert relative(jnp.matmul(*code), jnp.matmul(*fixed)) < 1e-5
        else:
            assert relative(code.largest, fixed.largest) < 1e-5


def test_what_is_compared_on_a_device_is_alike():
    tiers = functools.partial(lro.kernels.dispatch, "xla"), lambda: interpreted("cuda")
    found = differences({"a": (24, 256), "b": (256, 24)}, tiers)
    assert len(found) == 3 and all(0 <= x < 1e-3 for x in found.values())
    assert any(x > 0 for x in found.values())


# What is stored


def walk(jaxpr):
    """All equations outside of kernels."""
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name != "pallas_call":
            for inner in core.jaxprs_in_params(eqn.params):
                yield from walk(inner)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_profile_tells_kernels_by_their_names(platform):
    def names(tx):
        params = {"w": jnp.ones((64, 576))}
        state = tx.init(params)
        with interpreted(platform):
            program = jax.make_jaxpr(tx.update)(params, state, params)
        passes = [e for e in walk(program.jaxpr) if e.primitive.name == "pallas_call"]
        return {e.params["name"] for e in passes} - {"eliminate", "diagonalize"}

    mlorc = {"mlorc_sketches", "mlorc_projections"}
    assert names(lro.mlorc_scale_by_adam(rank=2)) == mlorc
    assert names(lro.adamw_8bit(0.1)) == {"adam_int8"}


# What reads its operands from memory; all else is fused with what makes them.
STORED = {"dot_general", "pallas_call", "optimization_barrier", "while", "scan"}


@pytest.mark.parametrize("shape", [(40, 576), (576, 40)], ids=["wide", "tall"])
def test_the_second_moment_is_never_stored(shape):
    tx, params = METHODS["mlorc"](3), {"w": jnp.ones(shape)}
    state = tx.init(params)

    def read():
        """Of each equation that reads whole matrices from memory, how many."""
        found = []
        for eqn in walk(jax.make_jaxpr(tx.update)(params, state, params).jaxpr):
            name, size = eqn.primitive.name, params["w"].size
            whole = [x for x in eqn.invars if math.prod(x.aval.shape) == size]
            made = [x for x in eqn.outvars if math.prod(x.aval.shape) == size]
            if name in STORED and (whole or made):
                found.append((name, len(whole), len(made)))
        return found

    assert read() == [("dot_general", 1, 0)] * 4  # each moment, or G, and its sketch
    for platform in PLATFORMS:
        with interpreted(platform):
            # G; of both moments, as a pass makes two products.
            assert read() == [("pallas_call", 1, 0)] * 2


def test_a_leaf_that_lies_transposed_is_not_moved():
    tx = METHODS["mlorc"](2)
    params = {"w": jnp.ones((96, 64))}
    with interpreted("tpu"):
        compiled = jax.jit(tx.update).lower(params, tx.init(params), params).compile()
    lines = compiled.as_text().splitlines()
    # Tiles are turned within the interpreter's loop, which is in registers on a device.
    turned = re.compile(r"= f32\[(1,)?64,96\]\S* (transpose|copy)\(")
    moved = [x for x in lines if turned.search(x)]
    assert moved and all("/while/" in x for x in moved)


# Lowering, for the layers of LLaMA-7B

LLAMA_7B = {"attention": (4096, 4096), "up": (4096, 11008), "down": (11008, 4096)}
CALLS = {"cuda": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}


# By jax 0.12, which lowers to Triton all the same.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name, rank", [("mlorc", 4), ("mlorc", 128), ("int8", 0)])
def test_methods_lower_on_shapes_of_llama_7b(name, rank, platform):
    tx = METHODS[name](rank)
    dtypes = {"attention": jnp.float32, "up": jnp.bfloat16, "down": jnp.bfloat16}
    params = {k: jax.ShapeDtypeStruct(s, dtypes[k]) for k, s in LLAMA_7B.items()}
    allowed = CALLS["cuda"], "LayoutConstraint"
    unchecked = list(map(jax.export.DisabledSafetyCheck.custom_call, allowed))
    # On a machine without one, jax 0.12 asks which GPU it lowers for.
    h100 = jax.sharding.AbstractDevice("NVIDIA H100", num_cores=132, platform="gpu")
    auto = jax.sharding.AxisType.Auto
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (auto,), abstract_device=h100)
    with lro.kernels.dispatch("pallas"), jax.sharding.use_abstract_mesh(mesh):
        export = jax.export.export(
            jax.jit(tx.update), platforms=[platform], disabled_checks=unchecked
        )
        text = export(params, jax.eval_shape(tx.init, params), params).mlir_module()
    # Wide factors are left to XLA: their product would be stored beside a kernel.
    calls = 0 if rank > 16 else len(LLAMA_7B) * CALLS_A_LEAF[name]
    if platform == "cuda" and name == "mlorc" and calls:
        calls += sum(OF_SMALL.values())  # once for all leaves
    assert text.count(f"@{CALLS[platform]}") == calls
    # On TPU, sketches that wait for those of other leaves lie by columns: of both
    # moments, as they are made and lifted.
    waiting = platform == "tpu" and name == "mlorc" and calls
    assert text.count("@LayoutConstraint") == (4 * len(LLAMA_7B) if waiting else 0)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("rank", [4, 128])
@pytest.mark.parametrize("shape", LLAMA_7B.values(), ids=LLAMA_7B)
def test_tiles_fit_fast_memory(shape, rank, platform):
    passes = {k: p if shape[0] <= shape[1] else p.turned for k, p in PASSES.items()}
    sizes = dict(zip("mn", sorted(shape), strict=True))
    sizes |= {"r": rank, "l": rank + 4, "1": 1}
    cuts = {k: p.plan(platform, sizes, jnp.float32) for k, p in passes.items()}
    # What an SM of the smallest GPU since Ampere gives a block; VMEM of a TPU core.
    limit = {"cuda": 99 * 1024, "tpu": 16 * 2**20}[platform]
    for name, cut in cuts.items():
        assert cut.bytes <= limit, name
        assert cut.block["m"] * cut.block["n"] * 4 < cut.bytes
        for axis in "mnrl":
            size = cut.taken(axis)
            if platform == "cuda":
                assert math.log2(size).is_integer() and size >= min(16, sizes[axis])
            elif axis in "mn":
                assert size % 128 == 0
    for dtype in (jnp.float32, jnp.bfloat16):
        rows = int8.rows_at_once(platform, shape[1], 256, dtype)
        if platform == "tpu":
            assert rows % 32 == 0
            assert int8.tpu_bytes(rows, shape[1], 256, dtype) <= limit
        else:
            assert math.log2(rows).is_integer()


def test_bytes_of_tiles_by_hand():
    sizes = {"m": 4096, "n": 4096, "r": 128, "l": 132, "1": 1}
    one = mlorc.SKETCHES
    numbers = one.ins.count("11")
    gpu = one.plan("cuda", sizes, jnp.bfloat16)
    m, n = gpu.block["m"], gpu.block["n"]
    # G, both factors, two Omegas in 256 rows, numbers, two tiles of values; sums stay
    # in registers.
    expected = 2 * m * n + 4 * 128 * (m + n) + 2 * 4 * 256 * n + 4 * numbers
    assert gpu.bytes == expected + 2 * 4 * m * n
    tpu = one.plan("tpu", sizes, jnp.bfloat16)
    m, n = tpu.block["m"], tpu.block["n"]
    thin = 128 * (m + n) + 2 * 136 * n + 2 * 256 * m + 8 * 128 * numbers
    assert tpu.bytes == 2 * (2 * m * n + 4 * thin) + 6 * 4 * m * n
    read_once = 4096 * 4096 * 2 + 4 * 4096 * (128 + 2 * 132) + 4 * numbers
    again = 4 * 4096 * (128 + 2 * 132) * tpu.steps("m")
    assert moved(tpu, one.ins, one.outs, jnp.bfloat16) == read_once + again


def test_what_fits_no_tile_is_left_to_xla():
    sizes = {"m": 4096, "n": 4096, "r": 4096, "l": 4096, "1": 1}
    assert mlorc.SKETCHES.plan("cuda", sizes, jnp.float32) is None
    assert int8.rows_at_once("tpu", 2**20, 256, jnp.float32) == 0
    assert int8.rows_at_once("cuda", 300, 100, jnp.float32) == 0
    for size, kernels in ((60, 1), (4096, 0)):
        arrays = [
            jax.ShapeDtypeStruct(
                (1, *(1 if a == "1" else size for a in axes)), "float32"
            )
            for axes in mlorc.SKETCHES.ins
        ]
        run = functools.partial(mlorc.SKETCHES, "cuda", True)
        assert kernels_in(run, *arrays) == kernels


def test_tiles_are_cut_to_the_axes_and_on_gpu_to_powers_of_two():
    given = ("mn",), ("mn",)
    for sizes, cuda, tpu in [
        ({"m": 100, "n": 20}, {"m": 128, "n": 32}, {"m": 100, "n": 20}),
        ({"m": 5, "n": 4000}, {"m": 16, "n": 32}, {"m": 5, "n": 512}),
        ({"m": 4000, "n": 4000}, {"m": 128, "n": 32}, {"m": 256, "n": 512}),
    ]:
        for platform, block in (("cuda", cuda), ("tpu", tpu)):
            found = plan.plan(platform, *given, "n", sizes, jnp.float32)
            assert found is not None and found.block == block


@pytest.mark.parametrize(
    ("platform", "over", "block"),
    [
        ("cuda", "n", {"m": 128, "n": 32}),
        ("cuda", "m", {"m": 32, "n": 128}),
        ("tpu", "n", {"m": 256, "n": 512}),
        ("tpu", "m", {"m": 256, "n": 512}),
    ],
)
def test_on_gpu_tiles_are_longer_along_the_axis_that_stays(platform, over, block):
    sizes = {"m": 4000, "n": 4000}
    found = plan.plan(platform, ("mn",), ("mn",), over, sizes, jnp.float32)
    assert found is not None and found.block == block


def test_what_bytes_take_on_a_tpu_is_at_least_their_blocks_twice():
    for rows, cols, dtype in [(32, 4096, jnp.float32), (64, 11008, jnp.bfloat16)]:
        # A gradient and an update, the codes of two moments read and written.
        blocks = rows * cols * (2 * jnp.dtype(dtype).itemsize + 4)
        found = int8.tpu_bytes(rows, cols, 256, dtype)
        assert 2 * blocks < found < 2 * blocks + 2**20 * rows / 8


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_only_a_gpu_keeps_thin_products_apart(platform):
    traced = jax.jit(lambda x: products.kept_apart(2 * x) + 1).trace(jnp.ones(3))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("optimization_barrier" in text) == (platform == "cuda")
