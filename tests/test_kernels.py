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
from running import random_like

import lowrank_optax as lro
from benchmarks.kernels import moved
from lowrank_optax._src.kernels import int8, mlorc, projected_adam
from lowrank_optax._src.kernels.adam import Adam, recognize
from lowrank_optax._src.kernels.dispatch import interpreted

PLATFORMS = ["cuda", "tpu"]
PASSES = {
    "mlorc_adam": mlorc.ADAM,
    "mlorc_adam_sketches": mlorc.ADAM_SKETCHES,
    "mlorc_lion": mlorc.LION,
    "mlorc_lion_sketch": mlorc.LION_SKETCH,
}
# Edges of tiles: 576 columns are 9 steps of 64, which two programs on GPU share as 5
# and 4, and 2 of 512 on TPU; 270 rows are 2 of 256. The stack is seen transposed.
SHAPES = {"wide": (40, 576), "stack": (2, 300, 270)}
DTYPES = {"wide": jnp.float32, "stack": jnp.bfloat16}
METHODS = {
    "adam": lambda rank: lro.mlorc_scale_by_adam(rank, matrices=lro.MatrixAxes()),
    "lion": lambda rank: lro.mlorc_scale_by_lion(  # with the paper's sketch
        rank, oversample=0, warm_start=False, matrices=lro.MatrixAxes()
    ),
    "galore": lambda rank: lro.galore_project(
        optax.scale_by_adam(),
        rank=rank,
        update_every=2,
        scale=0.25,
        matrices=lro.MatrixAxes(),
    ),
    "int8": lambda rank: lro.quantize_state(optax.scale_by_adam()),
}


def kernels_in(function, *args):
    """How many kernels there are in what a function traces to."""
    return str(jax.make_jaxpr(function)(*args)).count("pallas_call[")


def relative(x, y):
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    return np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)


# Choice


def test_the_tier_is_part_of_the_key_of_each_compilation():
    tx = METHODS["lion"](2)
    params = {"w": jnp.ones((24, 40))}
    state = tx.init(params)
    traced = []

    @jax.jit
    def step(grads):
        traced.append(kernels_in(tx.update, grads, state))
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
    tx = METHODS["lion"](2)
    params = {"w": jnp.ones((24, 40))}
    count = functools.partial(kernels_in, tx.update, params, tx.init(params))
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
    tx = METHODS["lion"](2)
    params = {"w": jnp.ones((24, 40))}
    with lro.kernels.dispatch("pallas"):
        with pytest.raises(ValueError, match="Only interpret mode .* on CPU"):
            jax.jit(tx.update)(params, tx.init(params))


def test_adam_is_recognized_by_its_numbers():
    seen = recognize(optax.scale_by_adam(0.8, b2=0.99, eps=1e-6, eps_root=1e-5))
    assert seen == Adam(0.8, 0.99, 1e-6, 1e-5)
    others = (
        optax.scale_by_adam(nesterov=True),
        optax.scale_by_adam(mu_dtype=jnp.bfloat16),
        optax.scale_by_lion(),
        optax.chain(optax.scale_by_adam()),
        optax.with_extra_args_support(optax.scale_by_lion()),
    )
    assert [recognize(tx) for tx in others] == [None] * len(others)


@pytest.mark.parametrize(
    "tx",
    [
        lro.mlorc_scale_by_adam(2, power_iters=1),
        lro.mlorc_scale_by_adam(2, compress=("mu",)),
        lro.mlorc_scale_by_adam(24),  # the whole space is its own range
        lro.galore_project(optax.scale_by_lion(), rank=2),
        lro.fira_project(optax.scale_by_adam(), rank=2),
        lro.quantize_state(optax.scale_by_lion()),
        lro.compress_state(optax.scale_by_adam(), {"mu": lro.BlockInt8(True)}),
    ],
    ids=["power", "mu", "full", "lion", "fira", "int8 lion", "half int8"],
)
def test_what_has_no_kernel_is_left_to_xla(tx):
    params = {"w": jnp.ones((24, 256))}
    with interpreted("tpu"):
        assert kernels_in(tx.update, params, tx.init(params)) == 0


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


def check_states(name, new, expected):
    if name in ("adam", "lion"):
        for field in ("mu", "nu")[: 1 + (name == "adam")]:
            codes, others = (getattr(s.inner_state, field) for s in (new, expected))
            for k in SHAPES:
                product, wanted = (jnp.matmul(*x[k]) for x in (codes, others))
                # The inverse of a sketch magnifies what sums in another order, a
                # thousandfold at most.
                assert relative(product, wanted) < 1e-4, (field, k)
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
        passes = kernels_in(update, *found[0][:2])
        assert passes == len(SHAPES) * (2 if name in ("adam", "lion") else 1)
        for grads, state, direction, new in found:
            got, got_state = update(grads, state)
            for k in SHAPES:
                x, y = got[k], direction[k]
                assert x.dtype == DTYPES[k] and jnp.isfinite(x).all()
                if name == "adam" and not grads[k].any():
                    # Where V alone crosses zero, 1 / sqrt(V) has no correct digits.
                    v = jnp.matmul(*state.inner_state.nu[k])
                    sure = jnp.abs(v) > 0.1 * jnp.abs(v).mean()
                    sure = sure if sure.shape == x.shape else sure.mT
                    assert sure.mean() > 0.2
                    x, y = x[sure], y[sure]
                tolerance = 1e-5 if DTYPES[k] == jnp.float32 else 4e-3
                assert relative(x, y) < tolerance, k
            assert jax.tree.structure(got_state) == jax.tree.structure(new)
            check_states(name, got_state, new)


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
    whole = jax.vmap(one.whole)(*arrays)
    tiled = one.on(platform, True, *arrays)
    for x, y in zip(tiled, whole, strict=True):
        assert x.shape == y.shape and relative(x, y) < 1e-5


@pytest.mark.parametrize("name", ["adam", "lion", "galore", "int8"])
def test_bad_gradients_do_not_stay(name):
    update, found = steps(name)
    grads, state = found[1][:2]
    bad = grads | {"wide": grads["wide"].at[3, 5].set(jnp.nan)}
    with interpreted("cuda"):
        got, new = update(bad, state)
    assert not jnp.isfinite(got["wide"]).all() and jnp.isfinite(got["stack"]).all()
    for field in ("mu", "nu")[: 1 + (name != "lion")]:
        old, kept = (getattr(s.inner_state, field)["wide"] for s in (state, new))
        jax.tree.map(np.testing.assert_array_equal, kept, old)


def test_numbers_may_be_traced():
    tx = lro.inject_hyperparams(lro.galore_adamw)(1e-2, rank=2, b1=0.8, scale=0.5)
    params = {"w": random_like((24, 40), 0)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    expected, _ = update(params, state, params)
    with interpreted("cuda"):
        assert kernels_in(update, params, state, params) == 1
        got, _ = update(params, state, params)
    assert relative(got["w"], expected["w"]) < 1e-5


def test_a_kept_basis_costs_no_product_outside_the_pass():
    tx = METHODS["galore"](3)
    params = {"w": jnp.ones((24, 40))}
    with interpreted("tpu"):
        lowered = jax.jit(tx.update).lower(params, tx.init(params))
    text = lowered.as_text()
    start = text.index("func.func private @body(")
    results = text[start : text.index("{", start)].partition("->")[2]
    # The basis and the moments, but no projected gradient.
    assert results.count("tensor<") == 3 and "tensor<24x3xf32>" in results


def test_a_leaf_that_lies_transposed_is_not_moved():
    tx = METHODS["lion"](2)
    params = {"w": jnp.ones((96, 64))}
    with interpreted("tpu"):
        compiled = jax.jit(tx.update).lower(params, tx.init(params)).compile()
    lines = compiled.as_text().splitlines()
    # Tiles are turned within the interpreter's loop, which is in registers on a device.
    turned = re.compile(r"= f32\[(1,)?64,96\]\S* (transpose|copy)\(")
    moved = [x for x in lines if turned.search(x)]
    assert moved and all("/while/" in x for x in moved)


# Lowering, for the layers of LLaMA-7B

LLAMA_7B = {"attention": (4096, 4096), "up": (4096, 11008), "down": (11008, 4096)}
CALLS = {"cuda": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    "name, rank, calls",
    [
        ("adam", 4, 6),
        ("adam", 128, 6),
        ("lion", 4, 6),
        ("lion", 128, 6),
        ("galore", 4, 3),
        ("galore", 128, 3),
        ("int8", 0, 3),
    ],
)
def test_methods_lower_on_shapes_of_llama_7b(name, rank, calls, platform):
    tx = METHODS[name](rank)
    dtypes = {"attention": jnp.float32, "up": jnp.bfloat16, "down": jnp.bfloat16}
    params = {k: jax.ShapeDtypeStruct(s, dtypes[k]) for k, s in LLAMA_7B.items()}
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(CALLS["cuda"])]
    with lro.kernels.dispatch("pallas"):
        export = jax.export.export(
            jax.jit(tx.update), platforms=[platform], disabled_checks=unchecked
        )
        text = export(params, jax.eval_shape(tx.init, params)).mlir_module()
    assert text.count(f"@{CALLS[platform]}") == calls


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("rank", [4, 128])
@pytest.mark.parametrize("shape", LLAMA_7B.values(), ids=LLAMA_7B)
def test_tiles_fit_fast_memory(shape, rank, platform):
    passes = {k: p if shape[0] <= shape[1] else p.turned for k, p in PASSES.items()}
    sizes = dict(zip("mn", sorted(shape), strict=True))
    sizes |= {"r": rank, "k": rank, "l": rank + 4, "1": 1}
    cuts = {k: p.plan(platform, sizes, jnp.float32) for k, p in passes.items()}
    cuts["projected"] = projected_adam.cut_for(platform, sizes, jnp.float32)
    # What an SM of the smallest GPU since Ampere gives a block; VMEM of a TPU core.
    limit = {"cuda": 99 * 1024, "tpu": 16 * 2**20}[platform]
    for name, cut in cuts.items():
        assert cut.bytes <= limit, name
        assert cut.block["m"] * cut.block["n"] * 4 < cut.bytes
        for axis in "mnrlk":
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
    gpu = mlorc.LION.plan("cuda", sizes, jnp.bfloat16)
    m, n = gpu.block["m"], gpu.block["n"]
    # G and the update, both factors, Omega in 256 rows, b1, two tiles of values.
    expected = 2 * 2 * m * n + 4 * 128 * (m + n) + 4 * 256 * n + 4 + 2 * 4 * m * n
    assert gpu.bytes == expected
    tpu = mlorc.LION.plan("tpu", sizes, jnp.bfloat16)
    m, n = tpu.block["m"], tpu.block["n"]
    blocks = 2 * 2 * m * n + 4 * (128 * (m + n) + 136 * n + 256 * m + 8 * 128)
    assert tpu.bytes == 2 * blocks + 6 * 4 * m * n
    read_once = 4096 * 4096 * 2 * 2 + 4 * 4096 * (128 + 132) + 4
    again = 4 * 4096 * (128 + 132) * tpu.steps("m")
    passed = mlorc.LION
    assert moved(tpu, passed.ins, passed.outs, jnp.bfloat16) == read_once + again


def test_what_fits_no_tile_is_left_to_xla():
    sizes = {"m": 4096, "n": 4096, "r": 4096, "l": 4096, "1": 1}
    assert mlorc.ADAM.plan("cuda", sizes, jnp.float32) is None
    assert int8.rows_at_once("tpu", 2**20, 256, jnp.float32) == 0
    assert int8.rows_at_once("cuda", 300, 100, jnp.float32) == 0
    arrays = [
        jnp.ones((1, *(min(sizes[a], 600) for a in axes)))
        for axes in mlorc.LION_SKETCH.ins
    ]
    run = functools.partial(mlorc.LION_SKETCH.on, "cuda", True)
    assert kernels_in(run, *arrays) == 1
