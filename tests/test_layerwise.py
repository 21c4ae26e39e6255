"""Per-layer updates are the ordinary step's, in place, or refused with the reason."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from registry import METHODS as REGISTRY
from running import assert_close, random_like

import lowrank_optax as lro

VOCAB, WIDTH, WIDE, DEPTH, STEPS = 11, 6, 10, 3, 5


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def embed(outer, batch):
    return outer["embed"][batch["in"]]


def mix(w, x, batch):
    return x + jnp.tanh(norm(x) @ w["mix"]["kernel"])


def feed(w, x, batch):
    y = jnp.tanh(norm(x) * w["norm"]["scale"] @ w["up"]["kernel"])
    return x + y @ w["down"]["kernel"]


def cross_entropy(logits, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["out"])
    return losses.mean()


def head(outer, x, batch):
    return cross_entropy(norm(x) * outer["scale"] @ outer["lm_head"], batch)


def tied_head(outer, x, batch):
    return cross_entropy(norm(x) * outer["scale"] @ outer["embed"].T, batch)


MODEL = dict(embed=embed, layer=[mix, feed], head=head)


def matrices(params):
    """Kernels, without the layers' axis; vectors are no rows of a matrix."""

    def axes(path, x):
        return lro.MatrixAxes() if "kernel" in jax.tree_util.keystr(path) else None

    return jax.tree_util.tree_map_with_path(axes, params)


@pytest.fixture(scope="module")
def params():
    stack = {
        "mix": {"kernel": (DEPTH, WIDTH, WIDTH)},
        "norm": {"scale": (DEPTH, WIDTH)},
        "up": {"kernel": (DEPTH, WIDTH, WIDE)},
        "down": {"kernel": (DEPTH, WIDE, WIDTH)},
    }
    outer = {"embed": (VOCAB, WIDTH), "scale": (WIDTH,), "lm_head": (WIDTH, VOCAB)}
    normal = random_like(outer | {"layers": stack}, 0)
    return jax.tree.map(lambda x: 0.3 * x, normal)  # no gradient vanishes in a tanh


def batches():
    for i in range(STEPS):
        keys = jax.random.split(jax.random.key(i))
        draw = (jax.random.randint(k, (2, 4), 0, VOCAB) for k in keys)
        yield dict(zip(("in", "out"), draw, strict=True))


def ordinary(tx, params, model=MODEL, given=None):
    """``(loss, norm of the gradient)`` of each step, the last parameters and state."""
    layer = model["layer"] if isinstance(model["layer"], list) else [model["layer"]]

    def loss(params, batch):
        x = model["embed"](params, batch)
        for i in range(len(jax.tree.leaves(params["layers"])[0])):
            w = jax.tree.map(lambda x, i=i: x[i], params["layers"])
            for block in layer:
                x = block(w, x, batch)
        return model["head"](params, x, batch)

    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return value, optax.tree.norm(grads), params, state

    return follow(step, params, tx.init(params), given)


def layerwise(tx, params, model=MODEL, given=None, clip=None):
    step = lro.layerwise.value_and_update(tx, **model, clip=clip)
    step = jax.jit(step, donate_argnums=(0, 1))
    return follow(step, jax.tree.map(jnp.copy, params), tx.init(params), given)


def follow(step, params, state, given):
    losses = []
    for batch in given or batches():
        value, grad_norm, params, state = step(params, state, batch)
        losses.append((value, grad_norm))
    return losses, params, state


METHODS = {
    "adamw": optax.adamw(0.05, weight_decay=0.1),
    "mlorc_adamw": lro.mlorc_adamw(0.05, 2, matrices=matrices, weight_decay=0.1),
    # Its sketches are random, and so is where the bases come from.
    "galore_adamw": lro.galore_adamw(
        lambda count: 0.05 / (1 + count), 2, update_every=3, matrices=matrices
    ),
    "i3s_subspace": lro.inject_hyperparams(lro.i3s_adamw)(
        0.05, rank=2, update_every=3, matrices=matrices
    ),
    "apollo_adamw": lro.apollo_adamw(0.05, 2, update_every=3, matrices=matrices),
    "two rates": lro.two_rates(lro.galore_adamw)(
        0.05, 2, update_every=3, matrices=matrices, dense_learning_rate=0.01
    ),
    "fira_adamw": lro.fira_adamw(0.05, 2, update_every=3, matrices=matrices),
    "mlorc_lion without a warm start": lro.mlorc_lion(
        0.05, 2, matrices=matrices, warm_start=False
    ),
    "adarankgrad_adamw": lro.adarankgrad_adamw(
        0.05, 2, max_interval=3, min_interval=1, matrices=matrices
    ),
    "q_galore_project": optax.chain(
        lro.q_galore_project(
            optax.scale_by_adam(), rank=2, update_every=1, matrices=matrices
        ),
        optax.scale_by_learning_rate(0.05),
    ),
    "a compressed trace": optax.chain(
        lro.compress_state(
            optax.trace(0.9), {"trace": lro.LowRank(2)}, matrices=matrices
        ),
        optax.scale_by_learning_rate(0.01),
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_trajectory_is_that_of_the_ordinary_step(params, name):
    expected, got = (run(METHODS[name], params) for run in (ordinary, layerwise))
    # 5 steps of 0.05; MLorc's inner products are added up in another order.
    assert_close(got[:2], expected[:2], rtol=1e-5, atol=1e-5)
    assert_close(got[2], expected[2], rtol=1e-3, atol=1e-4)


# Of stacked vectors, Adafactor factors the matrix of all layers, and Adam-mini's number
# of blocks is that of all layers.
OF_ALL_LAYERS = {"galore_adafactor", "flora", "adam_mini", "galore_adam_mini"}


@pytest.mark.parametrize(
    "method",
    [m for m in REGISTRY if m.is_optimizer and m.name not in METHODS],
    ids=lambda m: m.name,
)
def test_every_other_optimizer_is_taken_or_refused(params, method):
    takes = inspect.signature(method.factory).parameters
    tx = method.make(**{"matrices": matrices} if "matrices" in takes else {})
    step = lro.layerwise.value_and_update(tx, **MODEL)
    state = jax.eval_shape(tx.init, params)
    if method.name in OF_ALL_LAYERS:
        with pytest.raises(ValueError, match="requires an entry for each layer"):
            jax.eval_shape(step, params, state, next(batches()))
    else:
        found = jax.eval_shape(step, params, state, next(batches()))
        chex.assert_trees_all_equal_shapes_and_dtypes(found.params, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(found.opt_state, state)


def test_bytes_of_layers_that_alone_would_be_too_small_for_them():
    wide = {"kernel": (2, 64, 40), "scale": (2, 2560)}  # from 4,096 numbers on
    params = random_like({"layers": wide, "last": (40,)}, 0)
    # Nothing saturates, or gradients of rounding errors would decide the directions.
    model = dict(
        embed=lambda outer, batch: batch,
        layer=lambda w, x, batch: (
            x + jnp.tanh(0.1 * x @ w["kernel"]).mean() * w["scale"][:64]
        ),
        head=lambda outer, x, batch: jnp.sum(jnp.tanh(x[:40]) * outer["last"]),
    )
    tx = lro.adamw_8bit(0.05, block=64)
    state = jax.tree.leaves(jax.eval_shape(tx.init, params))
    assert [x.dtype for x in state].count(jnp.uint8) == 4
    given = [0.1 * random_like((64,), i) for i in range(3)]
    expected, got = (run(tx, params, model, given) for run in (ordinary, layerwise))
    assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)
    # On the mean: a moment between two numbers of the map may go to either of them.
    means = jax.tree.map(lambda a, b: jnp.mean(jnp.abs(a - b)), got[1], expected[1])
    assert max(jax.tree.leaves(means)) < 1e-5


def test_blocks_are_a_matter_of_memory_alone(params):
    layer = dict(MODEL, layer=lambda w, x, batch: feed(w, mix(w, x, batch), batch))
    expected = layerwise(METHODS["mlorc_adamw"], params)
    got = layerwise(METHODS["mlorc_adamw"], params, layer)
    assert_close(got[1], expected[1], rtol=1e-4, atol=1e-5)


def test_a_clip_by_the_global_norm(params):
    clip = 0.3
    tx = METHODS["adamw"]
    expected = ordinary(optax.chain(optax.clip_by_global_norm(clip), tx), params)
    got = layerwise(tx, params, clip=clip)
    assert_close(got[:2], expected[:2], rtol=1e-5, atol=1e-5)
    norms = [float(grad_norm) for _, grad_norm in got[0]]
    assert min(norms) > clip  # or it would have done nothing
    # Within the optimizer, it would see one layer at a time.
    assert_close(layerwise(tx, params, clip=1e9)[1], layerwise(tx, params)[1])


def test_parameters_that_are_used_twice_or_never(params):
    model = dict(
        embed=embed,
        head=tied_head,
        layer=[mix, feed, lambda w, x, batch: mix(w, x, batch)],
    )
    tx = METHODS["adamw"]
    idle = {"idle": jnp.ones(3)}
    params = params | idle
    params["layers"] = params["layers"] | {"idle": jnp.ones((DEPTH, 2))}
    expected, got = (run(tx, params, model) for run in (ordinary, layerwise))
    assert_close(got[:2], expected[:2], rtol=1e-5, atol=1e-5)
    assert float(got[1]["idle"][0]) < 1  # it decays


def test_narrow_parameters_keep_their_types(params):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tx = METHODS["mlorc_adamw"]
    expected, got = (run(tx, narrow) for run in (ordinary, layerwise))
    chex.assert_trees_all_equal_dtypes(got[1], narrow)
    assert_close(got[1], expected[1], rtol=0.1, atol=0.1)


def test_the_clip_of_narrow_gradients_is_not_rounded_itself(params):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tx, batch = (
        optax.trace(0.9),
        next(iter(batches())),
    )  # its first trace is the gradient
    whole, clipped = (
        lro.layerwise.value_and_update(tx, **MODEL, clip=clip)(
            narrow, tx.init(narrow), batch
        )
        for clip in (1e9, 0.3)
    )
    factor = 0.3 / np.float32(whole.grad_norm)
    assert factor < 1 and jnp.asarray(factor, jnp.bfloat16) != factor
    for g, found in zip(
        jax.tree.leaves(whole.opt_state.trace),
        jax.tree.leaves(clipped.opt_state.trace),
        strict=True,
    ):
        assert g.dtype == found.dtype == jnp.bfloat16
        expected = (np.asarray(g, np.float32) * factor).astype(jnp.bfloat16)
        np.testing.assert_array_equal(found, expected)


# Memory


def test_weights_are_written_in_place_and_no_gradient_of_all_layers_exists():
    width, depth = 256, 16
    shapes = {"kernel": jax.ShapeDtypeStruct((depth, width, width), jnp.float32)}
    params = {"layers": shapes, "head": jax.ShapeDtypeStruct((width,), jnp.float32)}
    specs = {"layers": {"kernel": lro.MatrixAxes()}, "head": None}
    x = jax.ShapeDtypeStruct((4, width), jnp.float32)
    for tx in (lro.mlorc_adamw(0.1, matrices=specs), optax.adamw(0.1)):
        step = lro.layerwise.value_and_update(
            tx,
            embed=lambda outer, batch: batch,
            layer=lambda w, x, batch: x + jnp.tanh(x @ w["kernel"]),
            head=lambda outer, x, batch: jnp.mean((x @ outer["head"]) ** 2),
        )
        step = jax.jit(step, donate_argnums=(0, 1))
        state = jax.eval_shape(tx.init, params)
        compiled = step.lower(params, state, x).compile()
        usage = compiled.memory_analysis()
        one = 4 * width * width
        assert usage.alias_size_in_bytes >= depth * one
        assert usage.temp_size_in_bytes < 6 * one < depth * one


# Refused


def check(message, tx=METHODS["adamw"], params=None, **changes):
    with pytest.raises(ValueError, match=message):
        step = lro.layerwise.value_and_update(tx, **MODEL | changes)
        state = jax.eval_shape(tx.init, params)
        jax.eval_shape(step, params, state, next(batches()))


def test_what_cannot_be_taken_apart_is_refused(params):
    name = "Cannot use layerwise.value_and_update with "
    steps = optax.MultiSteps(optax.adamw(0.1), 2).gradient_transformation()
    forgotten = ".*each gradient is used at once and then forgotten"
    check(name + "MultiStepsState" + forgotten, steps, params)
    summed = lro.galore_adamw(0.1, 2, matrices=matrices)
    summed = lro.accumulate_gradients(summed, 2)
    check(name + "AccumulateState" + forgotten, summed, params)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), METHODS["adamw"])
    check(name + "optax.clip_by_global_norm.*give .* its `clip`", clipped, params)
    # Within others, and within an engine.
    labels = {"layers": "a", "embed": "b", "scale": "b", "lm_head": "b"}
    parts = {"a": optax.lamb(0.1), "b": optax.sgd(0.1)}
    check(name + "optax.scale_by_trust_ratio", optax.partition(parts, labels), params)
    inner = optax.chain(optax.trace(0.9), optax.clip_by_block_rms(1.0))
    inside = lro.galore_project(inner, rank=2, matrices=matrices)
    check(name + "optax.clip_by_block_rms", inside, params)
    for noisy in (
        optax.add_noise(0.1, 0.55, key=jax.random.key(0)),
        optax.noisy_sgd(0.1, key=jax.random.key(0)),
    ):
        check(name + "optax.add_noise.*the same noise", noisy, params)
    # A number of the whole model, made of all gradients.
    whole = optax.contrib.prodigy()
    check(name + "the state field 'estim_lr'.*not depend on the others", whole, params)
    finite = optax.apply_if_finite(optax.adamw(0.1), 3)
    check(name + "ApplyIfFiniteState.*layer by layer", finite, params)
    # The stacked scales are taken for one matrix.
    rules = lro.matrix_rules({"norm/scale": lro.MatrixAxes()}, otherwise=matrices)
    merged = lro.mlorc_adamw(0.1, 2, matrices=rules)
    check(name + "the state field '0/.*norm/scale.*None for stacked", merged, params)


def test_on_a_gpu_the_stacks_are_carried_as_they_lie(params):
    """Else XLA turns them, and copies them whole before the loop and after it."""
    tx, batch = METHODS["adamw"], next(batches())

    def demands(params, platform):
        step = jax.jit(lro.layerwise.value_and_update(tx, **MODEL))
        traced = step.trace(params, tx.init(params), batch)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return text.count("@LayoutConstraint")

    stacks = jax.tree.leaves((params["layers"],) * 3)  # weights and both moments
    assert demands(params, "cuda") == len(stacks)
    assert demands(params, "cpu") == 0
    # It would be gathered where it may be split.
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    assert demands(split, "cuda") == 0


def test_parameters_must_be_stacks_at_a_name(params):
    flat = {name: x for name, x in params.items() if name != "layers"}
    check(
        r"stacked layers at 'layers', got \['embed', 'lm_head', 'scale'\]", params=flat
    )
    uneven = {"a": jnp.ones((3, 2)), "b": jnp.ones((4, 2))}
    check("stacks of one depth", params=flat | {"layers": uneven})
