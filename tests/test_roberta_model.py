"""The encoder example: reference logits, weight files of all kinds, clear errors."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer

import lowrank_optax as lro
from examples.roberta.config import EncoderConfig
from examples.roberta.model import Classifier, MaskedLM, _dropout
from examples.roberta.tokenizer import SPECIAL, load_tokenizer, train_tokenizer
from examples.roberta.weights import load_classifier, save_model

# Random weights and their logits, both from transformers 5.23 in float32.
DATA = Path(__file__).parent / "data"
KINDS = ("roberta", "bert")
FORWARD = nnx.jit(Classifier.__call__)


def tiny(kind):
    return DATA / f"{kind}-cls-tiny"


def reference(kind):
    """The model's inputs, in order, and the logits."""
    with np.load(tiny(kind) / "expected.npz") as file:
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = [jnp.asarray(file[n], jnp.int32) for n in names if n in file]
        return inputs, file["logits"]


def load(directory, *args, **kwargs):
    weights = load_classifier(directory, *args, **kwargs)
    return weights.model(nnx.Rngs(0)), weights


def changed(kind, directory, change, config=None):
    """A copy of a checkpoint with its tensors changed, in place, by a function."""
    shutil.copytree(tiny(kind), directory)
    tensors = load_file(directory / "model.safetensors")
    save_file(change(tensors) or tensors, directory / "model.safetensors")
    if config:
        raw = json.loads((directory / "config.json").read_text()) | config
        (directory / "config.json").write_text(json.dumps(raw))
    return directory


# The function


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind):
    inputs, logits = reference(kind)
    mask = np.asarray(inputs[1])
    if kind == "roberta":
        assert mask.min() == 0  # else the mask would not be tested
    model, weights = load(tiny(kind))
    assert weights.start == "pretrained, head included"
    np.testing.assert_allclose(FORWARD(model, *inputs), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_where_it_is_masked(kind):
    model, _ = load(tiny(kind))
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(5, 160, (2, 9)), jnp.int32)
    padded = jnp.pad(ids, ((0, 0), (0, 4)), constant_values=model.config.pad_token_id)
    mask = (jnp.arange(13) < 9).astype(jnp.int32)[None].repeat(2, 0)
    short = FORWARD(model, ids)
    np.testing.assert_allclose(FORWARD(model, padded, mask), short, atol=1e-5)
    unmasked = FORWARD(model, padded, jnp.ones_like(mask))
    assert np.abs(unmasked - short).max() > 1e-3


def test_a_token_of_another_type_is_another_token():
    model, _ = load(tiny("bert"))
    ids = jnp.full((1, 6), 7, jnp.int32)
    types = jnp.asarray([[0, 0, 0, 1, 1, 1]], jnp.int32)
    assert np.abs(FORWARD(model, ids, None, types) - FORWARD(model, ids)).max() > 1e-3


def test_dropout_needs_a_key_and_keeps_the_mean():
    x = jnp.ones((200, 200))
    dropped = _dropout(x, 0.25, jax.random.key(0))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert np.mean(dropped == 0) == pytest.approx(0.25, abs=0.01)
    assert _dropout(x, 0.25, None) is x

    inputs, _ = reference("roberta")
    model, _ = load(tiny("roberta"), hidden_dropout_prob=0.3)
    one, two = (FORWARD(model, *inputs, key=jax.random.key(i)) for i in (0, 1))
    assert np.abs(one - two).max() > 1e-3
    again = FORWARD(model, *inputs, key=jax.random.key(0))
    np.testing.assert_array_equal(one, again)


def test_masked_tokens_are_predicted_by_the_embedding():
    config = dataclasses.replace(load_classifier(tiny("roberta")).config)
    model = MaskedLM(config, rngs=nnx.Rngs(0))
    ids = jnp.asarray([[0, 9, 8, 2], [0, 5, 6, 2]], jnp.int32)
    at = jnp.asarray([[2], [1]], jnp.int32)
    logits = model(ids, at)
    assert logits.shape == (2, 1, config.vocab_size)
    x = model.head_norm(
        jax.nn.gelu(model.head(model.encoder(ids)[:, 2:3]), approximate=False)
    )
    table = model.encoder.embeddings.word_embeddings.embedding[...]
    np.testing.assert_allclose(logits[0], (x @ table.T)[0], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrices_are_the_encoders_kernels(kind):
    model, _ = load(tiny(kind))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    rows = lro.describe(lro.mlorc_adamw(1e-3, rank=2), params)
    matrices = {row.path for row in rows if row.view is not None}
    names = ["attention/query", "attention/key", "attention/value", "attention/dense"]
    names += ["up", "down"]
    assert matrices == {
        f"encoder/layers/{i}/{name}/kernel" for i in range(2) for name in names
    }


def test_what_is_too_long_or_no_batch_is_refused():
    model, _ = load(tiny("roberta"))
    assert model.config.max_length == 64  # of 66 positions two are unused
    with pytest.raises(ValueError, match="65 tokens exceeds the model's 64"):
        model(jnp.zeros((1, 65), jnp.int32))
    with pytest.raises(ValueError, match="got shape"):
        model(jnp.zeros(5, jnp.int32))


# Weight files


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_what_was_read(kind, tmp_path):
    model, weights = load(tiny(kind))
    save_model(model, tmp_path, None)
    saved = load_file(tmp_path / "model.safetensors")
    original = load_file(tiny(kind) / "model.safetensors")
    assert saved.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(saved[name], tensor)
    assert EncoderConfig.from_json(tmp_path / "config.json") == weights.config
    raw, first = (
        json.loads((d / "config.json").read_text()) for d in (tmp_path, tiny(kind))
    )
    assert raw["architectures"] == first["architectures"]
    assert raw["pad_token_id"] == first["pad_token_id"]


def without_prefix(tensors):
    return {name.split(".", 1)[-1]: x for name, x in tensors.items()}


def base(tensors):
    """As sentence-transformers has it: no prefix, no head, a buffer."""
    kept = {n: x for n, x in tensors.items() if not n.startswith("classifier")}
    return without_prefix(kept) | {"embeddings.position_ids": np.arange(64)[None]}


def no_pooler(tensors):
    return {n: x for n, x in base(tensors).items() if not n.startswith("pooler")}


def masked_lm(tensors):
    """As bert-base-uncased has it: a head of its own, norms in the old names."""
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    kept = {n: x for n, x in tensors.items() if not n.startswith("classifier")}
    for name in list(kept):
        for new, before in old.items():
            if name.endswith(new):
                kept[name.replace(new, before)] = kept.pop(name)
    return kept | {"cls.predictions.bias": np.zeros(160, np.float32)}


HEAD = ("classifier.bias", "classifier.weight")
POOLER = ("pooler.dense.bias", "pooler.dense.weight")


@pytest.mark.parametrize(
    ("change", "fresh"),
    [(base, HEAD), (no_pooler, HEAD + POOLER), (masked_lm, HEAD)],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_base_checkpoint_gets_a_fresh_head_and_says_so(change, fresh, tmp_path):
    directory = changed("bert", tmp_path / "base", change)
    model, weights = load(directory, labels=("no", "yes", "perhaps"))
    assert weights.fresh == fresh
    assert weights.start == f"pretrained, with fresh {', '.join(fresh)}"
    whole, _ = load(tiny("bert"))
    inputs, _ = reference("bert")
    expected = whole.encoder(*inputs)
    np.testing.assert_array_equal(model.encoder(*inputs), expected)
    assert FORWARD(model, *inputs).shape == (2, 3)
    # Another seed draws another head, and nothing else.
    other = weights.model(nnx.Rngs(1))
    assert np.any(other.classifier.kernel[...] != model.classifier.kernel[...])
    np.testing.assert_array_equal(other.encoder(*inputs), expected)


def test_roberta_bases_pooler_and_head_are_left_out(tmp_path):
    def change(tensors):
        kept = {n: x for n, x in tensors.items() if not n.startswith("classifier")}
        kept["roberta.pooler.dense.weight"] = np.zeros((32, 32), np.float32)
        kept["lm_head.bias"] = np.zeros(160, np.float32)
        return kept

    _, weights = load(changed("roberta", tmp_path / "base", change))
    assert all(name.startswith("classifier.") for name in weights.fresh)
    assert len(weights.fresh) == 4


def test_a_head_of_other_classes_keeps_what_fits():
    _, weights = load(tiny("roberta"), labels=("a", "b"))
    assert weights.fresh == ("classifier.out_proj.bias", "classifier.out_proj.weight")


def test_without_weights_it_is_from_scratch(tmp_path):
    shutil.copy(tiny("bert") / "config.json", tmp_path)
    _, weights = load(tmp_path)
    assert weights.start == "from scratch"
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="converted to safetensors"):
        load_classifier(tmp_path)


def drop(name):
    def change(tensors):
        del tensors[name]

    return change


def put(name, shape):
    def change(tensors):
        tensors[name] = np.zeros(shape, np.float32)

    return change


QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop(f"bert.{QUERY}"), rf"missing {QUERY}, expected shape \(32, 32\)"),
        (
            put(f"bert.{QUERY}", (32, 16)),
            rf"misshapen {QUERY}, shape \(32, 16\), expected \(32, 32\)",
        ),
        (put("bert.encoder.extra.weight", (3,)), "unexpected encoder.extra.weight"),
        (drop("classifier.bias"), "missing classifier.bias"),
        (put("classifier.weight", (5, 32)), r"misshapen classifier.weight"),
        (drop("bert.pooler.dense.bias"), "missing pooler.dense.bias"),
    ],
)
def test_a_tensor_that_does_not_fit_names_itself(change, said, tmp_path):
    directory = changed("bert", tmp_path / "broken", change)
    with pytest.raises(ValueError, match=said) as caught:
        load_classifier(directory)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "llama"}, "model_type='llama' is not supported"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
        ({"num_attention_heads": 5}, "num_attention_heads=5 does not divide"),
        ({"pad_token_id": 500}, "pad_token_id must be a token"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob must be at least 0"),
        ({"hidden_dropout_prob": "0.1"}, "hidden_dropout_prob must be float"),
        ({"pad_token_id": 0.0}, "pad_token_id must be int"),
        ({"id2label": {"0": 5}}, "labels must be"),
        ({"id2label": None, "num_labels": 10**9}, "num_labels must be at most 65,536"),
        ({"id2label": None, "num_labels": "2"}, "num_labels must be a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 4,096"),
        ({"vocab_size": 10**12}, "vocab_size must be at most"),
    ],
)
def test_another_model_is_refused(config, said, tmp_path):
    directory = changed("bert", tmp_path / "other", lambda tensors: None, config)
    with pytest.raises(ValueError, match=said) as caught:
        load_classifier(directory)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_hidden_layers": 4000}, "num_hidden_layers=4,000, and there are"),
        ({"intermediate_size": 2**31 - 1}, "misshapen encoder.layer.0.intermediate"),
        ({"max_position_embeddings": 2**31 - 1}, "misshapen embeddings.position"),
    ],
    ids=str,
)
def test_sizes_that_no_weights_have_make_nothing(config, said, tmp_path):
    directory = changed("bert", tmp_path / "absurd", lambda tensors: None, config)
    with pytest.raises(ValueError, match=said) as caught:
        load_classifier(directory)
    assert str(directory) in str(caught.value)
    # Without weights they would all be made.
    (directory / "model.safetensors").unlink()
    if "num_hidden_layers" not in config:
        with pytest.raises(ValueError, match=r"weights in float32 take [\d,]+\.\d GiB"):
            load_classifier(directory)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_number_of_weights_is_that_of_the_encoder(kind):
    config = load_classifier(tiny(kind)).config
    model = nnx.eval_shape(lambda: Classifier(config, rngs=nnx.Rngs(0)))
    sizes = jax.tree.leaves(nnx.state(model.encoder, nnx.Param))
    expected = sum(int(np.prod(x.shape)) for x in sizes)
    assert config.parameters == expected


def test_weights_of_the_other_kind_are_refused(tmp_path):
    shutil.copytree(tiny("bert"), tmp_path / "mixed")
    shutil.copy(tiny("roberta") / "model.safetensors", tmp_path / "mixed")
    with pytest.raises(ValueError, match="missing embeddings.word_embeddings.weight"):
        load_classifier(tmp_path / "mixed")


# Tokenizers

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##s", "sat"]


def bert_config(**changes):
    return dataclasses.replace(load_classifier(tiny("bert")).config, **changes)


def write_words(directory, words=WORDS):
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")


def test_word_pieces_are_read_from_vocab_txt(tmp_path):
    write_words(tmp_path)
    tokenizer = load_tokenizer(tmp_path, bert_config(vocab_size=len(WORDS)))
    encoding = tokenizer.encode("A cats", "sat")
    assert encoding.tokens == ["[CLS]", "a", "cat", "##s", "[SEP]", "sat", "[SEP]"]
    assert encoding.type_ids == [0, 0, 0, 0, 0, 1, 1]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    tokenizer = load_tokenizer(tmp_path, bert_config(vocab_size=len(WORDS)))
    assert tokenizer.encode("A cat").tokens == ["[CLS]", "[UNK]", "cat", "[SEP]"]


def test_byte_pairs_are_read_from_either_form(tmp_path):
    trained = train_tokenizer(["a cat sat on a mat"] * 9, 280)
    ids = [trained.token_to_id(token) for token in SPECIAL]
    assert ids == [0, 1, 2, 3, 4]
    config = dataclasses.replace(
        load_classifier(tiny("roberta")).config, vocab_size=trained.get_vocab_size()
    )
    # Settings of a tokenizer for sentence embeddings, which must not stay.
    trained.enable_padding(length=50)
    trained.enable_truncation(4)
    trained.save(str(tmp_path / "tokenizer.json"))
    whole = load_tokenizer(tmp_path, config)
    (tmp_path / "tokenizer.json").unlink()
    raw = json.loads(trained.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(raw["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    parts = load_tokenizer(tmp_path, config)
    for text in ("a cat", "sat on"):
        encoding = whole.encode(text, "a mat")
        assert encoding.tokens[0] == "<s>" and encoding.tokens[-1] == "</s>"
        assert encoding.tokens.count("</s>") == 3
        assert parts.encode(text, "a mat").ids == encoding.ids
    assert isinstance(parts, Tokenizer) and not isinstance(parts, ByteLevelBPETokenizer)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_tokenizer(tmp_path, bert_config())
    write_words(tmp_path)
    with pytest.raises(ValueError, match=r"vocab.txt.* 9 tokens.*vocab_size is 8"):
        load_tokenizer(tmp_path, bert_config(vocab_size=8))
    with pytest.raises(ValueError, match="does not fit the model"):
        load_tokenizer(tmp_path, bert_config(vocab_size=30_522))
    with pytest.raises(ValueError, match="padding is token 0.*pad_token_id is 3"):
        load_tokenizer(tmp_path, bert_config(vocab_size=9, pad_token_id=3))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer: EOF"):
        load_tokenizer(tmp_path, bert_config())


@pytest.mark.parametrize("text", ["", "[1]", "[" * 100_000, '{"do_lower_case": 1}'])
def test_damaged_settings_of_a_tokenizer_are_named(text, tmp_path):
    write_words(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path, bert_config(vocab_size=len(WORDS)))
    assert str(tmp_path / "tokenizer_config.json") in str(caught.value)
