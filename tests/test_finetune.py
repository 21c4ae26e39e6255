"""Fine-tuning on instructions: data, rows, loss, and the job from files to result."""

import json
import math
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from decimal import Decimal
from io import StringIO
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import lowrank_optax as lro
from examples.common.checkpoints import seal
from examples.common.loop import TrainState
from examples.common.methods import METHODS
from examples.common.metrics import read_metrics
from examples.common.precision import in_float32
from examples.common.settings import parse_settings, write_record
from examples.common.tokens import END_OF_TEXT
from examples.llama import finetune
from examples.llama.base import load_base
from examples.llama.config import LlamaConfig
from examples.llama.final_number import final_number
from examples.llama.finetune import main
from examples.llama.finetune_job import loss_sums
from examples.llama.finetune_settings import (
    PRESETS,
    PUBLISHED,
    RATES,
    SMOKE,
    Finetune,
)
from examples.llama.forms import Instruction
from examples.llama.instructions import load_instructions, read_instructions
from examples.llama.model import Llama
from examples.llama.problems import arithmetic
from examples.llama.rows import Example, Rows, lay_out, pack
from examples.llama.weights import load_llama, save_llama
from tests.faults import contents, truncate
from tests.interrupting import at_call, press_ctrl_c

# Instructions

FORMS = {
    "gsm8k.jsonl": '{"question": "One and one?", "answer": "1+1=2\\n#### 2"}\n',
    "metamath.jsonl": '{"type": "x", "query": "1+1?", "response": "The answer is 2"}\n',
    "codefeedback.jsonl": '{"query": "Print 2.", "answer": "print(2)", "lang": "py"}\n',
    "e2e.jsonl": '{"mr": "name[Aroma]", "ref": "Aroma is a place."}\n',
    "humaneval.jsonl": '{"prompt": "def f():", "canonical_solution": " return 1\\n",'
    ' "test": "def check(f): assert f() == 1", "entry_point": "f"}\n',
    "e2e.csv": 'mr,ref\n"name[Aroma], food[tea]","Aroma,\nwith tea."\n',
}
EXPECTED = {
    "gsm8k.jsonl": ("One and one?", "1+1=2\n#### 2", Decimal(2)),
    "metamath.jsonl": ("1+1?", "The answer is 2", Decimal(2)),
    "codefeedback.jsonl": ("Print 2.", "print(2)", None),
    "e2e.jsonl": ("name[Aroma]", "Aroma is a place.", None),
    "humaneval.jsonl": (
        "Complete this Python function.\n\n```python\ndef f():\n```",
        "```python\ndef f():\n return 1\n```",
        None,
    ),
    "e2e.csv": ("name[Aroma], food[tea]", "Aroma,\nwith tea.", None),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_told_by_its_columns(name, tmp_path):
    path = tmp_path / name
    # A byte order mark, as spreadsheets write it, is no part of the first column.
    path.write_text(FORMS[name], encoding="utf-8-sig")
    asked, response, number = EXPECTED[name]
    (found,) = read_instructions(path)
    assert found.prompt == f"### Instruction:\n{asked}\n\n### Response:\n"
    assert (found.response, found.number) == (response, number)
    assert found.where.startswith(f"{path}, line ")


GOOD = b'{"question": "a?", "answer": "#### 1"}\n'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "a.jsonl: no example in it"),
        ("a.jsonl", b"\n\n", "a.jsonl: no example in it"),
        ("a.jsonl", GOOD + b"{question: 3}\n", "a.jsonl, line 2: not JSON"),
        ("a.jsonl", GOOD + b'["a?"]\n', "line 2: not a JSON object"),
        ("a.jsonl", GOOD + b'\n{"question": "b?"}', "line 3: no 'answer'"),
        ("a.jsonl", GOOD + b'{"question": 3, "answer": "#### 1"}', "under 'question'"),
        ("a.jsonl", GOOD + b'{"question": " ", "answer": "#### 1"}', "line 2: 'questi"),
        (
            "a.jsonl",
            GOOD + b'{"question": "b?", "answer": "3"}',
            "line 2: 'answer' has",
        ),
        ("a.jsonl", b'{"te\\nt": "b"}', "line 1: columns 'te\\nt', expected one of"),
        ("a.jsonl", GOOD + "naïve".encode("latin-1"), "line 2: not UTF-8 (byte 41"),
        ("a.jsonl", "naïve".encode("utf-16"), "line 1: not UTF-8"),
        ("a.csv", b"mr,ref\n", "a.csv: no example in it"),
        ("a.csv", b"mr,text\na,b\n", "a.csv, line 2: no 'ref'"),
        ("a.csv", b"mr,ref\na,b\nc\n", "line 3: not 2 columns"),
        ("a.csv", b"mr,ref\na,b,c\n", "line 2: not 2 columns"),
        ("a.csv", b'mr,ref\n"a"b,c\n', "a.csv, line 2: not CSV"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_file_is_named_with_its_row(name, content, said, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_instructions(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3+4 = <<3+4=7>>7\n#### 7", "7"),
        ("#### 1,234", "1234"),
        ("#### $-5.50", "-5.5"),
        ("#### -$5.50", "-5.5"),
        ("#### 10%", "10"),
        ("#### 7 apples\n#### 8", "7"),
        ("####12.", "12"),
        ("Hence.\nThe answer is: 42", "42"),
        ("the answer is 42.", "42"),
        ("#### 1e6", "1000000"),
        ("#### 2.5E-3", "0.0025"),
        ("#### +5", "5"),
        ("#### .5", "0.5"),
        ("#### \N{MINUS SIGN}5", "-5"),
        ("#### 12,34,567", "1234567"),
        ("#### \N{EURO SIGN}5", "5"),
        ("The answer is: $\\boxed{5}$.", "5"),
        ("The answer is \\boxed{1{,}200}", "1200"),
        ("The answer is: \\(1\\,200\\)", "1200"),
        ("The answer is: \\$5", "5"),
        ("The answer is: 45\\%", "45"),
        ("The answer is: 45 %.", "45"),
        ("The answer is: **5**", "5"),
        ("The answer is **$5.50**.", "5.5"),
        ("The answer is: 5\\text{ apples}", "5"),
        ("The answer is 5 apples, all told. So 2+3=5.", "5"),
        ("The answer is (5)", None),
        ("The answer is 42. It was 6*7.", "42"),
        ("The answer is not known.\n#### 9", "9"),
        ("The answer is: \n\n8", "8"),
        ("The answer is: 3x + 1", None),
        ("The answer is: 3 x + 1", None),
        ("The answer is: 5+3", None),
        ("The answer is: 5 - 3", None),
        ("The answer is: 5-3", None),
        ("The answer is: 5 = 2 + 3", None),
        ("The answer is: 5^2", None),
        ("The answer is: 5\\cdot 2", None),
        ("The answer is: 5 \\times 2", None),
        ("The answer is: 5*2", None),
        ("The answer is: 5!", None),
        ("The answer is 5 apples!", "5"),
        ("The answer is: 5 or 6", None),
        ("The answer is: 5, 6", None),
        ("The answer is: 1,2", None),
        ("The answer is: 2 1/2", None),
        ("The answer is: 3:30", None),
        ("The answer is: 1.2.3", None),
        ("The answer is: 5th", None),
        ("The answer is: \\frac{1}{2}", None),
        ("The answer is: \\boxed{\\frac{1}{2}}", None),
        ("The answer is: 5\\pi", None),
        ("The answer is: 5_2", None),
        ("The answer is: -", None),
        ("The answer is: $", None),
        ("#### " + "9" * 50, "9" * 50),
        ("The answer is: 7/12", None),
        ("#### -1,234.50", "-1234.5"),
        ("#### **$1,234.50**.", "1234.5"),
        ("#### \N{INDIAN RUPEE SIGN}5", "5"),
        ("The answer is: \\boxed{5\\text{ cm}}", "5"),
        ("The answer is: \\boxed{\\text{5 apples}}", "5"),
        ("The answer is: \\textbf{\\boxed{5}}", "5"),
        ("The answer is: -\\boxed{5}", "-5"),
        ("(The answer is 5.)", "5"),
        ("The answer is 5 (five) apples", "5"),
        ("The answer is 5, as said", "5"),
        ("The answer is 5 I think", "5"),
        ("The answer is 5 a day", "5"),
        ("The answer is 5 in. or so", "5"),
        ("The answer is 5 cm\N{SUPERSCRIPT TWO}", "5"),
        ("The answer is: 1,23", None),
        ("The answer is: 1,234,56", None),
        ("The answer is: 1234,567", None),
        ("The answer is: 0,5", None),
        ("The answer is: 1 000", None),
        ("The answer is: 5**2", None),
        ("The answer is: 5**.5", None),
        ("The answer is: $5$$6$", None),
        ("The answer is: $5,$600", None),
        ("The answer is: \\boxed{5}\\boxed{6}", None),
        ("The answer is: 3\\boxed{5}", None),
        ("The answer is: 3x", None),
        ("The answer is: 3 x", None),
        ("The answer is: 3 pi", None),
        ("The answer is: 3 \N{GREEK SMALL LETTER PI}", None),
        ("The answer is: 5 \N{MULTIPLICATION SIGN} y", None),
        ("The answer is: 5 \N{DIVISION SIGN} y", None),
        ("The answer is: 5 \N{PLUS-MINUS SIGN} y", None),
        ("The answer is: 5 \N{MIDDLE DOT} y", None),
        ("The answer is: 5 \N{EN DASH} y", None),
        ("The answer is: 5 \N{LESS-THAN OR EQUAL TO} y", None),
        ("The answer is: 5 ~ y", None),
        ("The answer is: 5 \N{SQUARE ROOT}y", None),
        ("The answer is: 5\N{SUPERSCRIPT TWO}", None),
        ("The answer is: 5\N{VULGAR FRACTION ONE HALF}", None),
        ("The answer is: 5 \N{VULGAR FRACTION ONE HALF}", None),
        ("The answer is: 5 and a half", None),
        ("The answer is: 5 halves", None),
        ("The answer is: 5 million", None),
        ("The answer is: 5 Billion people", None),
        ("The answer is: 5 hundred", None),
        ("The answer is: 5 dozen eggs", None),
        ("The answer is: 5 squared", None),
        ("The answer is: 5 plus x", None),
        ("The answer is: 5%-10%", None),
        ("The answer is: -1/2", None),
        ("The answer is: 5k", None),
        ("The answer is: 0x1F", None),
        ("The answer is: 1e6x", None),
        ("The answer is: 1e6+1", None),
        ("The answer is: 1e1000", None),
        ("The answer is: 2\\sqrt{3}", None),
        ("The answer is: x", None),
        ("42", None),
        ("", None),
    ],
)
def test_the_final_number_is_read_from_the_text(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_problems_that_are_made_up_are_right_and_differ():
    rows = arithmetic(500, seed=1)
    assert rows == arithmetic(500, seed=1) != arithmetic(500, seed=2)
    assert len({row["question"] for row in rows}) == 500
    signs = set()
    for row in rows:
        sum_, _, rest = row["answer"].partition(" = <<")
        a, sign, b = sum_.split()
        signs.add(sign)
        assert {a, b} <= set(row["question"].rstrip("?").split())
        value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}
        assert rest == f"{a}{sign}{b}={value[sign]}>>{value[sign]}\n#### {value[sign]}"
    assert signs == {"+", "-", "*"}


def test_one_of_twenty_is_held_out_whatever_the_order(tmp_path):
    lines = [json.dumps(row) for row in arithmetic(100, seed=0)]
    parts = []
    for name, order in (("a", lines), ("b", lines[::-1])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(order))
        parts.append(load_instructions(str(path), None))
    assert len(parts[0].train) == 95 and len(parts[0].test) == 5
    assert {x.prompt for x in parts[0].test} == {x.prompt for x in parts[1].test}
    assert not {x.prompt for x in parts[0].test} & {x.prompt for x in parts[0].train}
    given = load_instructions(str(tmp_path / "a.jsonl"), tmp_path / "b.jsonl")
    assert len(given.train) == len(given.test) == 100
    assert given.sha256 != parts[0].sha256


# Rows


def test_packing_places_everything_once_in_few_rows():
    lengths = np.random.default_rng(0).integers(1, 60, 400).tolist()
    rows = pack(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(400))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= 64
    # No two rows could be joined, and there are hardly more than must be.
    assert sum(sorted(filled)[:2]) > 64
    assert len(rows) <= 1.1 * math.ceil(sum(lengths) / 64)


EXAMPLES = [
    Example([5, 6, 7], [8, 9, 1]),
    Example([3], [4, 1]),
    Example([2, 2], [6, 7, 8, 9, 1]),
]


def test_a_row_holds_whole_examples_and_asks_for_their_responses_only():
    batch = Rows(EXAMPLES, [[0, 1], [2]], size=10).take([0, -1])
    np.testing.assert_array_equal(batch.ids[0], [5, 6, 7, 8, 9, 1, 3, 4, 1, 0])
    np.testing.assert_array_equal(batch.segments[0], [1] * 6 + [2] * 3 + [0])
    np.testing.assert_array_equal(batch.weights[0], [0, 0, 0, 1, 1, 1, 0, 1, 1, 0])
    assert not any(part[1].any() for part in batch)


def test_batches_are_a_function_of_seed_and_step():
    examples = [Example([i], [i]) for i in range(1, 12)]
    rows = Rows(examples, [[i] for i in range(11)], size=2)
    first = [rows.batch(0, step, 4).ids for step in range(2)]
    again = [rows.batch(0, step, 4).ids for step in range(2)]
    np.testing.assert_array_equal(first, again)
    assert len({int(x) for x in np.ravel(first)}) == 8  # none twice in an epoch
    other = [rows.batch(1, step, 4).ids for step in range(2)]
    assert not np.array_equal(first, other)
    whole = rows.batches(4)
    assert [batch.ids.shape for batch in whole] == [(4, 2)] * 3
    assert sorted(x for b in whole for x in b.ids[:, 0]) == [0, *range(1, 12)]


def test_long_examples_are_refused_by_name_or_left_out():
    read = [Instruction("", "", f"f, line {i}", None) for i in (1, 2, 3)]
    with pytest.raises(ValueError, match=r"f, line 1: .* 6 tokens .* 5; so are 1 oth"):
        lay_out(EXAMPLES, read, 5, packing=True, drop_long=False)
    rows = lay_out(EXAMPLES, read, 5, packing=True, drop_long=True)
    assert rows.examples == [EXAMPLES[1]] and rows.layout == [[0]]
    with pytest.raises(ValueError, match="all others are longer than a row of 2"):
        lay_out(EXAMPLES, read, 2, packing=True, drop_long=True)
    assert lay_out(EXAMPLES, read, 9, False, False).layout == [[0], [1], [2]]


SMALL = LlamaConfig(
    vocab_size=12,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
    initializer_range=0.5,
    remat=True,
)


def test_a_packed_row_has_the_losses_and_gradients_of_its_examples():
    model = Llama(SMALL, rngs=nnx.Rngs(1))
    graph = nnx.graphdef(model)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    packed = Rows(EXAMPLES, [[0, 1], [2]], size=12).take([0, 1])
    alone = np.zeros((3, 7), np.int32)
    asked = np.zeros((3, 6), bool)  # of the tokens after the first
    for row, example in enumerate(EXAMPLES):
        alone[row, : example.length] = example.prompt + example.response
        asked[row, len(example.prompt) - 1 : example.length - 1] = True

    def together(params):
        return loss_sums(graph, params, packed)[0]

    def apart(params):
        """Each example in a row of its own, which the model takes for one text."""
        logits = nnx.merge(graph, params)(alone[:, :-1])
        chances = jax.nn.log_softmax(logits)
        taken = jnp.take_along_axis(chances, alone[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(asked, taken, 0))

    found = jax.jit(jax.value_and_grad(together))(params)
    expected = jax.jit(jax.value_and_grad(apart))(params)
    chex.assert_trees_all_close(found, expected, atol=1e-4, rtol=1e-4)
    assert packed.weights.sum() == asked.sum() == 10


# Precision


def test_low_precision_weights_have_float32_state_and_exact_updates():
    params = {"w": jnp.full((4, 6), 1.0, jnp.bfloat16)}
    grads = {"w": jnp.full((4, 6), 0.003, jnp.bfloat16)}
    tx = in_float32(optax.adamw(1e-3))
    state = tx.init(params)
    wide, same = optax.adamw(1e-3), {"w": jnp.full((4, 6), 1.0)}
    expected = wide.init(same)
    for _ in range(5):
        updates, state = tx.update(grads, state, params)
        given = {"w": grads["w"].astype(jnp.float32)}
        steps, expected = wide.update(given, expected, same)
        np.testing.assert_array_equal(updates["w"], steps["w"])
        assert updates["w"].dtype == jnp.float32
    floats = [
        x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert len(floats) == 2 and all(x.dtype == jnp.float32 for x in floats)
    assert optax.apply_updates(params, updates)["w"].dtype == jnp.bfloat16
    assert lro.state_bytes(tx, params) == lro.state_bytes(wide, same)


# A finished run of `--smoke`


def run(argv):
    """Exit status, what was printed, and the errors."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([str(flag) for flag in argv])
    return status, out.getvalue(), err.getvalue()


def result_of(out):
    """The result but for the measured times."""
    result = json.loads((out / "result.json").read_text())
    for seeds in result["runs"].values():
        for summary in seeds.values():
            assert summary.pop("timing")["step_seconds"] > 0
    return result


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The directory, and what was printed."""
    out = tmp_path_factory.mktemp("smoke") / "run"
    status, printed, errors = run(["--smoke", "--methods", "mlorc_adamw", "--out", out])
    assert status == 0, errors
    return out, printed


def test_a_small_model_learns_to_answer_problems_it_has_not_seen(smoke):
    out, printed = smoke
    result = result_of(out)
    found = result["runs"]["mlorc_adamw"]["0"]
    assert found["initial_validation_loss"] == pytest.approx(math.log(512), abs=0.2)
    assert found["validation_loss"] < 0.5
    # Guessing a frequent number is right in fewer than one of ten.
    (share,) = found["scores"]["exact_match"]
    assert share > 0.25
    answers = json.loads((out / "mlorc_adamw/seed-0/answers.json").read_text())
    assert share == sum(x["correct"] for x in answers) / len(answers)
    assert len(answers) == result["data"]["questions"] == 50
    for x in answers:
        right = x["response"].split("#### ")[-1] == x["expected"]
        assert x["correct"] is right
    train = load_instructions("arithmetic", None).train
    assert not {x["prompt"] for x in answers} & {x.prompt for x in train}


def test_result_output_and_report_say_from_scratch(smoke):
    out, printed = smoke
    result = result_of(out)
    assert result["start"] == "from scratch" and result["model"]["sha256"] is None
    assert "smoke, from scratch, on arithmetic" in printed
    report = (out / "report.md").read_text()
    assert "model: smoke, from scratch" in report
    row = next(x for x in report.splitlines() if x.startswith("| `mlorc_adamw`"))
    assert row in printed
    found = result["runs"]["mlorc_adamw"]["0"]
    assert f" {found['validation_loss']:.3f} |" in row
    assert f" {found['scores']['exact_match'][0]:.1%} |" in row
    assert f" {found['state_bytes']:,} B |" in row
    for name in ("loss.png", "exact_match.png", "memory.png"):
        assert (out / name).stat().st_size > 0 and f"({name})" in report


def test_the_final_model_is_saved_with_its_tokenizer_and_end(smoke):
    out, _ = smoke
    directory = out / "mlorc_adamw" / "seed-0"
    model = load_llama(directory / "model")
    steps = result_of(out)["steps"]
    with ocp.StandardCheckpointer() as checkpointer:
        path = (directory / "checkpoints" / str(steps) / "default").resolve()
        saved = checkpointer.restore(path)["params"]
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    np.testing.assert_array_equal(params["norm"]["scale"], saved["norm"]["scale"])
    np.testing.assert_array_equal(
        params["lm_head"]["kernel"], saved["lm_head"]["kernel"]
    )
    tokenizer = Tokenizer.from_file(str(directory / "model" / "tokenizer.json"))
    assert model.config.eos_token_id == tokenizer.token_to_id(END_OF_TEXT)


# From weights


@pytest.fixture
def weights(smoke, tmp_path):
    """A copy of the model that the smoke run made."""
    return shutil.copytree(smoke[0] / "mlorc_adamw/seed-0/model", tmp_path / "weights")


SHORT = ["--smoke", "--steps", "2", "--eval-every", "9", "--test-examples", "10"]


def test_weights_are_fine_tuned_and_exported_as_an_adapter(smoke, weights, tmp_path):
    out, adapters = tmp_path / "run", tmp_path / "adapters"
    argv = ["--model", weights, "--methods", "lora", "--export-adapter", adapters]
    status, printed, errors = run([*SHORT, *argv, "--out", out])
    assert status == 0, errors
    result = result_of(out)
    assert result["start"] == "pre-trained weights"
    assert "pre-trained weights" in printed
    found = result["runs"]["lora"]["0"]
    assert found["initial_validation_loss"] < 0.5
    # The tests are every fifth of those of the smoke run, and LoRA starts as a no-op.
    before = json.loads((smoke[0] / "mlorc_adamw/seed-0/answers.json").read_text())
    by_prompt = {x["prompt"]: x for x in before}
    answers = json.loads((out / "answers.json").read_text())
    assert answers == [by_prompt[x["prompt"]] for x in answers]
    assert result["before"] == {
        "exact_match": [np.mean([x["correct"] for x in answers])]
    }

    # Only the adapters are trained; merged they are the model that was saved.
    config = LlamaConfig.from_json(weights / "config.json")
    base = load_file(weights / "model.safetensors")
    tuned = load_file(out / "lora/seed-0/model/model.safetensors")
    changed = {name for name in base if not np.array_equal(base[name], tuned[name])}
    assert changed == {name for name in base if "_proj" in name}
    added = load_file(adapters / "lora/seed-0/adapter_model.safetensors")
    assert len(added) == 2 * len(changed)
    for name in changed:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (added[f"{module}.lora_{part}.weight"] for part in "AB")
        assert a.shape[0] == SMOKE.rank
        np.testing.assert_allclose(base[name] + b @ a, tuned[name], atol=1e-5)
    trained = sum(4 * sum(base[name].shape) for name in changed)
    assert found["trained_parameters"] == trained
    assert config.eos_token_id == result["model"]["eos_token_id"]


def test_a_run_of_pretrain_is_a_model(weights, tmp_path):
    pretrained = tmp_path / "pretrained"
    method = pretrained / "adamw"
    method.mkdir(parents=True)
    write_record(pretrained, {"settings": {"methods": ["adamw", "lora"]}})
    (method / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="not finished"):
        load_base(str(pretrained), [], tmp_path / "none")
    shutil.move(weights, method / "model")
    for name in (pretrained, method, method / "model"):
        base = load_base(str(name), [], tmp_path / "none")
        assert base.params is not None and base.sha256 is not None


def change_config(weights, **fields):
    path = weights / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def deep_config(weights):
    (weights / "config.json").write_text("[" * 100_000)


def outside_weights(weights):
    (weights / "model.safetensors").rename(weights.parent / "outside.safetensors")
    tensors = load_file(weights.parent / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "../outside.safetensors")}
    (weights / "model.safetensors.index.json").write_text(json.dumps(index))


def scaled_rope(weights):
    change_config(weights, rope_scaling={"rope_type": "linear", "factor": 2.0})


def absurd_size(weights):
    change_config(weights, intermediate_size=2**31 - 1)


def no_tokenizer(weights):
    (weights / "tokenizer.json").unlink()


def broken_tokenizer(weights):
    (weights / "tokenizer.json").write_text("{}")


def small_vocabulary(weights):
    model = Llama(LlamaConfig(100, 8, 8, 1, 1, eos_token_id=0))
    save_llama(model, weights)


def another_end(weights):
    change_config(weights, eos_token_id=511)


def no_end(weights):
    change_config(weights, eos_token_id=None)


def other_weights(weights):
    change_config(weights, intermediate_size=44)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_tokenizer, "weights has no tokenizer.json"),
        (broken_tokenizer, "tokenizer.json is no tokenizer"),
        (small_vocabulary, "vocabulary of the model ends at 99"),
        (another_end, "it has no token 511"),
        (no_end, "config.json names no eos_token_id"),
        (other_weights, "misshapen model.layers.0.mlp.gate_proj.weight"),
        (absurd_size, "misshapen model.layers.0.mlp.gate_proj.weight"),
        (deep_config, "config.json is nested too deeply"),
        (outside_weights, "a file must be inside of"),
        (scaled_rope, "rope scaling 'linear' is not supported"),
    ],
)
def test_weights_that_do_not_fit_are_refused(spoil, said, weights, tmp_path):
    spoil(weights)
    out = tmp_path / "run"
    status, printed, errors = run(["--smoke", "--model", weights, "--out", out])
    assert status == 2 and printed == "" and not out.exists()
    assert len(errors.splitlines()) == 1 and said in errors


# Texts, asked twice

MEANINGS = "mr,ref\n" + "".join(
    f'"name[{name}], food[{food}]",{text}\n'
    for name in ("Aroma", "Bibi", "Cotto", "Dolce", "Eat", "Fino")
    for food in ("Thai", "Greek")
    for text in (f"{name} has {food} food.", f"For {food} food go to {name}.")
)


def test_texts_are_scored_in_each_evaluation_and_resume(tmp_path):
    data, out = tmp_path / "e2e.csv", tmp_path / "run"
    data.write_text(MEANINGS)
    argv = ["--smoke", "--batch-size", "2", "--steps", "2", "--methods", "adamw"]
    argv += ["--data", data, "--test", data, "--test-examples", "5"]
    argv += ["--temperature", "1", "--evaluations", "2", "--out", out]
    status, printed, errors = run(argv)
    assert status == 0, errors
    result = result_of(out)
    assert result["data"]["questions"] == 5
    found = result["runs"]["adamw"]["0"]["scores"]
    assert {"bleu", "nist", "rouge1", "rouge2", "rougeL", "cider"} <= set(found)
    assert all(len(values) == 2 for values in found.values())
    parts = [out / "adamw/seed-0" / f"answers{x}.json" for x in ("", "-2")]
    rows = [json.loads(path.read_text()) for path in parts]
    assert rows[0] != rows[1]
    assert all(len(row["references"]) == 2 for row in rows[0])
    assert "rougeL" in printed and "±" in printed
    report = (out / "report.md").read_text()
    assert "5 questions, judged by likeness to the responses" in report
    if "meteor" not in found:
        assert "METEOR: not computed" in report

    before = contents(out)
    (out / "result.json").unlink()
    parts[1].unlink()
    assert run(["--resume", "--out", out])[0] == 0
    assert result_of(out) == result
    assert contents(out).keys() == before.keys()


# Stopping and resuming

TWICE = ["--methods", "lora", "--seeds", "0", "1", "--temperature", "1"]
FEW = ["--smoke", "--batch-size", "2", "--checkpoint-every", "2", "--steps", "5"]


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """A small file of problems."""
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in arithmetic(60, seed=3)))
    return path


@pytest.fixture(scope="module")
def whole(problems, tmp_path_factory):
    """A run with two seeds that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    status, _, errors = run([*FEW, *TWICE, "--data", problems, "--out", out])
    assert status == 0, errors
    return out


def metrics_of(out, seed):
    records = read_metrics(out / f"lora/seed-{seed}/metrics.jsonl")
    assert all(record.pop("seconds", 1) > 0 for record in records)
    return records


def assert_same(out, other):
    for seed in (0, 1):
        assert metrics_of(out, seed) == metrics_of(other, seed)
        for name in ("answers.json", "model/model.safetensors"):
            name = f"lora/seed-{seed}/{name}"
            assert (out / name).read_bytes() == (other / name).read_bytes()
    assert result_of(out) == result_of(other)


def test_seeds_differ_and_their_mean_is_reported(whole):
    result = result_of(whole)
    for method, seeds in result["runs"].items():
        losses = [seeds[seed]["validation_loss"] for seed in ("0", "1")]
        assert losses[0] != losses[1]
        mean = result["means"][method]["validation_loss"]
        assert mean["mean"] == pytest.approx(np.mean(losses))
        assert mean["spread"] == pytest.approx(np.std(losses, ddof=1))
    assert " ± " in (whole / "report.md").read_text()


@pytest.mark.long
def test_a_run_that_is_killed_and_stopped_ends_the_same(
    whole, problems, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    argv = [*FEW, *TWICE, "--data", str(problems), "--out", str(out)]
    program = (
        "import os, signal, sys\n"
        "from examples.llama.finetune import main\n"
        "from examples.llama.rows import Rows\n"
        "original = Rows.batch\n"
        "def batch(self, seed, step, size):\n"
        "    if (seed, step) == (0, 3):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(self, seed, step, size)\n"
        "Rows.batch = batch\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", program, *argv]
    root = Path(finetune.__file__).parents[2]
    killed = subprocess.run(command, cwd=root, timeout=600)
    assert killed.returncode == -signal.SIGKILL
    # A step past the checkpoint is on record, and has to be taken back.
    assert metrics_of(out, 0)[-1]["step"] == 3

    # In the fourth step of the second seed: three remain of the first, and each run
    # takes a batch to compile for.
    at_call(monkeypatch, Rows, "batch", 9, press_ctrl_c)
    status, _, errors = run(["--resume", "--out", out])
    assert status == 130
    last = errors.splitlines()[-1]
    assert "lora, seed 1 stopped after step 4" in last
    assert f"python -m examples.llama.finetune --resume --out {out}" in last
    assert not (out / "result.json").exists()

    assert run(["--resume", "--out", out])[0] == 0
    assert_same(out, whole)


def test_a_run_killed_while_it_answers_ends_the_same(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    answers = out / "lora/seed-1/answers.json"
    answers.rename(answers.with_name("answers.json.tmp")).write_text("[{")
    (out / "result.json").unlink()
    assert run(["--resume", "--out", out])[0] == 0
    assert_same(out, whole)


def test_a_run_does_not_go_on_with_other_data(whole, problems):
    lines = problems.read_text()
    problems.write_text(lines + GOOD.decode())
    try:
        status, _, errors = run(["--resume", "--out", whole])
    finally:
        problems.write_text(lines)
    assert status == 2
    assert "the data is not what it was when the run was started (sha256" in errors


def test_a_run_does_not_go_on_from_another_models_checkpoint(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    (out / "result.json").unlink()
    foreign = TrainState({"norm": {"scale": jnp.ones(7)}}, (jnp.ones(3),), [])
    checkpoints = out / "lora/seed-0/checkpoints"
    shutil.rmtree(checkpoints)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((checkpoints / "4" / "default").resolve(), foreign)
    seal(checkpoints / "4")
    status, _, errors = run(["--resume", "--out", out])
    last = errors.splitlines()[-1]
    assert status == 2 and f"The checkpoint {checkpoints / '4'} is of another" in last
    assert not (out / "result.json").exists()


def cut_answers(out):
    truncate(out / "lora/seed-1/answers.json")


def edited_answers(out):
    path = out / "lora/seed-0/answers.json"
    rows = json.loads(path.read_text())
    rows[0]["correct"] = not rows[0]["correct"]
    path.write_text(json.dumps(rows))


def fewer_answers(out):
    path = out / "lora/seed-0/answers.json"
    path.write_text(json.dumps(json.loads(path.read_text())[1:]))


def odd_answers(out):
    (out / "lora/seed-0/answers.json").write_text('{"a": 1}')


def merged_otherwise(out):
    path = out / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["merges"] = raw["model"]["merges"][:-1]
    path.write_text(json.dumps(raw))


def cut_tokenizer(out):
    truncate(out / "tokenizer.json")


def edited_record(out):
    path = out / "run.json"
    path.write_text(path.read_text().replace('"steps": 5', '"steps": 6'))


def cut_metrics(out):
    truncate(out / "lora/seed-0/metrics.jsonl")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut_answers, "seed-1/answers.json is not JSON"),
        (edited_answers, "seed-0/answers.json is not as it was written: its answer 1"),
        (fewer_answers, "seed-0/answers.json is not as it was written: it has not 3"),
        (odd_answers, "seed-0/answers.json is not as it was written"),
        (merged_otherwise, "not what it was when the run was started (tokenizer_sha"),
        (cut_tokenizer, "tokenizer.json is no tokenizer"),
        (edited_record, "run.json is not as it was written"),
        (cut_metrics, "seed-0/metrics.jsonl is not as it was written up to step 5"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_run_is_refused_in_one_line(spoil, said, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    spoil(out)
    before = contents(out)
    status, _, errors = run(["--resume", "--out", out])
    lines = errors.splitlines()
    assert (status, len(lines)) == (2, 1), errors
    assert lines[0].startswith("finetune: ") and str(out) in lines[0]
    assert said in lines[0]
    # What was made again of files that are whole is the same.
    assert contents(out) == before


# Per-layer updates


@pytest.mark.long
def test_layerwise_takes_the_ordinary_steps_and_resumes(
    weights, problems, tmp_path, monkeypatch
):
    # MLorc magnifies the rounding of sums in another order.
    argv = [*FEW, "--methods", "galore_adamw", "--model", weights, "--data", problems]
    argv += ["--learning-rate", "1e-3", "--test-examples", "4", "--eval-every", "2"]
    runs = [tmp_path / name for name in ("ordinary", "layerwise")]
    adapters = [tmp_path / f"{name}-adapters" for name in ("ordinary", "layerwise")]

    def arguments(i):
        return [*argv, "--export-adapter", adapters[i], "--out", runs[i]]

    status, _, errors = run(arguments(0))
    assert status == 0, errors
    at_call(monkeypatch, Rows, "batch", 4, press_ctrl_c)
    assert run([*arguments(1), "--layerwise"])[0] == 130
    status, _, errors = run(["--resume", "--out", runs[1]])
    assert status == 0, errors

    expected, got = (
        read_metrics(out / "galore_adamw/seed-0/metrics.jsonl") for out in runs
    )
    assert got[0]["peak_bytes"] < expected[0]["peak_bytes"]
    assert len(got) == len(expected) == 6
    for a, b in zip(got, expected, strict=True):
        for name in {"loss", "grad_norm", "validation_loss"} & set(b):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5)
    models = (
        load_file(out / "galore_adamw/seed-0/model/model.safetensors") for out in runs
    )
    chex.assert_trees_all_close(*models, rtol=1e-4, atol=1e-5)
    # What is made of the weights does not tell one from the other.
    results = [result_of(out)["runs"]["galore_adamw"]["0"] for out in runs]
    for name in ("scores", "state_bytes", "trained_parameters"):
        assert results[0][name] == results[1][name]
    names = [
        set(load_file(path / "galore_adamw/seed-0/adapter_model.safetensors"))
        for path in adapters
    ]
    assert names[0] == names[1]


# What is refused


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "bad.jsonl"], "bad.jsonl, line 2: not JSON"),
        (["--test", "bad.jsonl"], "bad.jsonl, line 2: not JSON"),
        (["--data", "one.jsonl"], "one prompt cannot be split"),
        (["--seq-len", "40"], "is longer than a row of 40"),
        (["--data", "few.jsonl"], "Cannot fill a batch of 8 rows"),
        (["--model", "huge"], "huge is no directory"),
        (["--model", "empty"], "empty has no config.json"),
        (["--preset", "mine"], "'mine': choose from mlorc-metamath"),
        (["--methods", "sgdd"], "'sgdd': choose from"),
        (["--seeds", "1", "1"], "each at most once"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--learning-rate", "0"], "learning_rate must be above 0"),
        (["--temperature", "-1"], "temperature must be at least 0"),
        (["--evaluations", "2"], "temperature 0 would all be the same"),
        (["--test", "code.jsonl"], "code.jsonl, line 1: answers are judged by running"),
        (["--warmup", "1"], "warmup must be in"),
        (["--export-adapter", "there"], "adapter of a model from scratch"),
        (["--resume"], "no run"),
        (["--layerwise", "--methods", "dora"], "Cannot train dora layerwise"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_in_one_line(flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # No look at the hub for a name that is no directory.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("empty").mkdir()
    Path("bad.jsonl").write_bytes(GOOD + b"{")
    Path("one.jsonl").write_bytes(GOOD)
    Path("code.jsonl").write_text(FORMS["humaneval.jsonl"])
    Path("few.jsonl").write_bytes(GOOD + GOOD.replace(b"a?", b"b?"))
    before = set(tmp_path.iterdir())
    status, printed, errors = run(["--smoke", *flags])
    assert (status, printed) == (2, "")
    assert len(errors.splitlines()) == 1 and said in errors
    assert set(tmp_path.iterdir()) == before


# The papers' settings


def test_presets_have_the_papers_settings_and_give_way_to_flags():
    argv = ["--preset", "mlorc-metamath", "--data", "x.jsonl", "--batch-size", "4"]
    found, _ = parse_settings([*argv, "--out", "none"], "x", Finetune(), SMOKE, PRESETS)
    assert (found.rank, found.epochs, found.train_examples) == (4, 2, 10_000)
    assert (found.seq_len, found.temperature, found.update_every) == (512, 0.8, 300)
    assert (found.warmup, found.weight_decay, found.remat) == (0.03, 0.0, True)
    assert (found.data, found.batch_size, found.seeds) == ("x.jsonl", 4, (0,))
    assert PRESETS["mlorc-metamath"]["batch_size"] == 32
    code = PRESETS["mlorc-codefeedback"]
    assert (code["seq_len"], code["temperature"]) == (1024, 0.1)
    assert RATES["mlorc-metamath"]["mlorc_adamw"] == 7e-5
    assert RATES["mlorc-codefeedback"]["mlorc_lion"] == 7e-6
    for name, rates in RATES.items():
        argv = ["--preset", name, "--run-programs", "--out", "none"]
        found, _ = parse_settings(argv, "x", Finetune(), SMOKE, PRESETS)
        found.check()
        assert set(found.methods) <= set(rates) <= set(METHODS)
        for published in PUBLISHED[name].values():
            assert set(published) <= set(rates)
    # Alpha is 64 of the paper, 0.25 that of the method.
    rate = RATES["galore-plus-gsm8k"]["galore_plus_adamw_8bit"]
    assert rate * 0.25 == pytest.approx(64 * 1e-6)
    assert PRESETS["galore-plus-mawps"]["epochs"] == 3
    assert PRESETS["mlorc-metamath"]["evaluations"] == 4
