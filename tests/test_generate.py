"""Generation from a cache: equal to the model without one, whatever the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.llama import generate as module
from examples.llama.config import LlamaConfig
from examples.llama.generate import generate
from examples.llama.model import Llama

# Grouped heads, and weights so large that what comes next depends on what was before.
CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.4,
)
NEW = 20
PROMPTS = [
    np.random.default_rng(length).integers(0, 40, length).tolist()
    for length in (5, 1, 12, 3)
]
END = 17

forward = nnx.jit(Llama.__call__)


@pytest.fixture(scope="module")
def model():
    return Llama(CONFIG, rngs=nnx.Rngs(3))


def by_hand(model, prompt, choose=lambda logits, count: int(np.argmax(logits))):
    """The same without a cache and without padding: every token from the whole text.

    Later columns cannot be seen, so one shape serves all lengths.
    """
    text = list(prompt)
    while len(text) < len(prompt) + NEW:
        row = np.zeros((1, 64), np.int32)
        row[0, : len(text)] = text
        token = choose(forward(model, row)[0, len(text) - 1], len(text) - len(prompt))
        if token == END:
            break
        text.append(token)
    return text[len(prompt) :]


@pytest.fixture(scope="module")
def expected(model):
    answers = [by_hand(model, prompt) for prompt in PROMPTS]
    # Some end by themselves, some do not, and none repeats one token.
    lengths = [len(answer) for answer in answers]
    assert min(lengths) < NEW and max(lengths) == NEW
    assert len({token for answer in answers for token in answer}) > 10
    return answers


def test_tokens_equal_those_of_the_model_without_a_cache(model, expected):
    found = generate(model, PROMPTS, max_new_tokens=NEW, stop=[END])
    assert found == expected


def test_neither_batches_nor_padding_change_a_token(model, expected, monkeypatch):
    monkeypatch.setattr(module, "_ROUND", 1)
    found = generate(model, PROMPTS, max_new_tokens=NEW, stop=[END], batch_size=3)
    assert found == expected


def test_stacked_layers_give_the_same_tokens(expected):
    config = dataclasses.replace(CONFIG, scan_layers=True)
    stacked = Llama(config, rngs=nnx.Rngs(3))
    assert generate(stacked, PROMPTS, max_new_tokens=NEW, stop=[END]) == expected


def test_any_of_several_stop_tokens_ends_a_row(model, expected):
    other = expected[0][2]
    cut = [
        answer[: answer.index(other)] if other in answer else answer
        for answer in expected
    ]
    assert cut != expected
    found = generate(model, PROMPTS, max_new_tokens=NEW, stop=[END, other])
    assert found == cut
    assert generate(model, PROMPTS, max_new_tokens=2, stop=[END]) == [
        answer[:2] for answer in expected
    ]


def test_samples_are_those_of_the_model_without_a_cache(model, expected):
    key, temperature = jax.random.key(5), 0.7
    found = generate(
        model,
        PROMPTS,
        max_new_tokens=NEW,
        stop=[END],
        temperature=temperature,
        key=key,
        batch_size=2,
    )
    assert found != expected
    for i, prompt in enumerate(PROMPTS):

        def draw(logits, count, own=jax.random.fold_in(key, i)):
            step = jax.random.fold_in(own, count)
            return int(jax.random.categorical(step, logits / temperature))

        assert found[i] == by_hand(model, prompt, draw)


def test_samples_follow_the_probabilities(model):
    prompt, count = PROMPTS[0], 2000
    found = generate(
        model,
        [prompt] * count,
        max_new_tokens=1,
        stop=[END],
        temperature=2.0,
        key=jax.random.key(0),
        batch_size=500,
    )
    logits = forward(model, jnp.asarray([prompt]))[0, -1]
    probabilities = np.asarray(jax.nn.softmax(logits / 2.0), np.float64)
    tokens = [answer[0] if answer else END for answer in found]
    shares = np.bincount(tokens, minlength=40) / count
    deviation = np.sqrt(probabilities * (1 - probabilities) / count)
    assert np.all(np.abs(shares - probabilities) < 5 * deviation + 1e-3)
    assert shares.max() < 0.9


def test_bfloat16_runs_in_its_own_cache(model):
    config = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16")
    low = Llama(config, rngs=nnx.Rngs(3))
    found = generate(low, PROMPTS, max_new_tokens=4, stop=[END])
    assert all(0 <= token < 40 for answer in found for token in answer)


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        ([[1] * 60], {}, "prompt of 60 tokens and 20 new ones exceed"),
        ([[1], []], {}, "empty prompt"),
        ([[1]], {"stop": []}, "without a stop token"),
        ([[1]], {"temperature": -1.0}, "at least 0"),
        ([[1]], {"temperature": 1.0}, "without a key"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_generated_is_refused(model, prompts, options, said):
    with pytest.raises(ValueError, match=said):
        generate(model, prompts, **{"max_new_tokens": NEW, "stop": [END]} | options)


def test_no_prompts_have_no_answers(model):
    assert generate(model, [], max_new_tokens=NEW, stop=[END]) == []
