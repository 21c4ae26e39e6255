"""The training modes of the examples: LoRA, DoRA, ReLoRA, plain factorization."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import lowrank_optax as lro
from examples.common.adapters import (
    ALPHA,
    DoRALinear,
    FactorizedLinear,
    LoRALinear,
    adapt,
    freeze,
    is_frozen,
    merge,
    trained_parameters,
)
from examples.common.interrupt import Interrupted, StopRequest
from examples.common.loop import Task, Timetable, train
from examples.common.metrics import read_metrics
from examples.common.probe import Probe
from examples.common.relora import RestartState, relora_adamw, rewarmed
from examples.llama.config import LlamaConfig
from examples.llama.model import Llama
from examples.llama.pretrain import main
from examples.llama.weights import load_llama, save_llama

RANK, SCALE = 2, ALPHA / 2
LAYOUTS = {"separate": False, "stacked": True}
KINDS = {"lora": LoRALinear, "dora": DoRALinear, "factorized": FactorizedLinear}
# Each layout and each kind once, where compilation is slow.
PAIRS = [("separate", "lora"), ("stacked", "dora")]
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 13, (2, 5)), jnp.int32)

forward = nnx.jit(Llama.__call__)


def config(scan_layers):
    return LlamaConfig(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        initializer_range=0.3,
        scan_layers=scan_layers,
    )


def base_model(layout):
    return Llama(config(LAYOUTS[layout]), rngs=nnx.Rngs(1))


def adapted(layout, kind, rank=RANK):
    model = base_model(layout)
    adapt(model.layers, KINDS[kind], rank, rngs=nnx.Rngs(2))
    return model


def randomize(model, seed=3):
    """Every trained number of the adapters moved, as if by training."""
    rng = np.random.default_rng(seed)
    for path, param in nnx.to_flat_state(nnx.state(model.layers, nnx.Param)):
        if path[-1] in ("lora_a", "lora_b", "magnitude"):
            moved = param[...] + 0.1 * rng.standard_normal(param.shape)
            param[...] = jnp.asarray(moved, param.dtype)
    return model


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def linear_params(params, layout):
    """What stands in the place of the up-projection of the (last) layer, in NumPy."""
    layers = params["layers"]
    layer = layers if layout == "stacked" else layers[1]
    found = layer["mlp"]["up_proj"]
    last = (lambda x: x[-1]) if layout == "stacked" else (lambda x: x)
    return jax.tree.map(lambda x: np.float64(last(x)), found)


def numpy_weight(kind, p):
    """The papers' formulas, on (in, out) kernels."""
    product = p["lora"]["lora_a"] @ p["lora"]["lora_b"]
    if kind == "factorized":
        return product
    weight = p["frozen"] + SCALE * product
    if kind == "lora":
        return weight
    norms = np.sqrt(np.sum(weight**2, axis=0))
    return p["magnitude"] * weight / norms


# The modules


@pytest.mark.parametrize(("layout", "kind"), PAIRS)
def test_an_adapted_model_starts_as_the_model_it_adapts(layout, kind):
    expected = forward(base_model(layout), IDS)
    np.testing.assert_allclose(forward(adapted(layout, kind), IDS), expected, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_factors_start_as_the_best_approximation(layout):
    kernel = linear_params(params_of(base_model(layout)), layout)["kernel"]
    u, s, vt = np.linalg.svd(kernel)
    p = linear_params(params_of(adapted(layout, "factorized")), layout)
    assert set(p) == {"lora"}
    best = u[:, :RANK] * s[:RANK] @ vt[:RANK]
    np.testing.assert_allclose(numpy_weight("factorized", p), best, atol=1e-5)
    a, b = p["lora"]["lora_a"], p["lora"]["lora_b"]
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), s[:RANK] ** 0.5, rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(b, axis=1), s[:RANK] ** 0.5, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_magnitude_starts_as_the_norm_of_each_output(layout):
    p = linear_params(params_of(adapted(layout, "dora")), layout)
    assert p["magnitude"].shape == (1, 12)
    expected = [np.linalg.norm(p["frozen"][:, j]) for j in range(12)]
    np.testing.assert_allclose(p["magnitude"][0], expected, rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_starts_within_the_bound_of_peft(layout):
    model = base_model(layout)
    adapt(model.layers, LoRALinear, 8, rngs=nnx.Rngs(2))
    layers = params_of(model)["layers"]
    stacks = [layers] if layout == "stacked" else list(layers.values())
    for name, size_in in (("up_proj", 8), ("down_proj", 12)):
        drawn = [np.ravel(layer["mlp"][name]["lora"]["lora_a"]) for layer in stacks]
        a = np.abs(np.concatenate(drawn)) * size_in**0.5
        assert 0.9 < a.max() <= 1 and a.mean() == pytest.approx(0.5, abs=0.1)
        assert len(np.unique(a)) == a.size  # no layer repeats another's


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_and_saved_weights_give_the_same_logits(layout, kind, tmp_path):
    model = randomize(adapted(layout, kind))
    before, logits = params_of(model), forward(model, IDS)
    assert np.abs(logits - forward(base_model(layout), IDS)).max() > 0.05
    merge(model.layers)
    kernel = linear_params(params_of(model), layout)["kernel"]
    expected = numpy_weight(kind, linear_params(before, layout))
    np.testing.assert_allclose(kernel, expected, atol=1e-5)
    np.testing.assert_allclose(forward(model, IDS), logits, atol=1e-4)

    save_llama(model, tmp_path)
    loaded = load_llama(tmp_path, scan_layers=LAYOUTS[layout])
    np.testing.assert_allclose(forward(loaded, IDS), logits, atol=1e-4)


def gradients(model):
    """Of a loss that reads every logit, for every parameter."""
    graph, weights = nnx.graphdef(model), np.random.default_rng(4).normal(size=13)

    def loss(params):
        return jnp.sum(jnp.sin(nnx.merge(graph, params)(IDS)) * weights)

    return jax.jit(jax.grad(loss))(params_of(model))


@pytest.mark.parametrize(("layout", "kind"), PAIRS)
def test_gradients_reach_the_factors_and_not_what_is_frozen(layout, kind):
    model = randomize(adapted(layout, kind))
    params, grads = params_of(model), gradients(model)
    for (path, g), frozen in zip(
        jax.tree_util.tree_leaves_with_path(grads),
        jax.tree.leaves(is_frozen(grads)),
        strict=True,
    ):
        assert frozen == ("'frozen'" in jax.tree_util.keystr(path))
        assert bool(jnp.any(g != 0)) != frozen, path

    # Against the gradient G of the weight itself, in the merged model.
    merge(model.layers)
    full = linear_params(gradients(model), layout)["kernel"]
    p, g = linear_params(params, layout), linear_params(grads, layout)
    a, b = p["lora"]["lora_a"], p["lora"]["lora_b"]
    if kind == "dora":
        weight = p["frozen"] + SCALE * a @ b
        norms = np.linalg.norm(weight, axis=0, keepdims=True)
        expected = np.sum(full * weight / norms, axis=0, keepdims=True)
        np.testing.assert_allclose(g["magnitude"], expected, rtol=1e-3, atol=1e-3)
        full = full * p["magnitude"] / norms  # the norm counts as constant
    np.testing.assert_allclose(
        g["lora"]["lora_a"], SCALE * full @ b.T, rtol=1e-3, atol=1e-3
    )
    np.testing.assert_allclose(
        g["lora"]["lora_b"], SCALE * a.T @ full, rtol=1e-3, atol=1e-3
    )


def test_a_bias_is_kept_and_trained():
    class Head(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
            self.linear.bias[...] = jnp.arange(3.0)

        def __call__(self, x):
            return self.linear(x)

    head, x = Head(), jnp.ones((2, 4))
    expected = head(x)
    adapt(head, LoRALinear, 9, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(head(x), expected, atol=1e-6)
    params = params_of(head)
    assert params["linear"]["lora"]["lora_a"].shape == (4, 3)
    assert not is_frozen(params)["linear"]["linear"]["bias"]
    merge(head)
    assert type(head.linear) is nnx.Linear
    np.testing.assert_allclose(head(x), expected, atol=1e-6)


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(ValueError, match="at rank 0"):
        adapt(base_model("separate").layers, LoRALinear, 0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="RMSNorm.*no nnx.Linear"):
        adapt(base_model("separate").norm, LoRALinear, 2, rngs=nnx.Rngs(0))


# The optimizers


def test_there_is_no_state_for_what_is_frozen():
    params = params_of(adapted("stacked", "dora"))
    # 2 layers: 4 (8, 8) kernels, 2 (8, 12), 1 (12, 8); the magnitudes; embedding, head
    # and norms.
    adapters = 2 * (4 * RANK * 16 + 3 * RANK * 20)
    others = 2 * (4 * 8 + 2 * 12 + 8) + 2 * 13 * 8 + 5 * 8
    assert trained_parameters(params) == adapters + others
    tx = freeze(optax.adamw(0.1))
    assert lro.state_bytes(tx, params) == 2 * 4 * (adapters + others) + 4
    # An update that would move everything, were it let to.
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    moved = jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates)
    assert moved == jax.tree.map(lambda frozen: not frozen, is_frozen(params))


def test_relora_follows_its_algorithm():
    every, lr, decay = 3, 0.05, 0.1
    rng = np.random.default_rng(5)

    def draw():
        return {
            "norm": rng.normal(size=4),
            "up": {
                "frozen": rng.normal(size=(4, 6)),
                "lora": {
                    "lora_a": rng.normal(size=(4, RANK)),
                    "lora_b": rng.normal(size=(RANK, 6)),
                },
            },
        }

    leaves = ("norm", "lora_a", "lora_b")
    pick = lambda tree: {"norm": tree["norm"], **tree["up"]["lora"]}  # noqa: E731
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), draw())
    tx = relora_adamw(lr, every, weight_decay=decay)
    state, update = tx.init(params), jax.jit(tx.update)
    w = {k: np.float64(x) for k, x in pick(params).items()}
    frozen = np.float64(params["up"]["frozen"])
    mu, nu, count = dict.fromkeys(leaves, 0.0), dict.fromkeys(leaves, 0.0), {}
    first_a = w["lora_a"]
    for step in range(8):
        grads = draw()
        updates, state = update(
            jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads), state, params
        )
        params = optax.apply_updates(params, updates)

        # After the warm-up of one step of the later periods the rate is whole again.
        rate = lr / 2 if step >= every and step % every == 0 else lr
        for k, g in pick(grads).items():
            count[k] = count.get(k, 0) + 1
            mu[k] = 0.9 * mu[k] + 0.1 * g
            nu[k] = 0.999 * nu[k] + 0.001 * g**2
            m, v = mu[k] / (1 - 0.9 ** count[k]), nu[k] / (1 - 0.999 ** count[k])
            w[k] = w[k] - rate * (m / (np.sqrt(v) + 1e-8) + decay * w[k])
        found = pick(params)
        if (step + 1) % every == 0:
            function = frozen + SCALE * w["lora_a"] @ w["lora_b"]
            frozen = function
            # The function is the same, and all of it is in the frozen weight now.
            assert not np.any(found["lora_b"])
            new_a = np.float64(found["lora_a"])
            assert np.abs(new_a).max() <= 0.5001  # 1 / sqrt(4)
            assert np.abs(new_a - w["lora_a"]).max() > 0.1
            assert np.abs(new_a - first_a).max() > 0.1
            first_a, w["lora_a"], w["lora_b"] = new_a, new_a, np.zeros((RANK, 6))
            for k in ("lora_a", "lora_b"):
                mu[k], nu[k], count[k] = 0.0, 0.0, 0
        np.testing.assert_allclose(params["up"]["frozen"], frozen, atol=1e-4)
        for k in leaves:
            np.testing.assert_allclose(found[k], w[k], atol=1e-4)


def test_after_a_merge_relora_goes_on_from_the_same_function():
    model = randomize(adapted("stacked", "lora"))
    graph, params = nnx.graphdef(model), params_of(model)
    tx = relora_adamw(0.0, 1)  # merges at every step, and does nothing else
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    merged = optax.apply_updates(params, updates)
    new, old = linear_params(merged, "stacked"), linear_params(params, "stacked")
    assert np.abs(new["frozen"] - old["frozen"]).max() > 0.1
    assert not new["lora"]["lora_b"].any()
    np.testing.assert_allclose(
        forward(nnx.merge(graph, merged), IDS), forward(model, IDS), atol=1e-4
    )


def test_the_rate_rises_again_in_every_period_but_the_first():
    schedule = rewarmed(optax.linear_schedule(1.0, 0.0, 80), 20)
    shares = [float(schedule(t)) / (1 - t / 80) for t in range(60)]
    later = [1 / 3, 2 / 3, *[1.0] * 18]
    np.testing.assert_allclose(shares, [*[1.0] * 20, *later, *later], rtol=1e-5)


# The job


def final_checkpoint(out, method):
    directory = (out / method / "checkpoints" / "20" / "default").resolve()
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(directory)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("modes") / "run"
    argv = ["--smoke", "--methods", "relora", "dora", "--out", str(out)]
    assert main(argv) == 0
    return out


def test_a_run_of_the_modes_ends_with_a_report(finished):
    result = json.loads((finished / "result.json").read_text())
    report = (finished / "report.md").read_text()
    for method, run in result["runs"].items():
        assert run["validation_loss"] < run["initial_validation_loss"] - 0.1
        arrays = final_checkpoint(finished, method)
        state = sum(a.nbytes for path, a in arrays.items() if "opt_state" in path)
        assert run["state_bytes"] == state
        trained = sum(
            a.size
            for path, a in arrays.items()
            if path.startswith("['params']") and "frozen" not in path
        )
        assert run["trained_parameters"] == trained
        row = next(line for line in report.splitlines() if f"| `{method}`" in line)
        assert f" {trained:,} |" in row and f" {state:,} B |" in row
        records = read_metrics(finished / method / "metrics.jsonl")
        overlaps = [r["probe"].get("overlap") for r in records if "probe" in r]
        assert overlaps[0] is None and all(0 < x < 1 for x in overlaps[1:])
    relora, dora = result["runs"].values()
    assert relora["initial_validation_loss"] == pytest.approx(
        dora["initial_validation_loss"], abs=1e-5
    )
    # A magnitude for each of the 4 * 32 + 2 * 88 + 32 outputs of the one layer.
    assert dora["trained_parameters"] - relora["trained_parameters"] == 336


def train_map(directory, stop_at=None):
    """Twelve steps of ReLoRA, merged after every fifth, on one linear map."""
    head = nnx.Dict(up=nnx.Linear(6, 8, rngs=nnx.Rngs(0)))
    adapt(head, LoRALinear, RANK, rngs=nnx.Rngs(1))
    graph, start = nnx.graphdef(head), params_of(head)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    stop = StopRequest()

    def batch(step):
        if step == stop_at:
            stop.requested = True
        return jnp.sin(x + step)

    def loss(params, x):
        return jnp.mean((nnx.merge(graph, params)["up"](x) - x.sum()) ** 2)

    task = Task(lambda: jax.tree.map(jnp.copy, start), loss, batch, [x], 1)
    timetable = Timetable(12, 1, 6, 6, 4)
    probe = Probe.of(start, RANK)
    tx = relora_adamw(0.1, 5)
    return train(task, tx, timetable, probe, directory, "relora", stop)


@pytest.mark.long
def test_a_stopped_run_of_relora_resumes_bit_for_bit(tmp_path):
    expected = train_map(tmp_path / "whole")
    with pytest.raises(Interrupted, match="after step 8"):
        train_map(tmp_path / "stopped", stop_at=7)
    found = train_map(tmp_path / "stopped")
    chex.assert_trees_all_equal(found, expected)
    (state,) = [
        x for x in jax.tree.leaves(found.opt_state, is_leaf=is_restart) if is_restart(x)
    ]
    assert int(state.step) == 12 and int(state.inner.count) == 2


def is_restart(x):
    return isinstance(x, RestartState)
