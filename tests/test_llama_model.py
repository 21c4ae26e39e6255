"""The LLaMA example: reference logits, equal layouts, weight files, clear errors."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import chex
import huggingface_hub
import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from examples.llama.config import LlamaConfig
from examples.llama.model import Llama, RMSNorm, rotary_table
from examples.llama.weights import load_llama, save_llama

# Random weights and their logits, both from transformers 5.23 in float32.
TINY = Path(__file__).parent / "data" / "llama-tiny"
CONFIGS = Path(__file__).parents[1] / "examples" / "llama" / "configs"
SMALL = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    initializer_range=0.2,
)


@pytest.fixture(scope="module")
def reference():
    with np.load(TINY / "expected.npz") as file:
        return file["input_ids"], file["logits"]


def ids(shape=(2, 9), vocab=SMALL.vocab_size, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, shape), jnp.int32)


def loss_fn(model, tokens):
    losses = optax.softmax_cross_entropy_with_integer_labels(
        model(tokens)[:, :-1], tokens[:, 1:]
    )
    return losses.mean()


forward = nnx.jit(Llama.__call__)
gradient = nnx.jit(nnx.grad(loss_fn))


def flat(tree):
    """Parameters, or gradients, by dotted path."""
    return {
        ".".join(map(str, path)): np.asarray(x[...])
        for path, x in nnx.to_flat_state(tree)
    }


def stacked(params):
    """What a model with separate layers holds, in the layout of scanned layers."""
    out, layers = {}, {}
    for name, x in params.items():
        if match := re.fullmatch(r"layers\.(\d+)\.(.*)", name):
            layers.setdefault(match[2], {})[int(match[1])] = x
        else:
            out[name] = x
    for name, parts in layers.items():
        out[f"layers.{name}"] = np.stack([parts[i] for i in range(len(parts))])
    return out


# Numerics


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_logits_equal_the_reference_model(reference, scan_layers, remat):
    input_ids, expected = reference
    model = load_llama(TINY, scan_layers=scan_layers, remat=remat)
    assert isinstance(model, Llama)
    np.testing.assert_allclose(model(input_ids), expected, atol=1e-4, rtol=0)


def test_kernels_are_in_out_matrices_with_the_papers_names():
    shapes = {name: x.shape for name, x in flat(nnx.state(Llama(SMALL))).items()}
    layer = {
        "input_layernorm.scale": (16,),
        "self_attn.q_proj.kernel": (16, 16),
        "self_attn.k_proj.kernel": (16, 8),
        "self_attn.v_proj.kernel": (16, 8),
        "self_attn.o_proj.kernel": (16, 16),
        "post_attention_layernorm.scale": (16,),
        "mlp.gate_proj.kernel": (16, 24),
        "mlp.up_proj.kernel": (16, 24),
        "mlp.down_proj.kernel": (24, 16),
    }
    assert shapes == {
        "embed_tokens.embedding": (64, 16),
        "norm.scale": (16,),
        "lm_head.kernel": (16, 64),
    } | {f"layers.{i}.{name}": s for i in range(3) for name, s in layer.items()}


@pytest.fixture(scope="module")
def plain():
    """Weights, logits and gradients of separate layers without rematerialization."""
    model = Llama(SMALL)
    weights, gradients = flat(nnx.state(model)), flat(gradient(model, ids()))
    assert all(np.abs(x).max() > 1e-4 for x in gradients.values())
    return weights, forward(model, ids()), gradients


@pytest.mark.parametrize(
    ("scan_layers", "remat"), [(True, False), (True, True), (False, True)]
)
def test_layout_and_rematerialization_change_no_value(plain, scan_layers, remat):
    config = dataclasses.replace(SMALL, scan_layers=scan_layers, remat=remat)
    model = Llama(config)
    if scan_layers:
        assert model.layers.mlp.up_proj.kernel.shape == (3, 16, 24)
    arrange = stacked if scan_layers else dict
    weights, logits, gradients = plain
    # Equal seeds give equal weights, so that the layout is no matter of the results.
    chex.assert_trees_all_equal(flat(nnx.state(model)), arrange(weights))
    np.testing.assert_allclose(forward(model, ids()), logits, atol=1e-5, rtol=1e-5)
    chex.assert_trees_all_close(
        flat(gradient(model, ids())), arrange(gradients), atol=1e-6, rtol=1e-4
    )


def matrix_products(config):
    """Matrix products in the traced gradient; a scan's body counts once."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(config)))

    def loss(state):
        return loss_fn(nnx.merge(graph, state), ids())

    def count(jaxpr):
        own = sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)
        inner = (
            getattr(param, "jaxpr", param)
            for eqn in jaxpr.eqns
            for param in eqn.params.values()
        )
        return own + sum(count(j) for j in inner if hasattr(j, "eqns"))

    return count(jax.make_jaxpr(jax.grad(loss))(state).jaxpr)


def test_scan_traces_one_layer_and_remat_repeats_the_forward_products():
    deep = dataclasses.replace(SMALL, num_hidden_layers=6)
    assert matrix_products(deep) > matrix_products(SMALL)
    scan, deep_scan = (
        dataclasses.replace(config, scan_layers=True) for config in (SMALL, deep)
    )
    assert matrix_products(deep_scan) == matrix_products(scan)
    for config in (SMALL, scan):
        remat = dataclasses.replace(config, remat=True)
        assert matrix_products(remat) > matrix_products(config)


def test_grouped_heads_equal_repeated_key_value_weights():
    grouped = Llama(SMALL)
    full = Llama(dataclasses.replace(SMALL, num_key_value_heads=4))
    params = flat(nnx.state(grouped))

    def repeat(kernel):
        heads = kernel.reshape(16, 2, 4)
        return np.repeat(heads, 2, axis=1).reshape(16, 16)

    state = nnx.state(full)
    for path, param in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        wide = "k_proj" in name or "v_proj" in name
        param[...] = repeat(params[name]) if wide else params[name]
    nnx.update(full, state)
    np.testing.assert_allclose(full(ids()), grouped(ids()), atol=1e-5, rtol=1e-5)


def test_a_later_token_never_changes_earlier_logits():
    model = load_llama(TINY)
    tokens = ids((1, 12), vocab=160)
    before = np.asarray(model(tokens))
    for t in (1, 6, 11):
        after = np.asarray(model(tokens.at[0, t].set((tokens[0, t] + 1) % 160)))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert np.abs(after[:, t:] - before[:, t:]).max(axis=-1).min() > 1e-3


def test_tied_head_is_the_transposed_embedding():
    tied = Llama(dataclasses.replace(SMALL, tie_word_embeddings=True))
    assert not any("lm_head" in name for name in flat(nnx.state(tied)))
    untied = Llama(SMALL)
    untied.lm_head.kernel[...] = untied.embed_tokens.embedding[...].T
    np.testing.assert_allclose(tied(ids()), untied(ids()), atol=1e-6, rtol=1e-6)


def test_bfloat16_parameters_keep_float32_logits(reference):
    input_ids, expected = reference
    model = load_llama(TINY, param_dtype="bfloat16", dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {
        jnp.dtype("bfloat16")
    }
    logits = model(input_ids)
    assert logits.dtype == jnp.float32
    # Accumulated in float32, not bfloat16 numbers that were cast at the end.
    assert np.any(logits != logits.astype(jnp.bfloat16).astype(jnp.float32))
    # Eight bits of mantissa: 2^-8 relative in every rounding.
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.05


def test_norm_is_computed_in_float32():
    norm = RMSNorm(SMALL, rngs=nnx.Rngs(0))
    x = 100 * np.random.default_rng(0).normal(size=(5, 16))
    x = x.astype(jnp.bfloat16)
    exact = x.astype(np.float64)
    exact /= np.sqrt(np.mean(exact**2, axis=-1, keepdims=True) + SMALL.rms_norm_eps)
    got = norm(jnp.asarray(x))
    assert got.dtype == jnp.bfloat16
    # One rounding to bfloat16, at most half a unit in the last place.
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=2.0**-8)


def test_rotary_angles_follow_theta_and_head_width():
    config = dataclasses.replace(SMALL, rope_theta=500.0, head_dim=6)
    cos, sin = rotary_table(config, jnp.arange(7))
    frequency = [500.0 ** (-2 * i / 6) for i in range(3)]
    angle = np.outer(np.arange(7), frequency)
    np.testing.assert_allclose(cos, np.cos(angle), atol=1e-5)
    np.testing.assert_allclose(sin, np.sin(angle), atol=1e-5)


def test_a_head_width_of_its_own():
    config = dataclasses.replace(SMALL, head_dim=6)
    model = Llama(config)
    assert model.layers[0].self_attn.q_proj.kernel.shape == (16, 24)
    assert model.layers[0].self_attn.v_proj.kernel.shape == (16, 12)
    assert model(ids()).shape == (2, 9, 64)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_nnx_optimizer_lowers_the_loss(scan_layers):
    model = Llama(dataclasses.replace(SMALL, scan_layers=scan_layers, remat=True))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens):
        loss, gradients = nnx.value_and_grad(loss_fn)(model, tokens)
        optimizer.update(model, gradients)
        return loss

    before = flat(nnx.state(model))
    losses = [float(step(model, optimizer, ids())) for _ in range(20)]
    assert losses[-1] < losses[0] - 0.5
    after = flat(nnx.state(model))
    assert all(np.any(after[name] != before[name]) for name in before)


# Configurations


def count(config):
    state = nnx.state(nnx.eval_shape(lambda: Llama(config)))
    return sum(x.size for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("name", "expected"),
    # Millions of 2 V D + L (4 D^2 + 3 D I + 2 D) + D, from the papers' shapes.
    [
        ("llama_60m", 58.07),
        ("llama_130m", 134.11),
        ("llama_350m", 367.97),
        ("llama_1b", 1339.08),
        ("llama_7b", 6738.42),
    ],
)
def test_papers_configurations_have_the_papers_sizes(name, expected):
    config = LlamaConfig.from_json(CONFIGS / f"{name}.json", scan_layers=True)
    assert round(count(config) / 1e6, 2) == expected
    number, unit = re.fullmatch(r"llama_(\d+)([mb])", name).groups()
    nominal = int(number) * {"m": 1e6, "b": 1e9}[unit]
    assert 0.9 < count(config) / nominal < 1.4


def test_the_demo_configuration_is_small():
    assert 0 < count(LlamaConfig.from_json(CONFIGS / "tiny.json")) < 3e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1, got 0"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers must be a whole number"),
        ({"vocab_size": True}, "vocab_size must be a whole number"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a whole number"),
        ({"num_attention_heads": 3}, "num_attention_heads=3 does not divide.*head_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide"),
        ({"num_attention_heads": 16, "num_key_value_heads": 16}, "must be even.*got 1"),
        ({"head_dim": 5}, "head_dim must be even and positive.*got 5"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be a positive number, got 0.0"),
        ({"rope_theta": float("inf")}, "rope_theta must be a positive number"),
        ({"initializer_range": "0.02"}, "initializer_range must be a positive number"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16.*'int8'"),
        ({"param_dtype": "half"}, "param_dtype must be one of.*'half'"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def write_config(directory, **changes):
    raw = json.loads((TINY / "config.json").read_text())
    raw = {k: v for k, v in (raw | changes).items() if v != "absent"}
    path = directory / "config.json"
    path.write_text(json.dumps(raw))
    return path


def test_rope_theta_is_read_in_both_spellings(tmp_path):
    new = {"rope_theta": 5e5, "rope_type": "default"}
    path = write_config(tmp_path, rope_parameters=new)
    assert LlamaConfig.from_json(path).rope_theta == 5e5
    path = write_config(
        tmp_path, rope_parameters="absent", rope_theta=3e4, rope_scaling=None
    )
    assert LlamaConfig.from_json(path).rope_theta == 3e4
    path = write_config(tmp_path, rope_parameters="absent")
    assert LlamaConfig.from_json(path).rope_theta == 1e4


def test_absent_fields_take_hugging_faces_defaults(tmp_path):
    names = ("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings")
    config = LlamaConfig.from_json(
        write_config(tmp_path, **dict.fromkeys(names, "absent"))
    )
    assert (config.kv_heads, config.head_width) == (4, 8)
    assert config.rms_norm_eps == 1e-6
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "absent", "vocab_size": "absent"}, "vocab_size, hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        ({"model_type": "mistral"}, "model_type='mistral' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope scaling 'llama3'"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}},
            "rope scaling 'linear'",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* not supported"),
        ({"hidden_size": "32"}, "hidden_size must be int, got '32'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be bool"),
        ({"eos_token_id": [2, [3]]}, "eos_token_id must be"),
        ({"eos_token_id": {}}, "eos_token_id must be"),
        ({"head_dim": 8.0}, "head_dim must be int"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 4,096"),
        ({"vocab_size": 10**40}, "vocab_size must be at most 2,147,483,647"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings must be at most"),
    ],
)
def test_configs_of_other_models_are_refused_by_name(tmp_path, changes, message):
    path = write_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        LlamaConfig.from_json(path)
    assert str(path) in str(error.value)


# Beside parameters of the other name that say "default", and alone.
@pytest.mark.parametrize("beside", [None, {"rope_type": "default"}], ids=str)
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "rope",
    [
        {"type": "linear", "factor": 2.0},
        {"rope_type": "yarn"},
        {"rope_type": "default", "type": "dynamic"},
        {"factor": 8.0},
        {"rope_type": "default", "factor": 8.0},
        {"rope_type": "default", "long_factor": [1.0]},
        {"rope_type": None},
        {"full_attention": {"rope_type": "default"}},
        "linear",
        [2.0],
        False,
    ],
    ids=str,
)
def test_no_rope_scaling_is_overlooked(rope, name, beside, tmp_path):
    other = {"rope_scaling": "rope_parameters", "rope_parameters": "rope_scaling"}
    path = write_config(tmp_path, **{name: rope, other[name]: beside})
    with pytest.raises(ValueError, match="rope") as error:
        LlamaConfig.from_json(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_rope_that_scales_nothing_is_taken(name, tmp_path):
    rope = {"rope_type": "default", "type": "default", "factor": 1.0}
    path = write_config(tmp_path, **({"rope_parameters": "absent"} | {name: rope}))
    assert LlamaConfig.from_json(path).rope_theta == 1e4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"scan_layers": True},
        {"head_dim": 6, "num_key_value_heads": 4, "vocab_size": 63},
    ],
    ids=str,
)
def test_the_number_of_weights_is_that_of_the_model(changes):
    config = dataclasses.replace(SMALL, **changes)
    assert config.parameters == count(config)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 4000}, "num_hidden_layers=4,000, and there are 21"),
        ({"intermediate_size": 2**31 - 1}, "misshapen model.layers.0.mlp.gate_proj"),
        ({"vocab_size": 2**31 - 1}, "misshapen model.embed_tokens.weight"),
        ({"hidden_size": 2**30}, "misshapen"),
    ],
    ids=str,
)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_sizes_that_no_weights_have_make_nothing(
    changes, said, scan_layers, checkpoint
):
    directory, _ = checkpoint
    write_config(directory, **changes)
    with pytest.raises(ValueError, match=said) as error:
        load_llama(directory, scan_layers=scan_layers)
    assert str(directory) in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1]", "", "[" * 100_000, '"x"', "\0" * 9])
def test_files_that_are_no_config_are_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="Cannot use the model config .*config.json"):
        LlamaConfig.from_json(tmp_path / "config.json")


def test_input_errors():
    model = Llama(SMALL)
    with pytest.raises(ValueError, match=r"\(batch, time\), got shape \(4,\)"):
        model(jnp.zeros(4, jnp.int32))
    with pytest.raises(ValueError, match="33 tokens.*max_position_embeddings=32"):
        model(jnp.zeros((1, 33), jnp.int32))


# Weight files


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the tiny checkpoint that a test may spoil, and its tensors."""
    shutil.copytree(TINY, tmp_path / "llama")
    return tmp_path / "llama", load_file(TINY / "model.safetensors")


@pytest.mark.parametrize("scan_layers", [False, True])
def test_saving_gives_back_the_tensors_of_the_file(tmp_path, scan_layers, reference):
    model = load_llama(TINY, scan_layers=scan_layers)
    save_llama(model, tmp_path / "new" / "llama")
    saved = load_file(tmp_path / "new" / "llama" / "model.safetensors")
    chex.assert_trees_all_equal(saved, load_file(TINY / "model.safetensors"))
    again = load_llama(tmp_path / "new" / "llama", scan_layers=not scan_layers)
    np.testing.assert_allclose(again(reference[0]), reference[1], atol=1e-4, rtol=0)
    raw = json.loads((tmp_path / "new" / "llama" / "config.json").read_text())
    original = json.loads((TINY / "config.json").read_text())
    for name in set(original) - {"pad_token_id", "pretraining_tp", "use_cache"}:
        if name != "transformers_version":
            assert raw[name] == original[name], name


def test_bfloat16_weights_and_every_config_field_survive(tmp_path):
    config = dataclasses.replace(
        SMALL,
        head_dim=6,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=(5, 6),
        param_dtype="bfloat16",
    )
    model = Llama(config)
    save_llama(model, tmp_path)
    again = load_llama(tmp_path, param_dtype="bfloat16")
    assert again.config == config
    chex.assert_trees_all_equal(flat(nnx.state(again)), flat(nnx.state(model)))
    np.testing.assert_array_equal(again(ids()), model(ids()))


def test_shards_are_read_through_their_index(checkpoint, reference):
    directory, tensors = checkpoint
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    logits = load_llama(directory)(reference[0])
    np.testing.assert_allclose(logits, reference[1], atol=1e-4, rtol=0)
    (directory / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"Cannot read .*b\.safetensors"):
        load_llama(directory)
    index.write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json is no safetensors index"):
        load_llama(directory)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_one_error_names_every_tensor_that_does_not_fit(checkpoint, scan_layers):
    directory, tensors = checkpoint
    del tensors["model.norm.weight"]
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((88, 31), np.float32)
    tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros((32, 88), np.int8)
    tensors["model.layers.2.extra.weight"] = np.zeros((3,), np.float32)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_llama(directory, scan_layers=scan_layers)
    header, *lines = str(error.value).splitlines()
    assert str(directory) in header
    assert sorted(line.strip() for line in lines) == [
        "misshapen model.layers.0.mlp.up_proj.weight, shape (88, 31), "
        "expected (88, 32)",
        "missing model.layers.1.self_attn.q_proj.weight, expected shape (32, 32)",
        "missing model.norm.weight, expected shape (32,)",
        "unexpected model.layers.2.extra.weight, shape (3,)",
        "unusable model.layers.0.mlp.down_proj.weight, shape (32, 88) as expected but "
        "of int8, expected floating point",
    ]


def test_rotary_tables_of_old_checkpoints_are_ignored(checkpoint, reference):
    directory, tensors = checkpoint
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file(tensors | old, directory / "model.safetensors")
    logits = load_llama(directory)(reference[0])
    np.testing.assert_allclose(logits, reference[1], atol=1e-4, rtol=0)


def test_a_tied_model_takes_a_repeated_head_and_refuses_another(checkpoint):
    directory, tensors = checkpoint
    with pytest.raises(ValueError, match=r"unexpected lm_head\.weight"):
        load_llama(directory, tie_word_embeddings=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, directory / "model.safetensors")
    tied = load_llama(directory, tie_word_embeddings=True)
    tokens = ids(vocab=160)
    expected = load_llama(directory)(tokens)
    np.testing.assert_allclose(tied(tokens), expected, atol=1e-5, rtol=1e-5)


def test_directories_without_readable_weights_are_refused(checkpoint):
    directory, _ = checkpoint
    with pytest.raises(ValueError, match="config.json is a file; give the directory"):
        load_llama(directory / "config.json")
    (directory / "model.safetensors").write_bytes(b"no such format")
    with pytest.raises(ValueError, match=r"Cannot read .*model\.safetensors"):
        load_llama(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
        load_llama(directory)


def test_a_hub_name_is_downloaded(monkeypatch, reference):
    asked = []

    def download(name, *, allow_patterns):
        asked.append(name)
        assert "*.json" in allow_patterns
        return str(TINY)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    logits = load_llama("someone/llama-tiny")(reference[0])
    assert asked == ["someone/llama-tiny"]
    np.testing.assert_allclose(logits, reference[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "./no/such/directory"])
def test_a_name_that_cannot_be_had_says_so(monkeypatch, tmp_path, name):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=f"{name} is no directory.*hub did not give"):
        load_llama(name)
