"""The GLUE command: what it writes, what it refuses, killing and resuming."""

import dataclasses
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.numpy import load_file

import lowrank_optax as lro
from examples.common.checkpoints import seal
from examples.common.loop import TrainState
from examples.common.methods import METHODS as ALL_METHODS
from examples.common.metrics import read_metrics
from examples.common.settings import read_record, write_record
from examples.roberta import glue, job, report
from examples.roberta.batches import Encoded
from examples.roberta.config import EncoderConfig
from examples.roberta.glue import main, prepare
from examples.roberta.masked import Masking
from examples.roberta.settings import Glue
from examples.roberta.weights import load_classifier
from tests.faults import contents, truncate
from tests.flags import check_help
from tests.interrupting import Crash, at_call, crash, stop
from tests.mrpc import TINY, write_data, write_model

METHODS = ("adamw", "lora")
SEEDS = (0, 3)
STEPS = 6  # two epochs of 20 pairs, 8 in a batch


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_data(folder / "mrpc")
    write_model(folder / "model")
    return folder


def flags(inputs, out, *more):
    given = {
        "--task": "mrpc",
        "--data": inputs / "mrpc",
        "--model": inputs / "model",
        "--batch-size": 8,
        "--epochs": 2,
        "--max-length": 16,
        "--rank": 2,
        "--learning-rate": 1e-2,
        "--checkpoint-every": 4,
        "--out": out,
    }
    return [str(x) for pair in given.items() for x in pair] + [*more]


MANY = ("--methods", *METHODS, "--seeds", "0", "3", "--grid", "0.1", "1")


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A finished run, and beside it what it printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    printed = {"out": io.StringIO(), "err": io.StringIO()}
    with redirect_stdout(printed["out"]), redirect_stderr(printed["err"]):
        assert main(flags(inputs, out, *MANY)) == 0
    for name, text in printed.items():
        (out.parent / name).write_text(text.getvalue())
    return out


def result_of(out):
    """The result but for the measured times."""
    result = json.loads((out / "result.json").read_text())
    for run in result["runs"].values():
        assert run.pop("timing")["step_seconds"] > 0
    return result


# On a mesh


@pytest.mark.long
def test_two_devices_take_the_steps_of_one(inputs, tmp_path):
    losses = {}
    for name, mesh in (("one", []), ("two", ["--mesh", "model=2"])):
        out = tmp_path / name
        asked = ["--methods", "mlorc_adamw", "--epochs", "1", *mesh]
        assert main(flags(inputs, out, *asked)) == 0
        found = sorted(out.glob("*/lr-*/metrics.jsonl"))
        losses[name] = [[r["loss"] for r in read_metrics(x)[1:]] for x in found]
        device = json.loads((out / "result.json").read_text())["device"]
        assert ("2 x" in device and "mesh model=2" in device) == (name == "two")
    assert [len(steps) for steps in losses["one"]] == [3]
    for one, two in zip(*losses.values(), strict=True):
        assert one == pytest.approx(two, rel=1e-4)


# A finished run


def test_the_result_has_scores_of_every_seed_at_the_best_rate(finished):
    result = result_of(finished)
    assert tuple(result["runs"]) == METHODS
    assert result["start"].startswith("pretrained, with fresh classifier.bias")
    assert result["steps"] == STEPS and result["settings"]["seeds"] == [0, 3]
    assert result["constant_answer"] == {"f1": pytest.approx(2 / 3)}
    for method, run in result["runs"].items():
        assert set(run["tried"]) == {"0.001", "0.01"}
        rate = max(run["tried"], key=lambda r: (run["tried"][r], -float(r)))
        assert run["learning_rate"] == float(rate)
        assert set(run["seeds"]) == {"0", "3"}
        assert run["seeds"]["0"]["f1"] == run["tried"][rate]
        for seed, found in run["seeds"].items():
            path = finished / method / f"lr-{rate}-seed-{seed}" / "metrics.jsonl"
            records = [r for r in read_metrics(path)[1:] if "f1" in r]
            assert [r["step"] for r in records] == [3, 6]
            best = max(records, key=lambda r: r["f1"])
            assert found["best_step"] == best["step"]
            assert {k: found[k] for k in ("f1", "accuracy")} == {
                k: best[k] for k in ("f1", "accuracy")
            }
        values = [run["seeds"][str(seed)]["f1"] for seed in SEEDS]
        assert run["scores"]["f1"]["mean"] == pytest.approx(np.mean(values))
        assert run["scores"]["f1"]["spread"] == pytest.approx(np.std(values, ddof=1))


def test_lora_trains_adapters_and_head_only(finished):
    runs = result_of(finished)["runs"]
    adapters = 2 * 2 * (4 * 64 + 2 * 96)  # two layers, rank 2, (m + n) of each matrix
    head = 32 * 32 + 32 + 32 * 2 + 2
    assert runs["lora"]["trained_parameters"] == adapters + head
    # Two moments each; besides a few counters.
    assert 0 < runs["lora"]["state_bytes"] - 8 * (adapters + head) < 64
    rate = runs["lora"]["learning_rate"]
    best = load_file(finished / "lora" / f"lr-{rate:g}-seed-0/best/model.safetensors")
    first = load_file(TINY / "model.safetensors")
    changed = {n for n in best if not np.array_equal(best[n], first[n])}
    assert {n.split(".")[1] for n in changed if n.startswith("bert.")} == {
        "encoder",
        "pooler",
    }
    assert all("weight" in n and "Norm" not in n for n in changed if "encoder" in n)


def test_the_best_checkpoint_has_the_best_score_again(finished, inputs):
    run = result_of(finished)["runs"]["adamw"]
    best = finished / "adamw" / f"lr-{run['learning_rate']:g}-seed-3" / "best"
    given = prepare(dataclasses.replace(settings(inputs), model=str(best)), Path("x"))
    weights = load_classifier(best)
    assert weights.start == "pretrained, head included"
    assert weights.config.labels == ("not_equivalent", "equivalent")
    params = job.params_of(weights.model(nnx.Rngs(0)))
    record = given.evaluate(given.graph("adamw"), params)
    assert record["f1"] == run["seeds"]["3"]["f1"]
    assert record["validation_loss"] == pytest.approx(
        run["seeds"]["3"]["validation_loss"], rel=1e-5
    )


def test_only_what_is_of_use_is_kept(finished):
    for method in METHODS:
        runs = sorted(path.name for path in (finished / method).iterdir())
        assert len(runs) == 3  # two rates, and another seed of the better one
        kept = [path for path in (finished / method).glob("*/best")]
        assert len(kept) == 2
    assert not list(finished.rglob("checkpoints"))


def test_the_report_shows_spread_bytes_and_the_papers_figures(finished):
    page, result = (finished / "report.md").read_text(), result_of(finished)
    printed = (finished.parent / "out").read_text()
    assert "pretrained, with fresh" in page and "pretrained, with fresh" in printed
    for method, run in result["runs"].items():
        row = next(line for line in page.splitlines() if f"| `{method}`" in line)
        score = run["scores"]["f1"]
        assert f"{100 * score['mean']:.2f} ± {100 * score['spread']:.2f}" in row
        assert f"{run['state_bytes']:,} B" in row
        assert f"{run['peak_bytes'] / 2**20:,.1f} MiB" in row
        assert row in printed
    assert "**not measured here**" in page and "MLorc, Table 5 (rank 8)" in page
    assert "| 90.77 |" in page
    assert "Learning rates that were tried" in page
    for name in ("report.md", "scores.png", "curves.png", "memory.png", "result.json"):
        assert (finished / name).stat().st_size > 0
        assert str(finished / name) in printed


def test_there_is_a_progress_bar_a_run(finished):
    printed = (finished.parent / "err").read_text()
    pattern = r"lora, rate 0\.01, seed 0: 6/6.*ETA.*loss \d.*examples/s"
    assert re.search(pattern, printed)


# Killing and resuming


def files(folder):
    return {x.relative_to(folder) for x in folder.rglob("*") if x.is_file()}


@pytest.mark.long
def test_a_run_that_crashes_anywhere_ends_as_one_that_does_not(
    finished, inputs, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    argv = flags(inputs, out, *MANY, "--methods", "lora")
    points = [
        (Encoded, "training_batch", 6),  # in the first run, past a checkpoint
        (job, "save_model", 1),  # a better validation, not yet on record
        (job.Job, "_sum_up", 1),  # a run is done, and no summary is written
        (job.shutil, "rmtree", 3),  # a run is done, its checkpoints are still there
        (report, "write_json", 1),
    ]
    for owner, name, call in points:
        at_call(monkeypatch, owner, name, call, crash)
        with pytest.raises(Crash):
            main(argv)
        assert not (out / "result.json").exists()
        argv = ["--resume", "--out", str(out)]
    assert main(argv) == 0
    assert result_of(out)["runs"]["lora"] == result_of(finished)["runs"]["lora"]

    assert files(out / "lora") == files(finished / "lora")


@pytest.mark.long
def test_a_run_killed_while_it_saves_and_stopped_goes_on(
    finished, inputs, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    # One of the runs of the other, which has the record that this should come to.
    argv = flags(inputs, out, "--methods", "adamw", "--learning-rate", "0.001")
    program = (
        "import os, signal, sys\n"
        "from examples.roberta.glue import main\n"
        "def hook(event, args):\n"
        "    if event == 'os.rename' and str(args[1]).endswith('/checkpoints/6'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.addaudithook(hook)\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", program, *argv]
    root = Path(glue.__file__).parents[2]
    killed = subprocess.run(command, cwd=root, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    run = "adamw/lr-0.001-seed-0"
    names = sorted(path.name for path in (out / run / "checkpoints").iterdir())
    assert names[0] == "4" and names[1].startswith("6.") and len(names) == 2
    # Steps past the checkpoint are on record, and have to be taken back.
    assert read_metrics(out / run / "metrics.jsonl")[-1]["step"] == 6
    assert not (out / "result.json").exists()

    at_call(monkeypatch, Encoded, "training_batch", 1, stop)
    assert main([*argv, "--resume"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert "adamw, rate 0.001, seed 0 stopped after step 5" in last
    assert f"python -m examples.roberta.glue --resume --out {out}" in last
    assert not (out / "result.json").exists()

    assert main(["--resume", "--out", str(out)]) == 0
    found, expected = (read_metrics(d / run / "metrics.jsonl") for d in (out, finished))
    for record in (*found, *expected):
        record.pop("seconds", None)
    assert found == expected
    score = result_of(out)["runs"]["adamw"]["scores"]["f1"]
    tried = result_of(finished)["runs"]["adamw"]["tried"]["0.001"]
    assert score == {"mean": tried, "spread": None}


def test_a_resumed_run_must_find_its_data_and_model_unchanged(
    finished, inputs, tmp_path, capsys
):
    for part in ("model", "data"):
        out = tmp_path / part
        out.mkdir()
        record = read_record(finished)
        record[part]["sha256"] = "another"
        write_record(out, record)
        shutil.copy(finished / "tokenizer.json", out)
        assert main(["--resume", "--out", str(out)]) == 2
        assert f"the {part} is not what it was" in capsys.readouterr().err
    assert main(["--resume", "--out", str(finished), "--rank", "3"]) == 2
    assert "rank = 3" in capsys.readouterr().err


def test_a_run_does_not_go_on_from_another_models_checkpoint(
    finished, tmp_path, capsys
):
    out = tmp_path / "run"
    out.mkdir()
    for name in ("run.json", "tokenizer.json"):
        shutil.copy(finished / name, out)
    checkpoint = out / "adamw/lr-0.001-seed-0/checkpoints/4"
    foreign = TrainState({"classifier": {"kernel": jnp.ones(7)}}, (jnp.ones(3),), [])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((checkpoint / "default").resolve(), foreign)
    seal(checkpoint)
    assert main(["--resume", "--out", str(out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"The checkpoint {checkpoint} is of another" in lines[0]
    assert not (out / "result.json").exists()


def a_run_of(out, name):
    """The file in the directory of the run that `lora` was found best with."""
    rate = result_of(out)["runs"]["lora"]["learning_rate"]
    return out / "lora" / f"lr-{rate:g}-seed-0" / name


def cut_summary(out):
    truncate(a_run_of(out, "summary.json"))


def odd_summary(out):
    path = a_run_of(out, "summary.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state_bytes": "1"}))


def cut_metrics(out):
    truncate(a_run_of(out, "metrics.jsonl"))


def edited_metrics(out):
    path = a_run_of(out, "metrics.jsonl")
    path.write_text(path.read_text().replace('"loss": ', '"loss": 1', 1))


def no_metrics(out):
    a_run_of(out, "metrics.jsonl").unlink()


def cut_tokenizer(out):
    truncate(out / "tokenizer.json")


def edited_record(out):
    path = out / "run.json"
    path.write_text(path.read_text().replace('"rank": 2', '"rank": 3'))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut_summary, "seed-0/summary.json is not JSON"),
        (odd_summary, "summary.json is not as it was written: state_bytes must be int"),
        (cut_metrics, "seed-0/metrics.jsonl is not as it was when the run was done"),
        (edited_metrics, "seed-0/metrics.jsonl is not as it was when the run was done"),
        (no_metrics, "seed-0/metrics.jsonl is not as it was when the run was done"),
        (edited_record, "run.json is not as it was written"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_run_is_refused_in_one_line(spoil, said, finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    spoil(out)
    before = contents(out)
    assert main(["--resume", "--out", str(out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("glue: ")
    assert str(out) in lines[0] and said in lines[0]
    assert contents(out) == before


# What is refused


def edit(name, change):
    """Flags for a copy of the inputs in which a file is changed, or gone."""

    def make(inputs, folder):
        shutil.copytree(inputs, folder, dirs_exist_ok=True)
        path = folder / name
        content = change(path.read_bytes())
        path.unlink() if content is None else path.write_bytes(content)
        return ["--data", str(folder / "mrpc"), "--model", str(folder / "model")]

    return make


def config_of(**changes):
    return lambda content: json.dumps(json.loads(content) | changes).encode()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--task", "wnli"], "'wnli': choose from stdlib, cola"),
        (["--methods", "adamw", "sgdd"], "'sgdd': choose from adamw"),
        (["--methods", "scratch", "scratch"], "each at most once"),
        (["--seeds", "1", "1"], "each at most once"),
        (["--grid", "0"], "grid must have factors above 0"),
        (["--rank", "0"], "rank"),
        (["--epochs", "0"], "epochs must be above 0"),
        (["--warmup", "2"], "warmup must be from 0 to 1"),
        (["--max-length", "65"], "65 tokens: the model takes 64"),
        (["--data", "nowhere"], "'nowhere': no such file"),
        (["--task", "rte"], "no file for RTE"),
        (["--task", "stdlib"], "leave --data out"),
        (["--model", "no/such/model"], "no/such/model is no directory"),
        (
            edit("mrpc/mrpc_train.tsv", lambda b: b + b"1\t2\n"),
            "mrpc_train.tsv: row 22",
        ),
        (
            edit("mrpc/mrpc_test.tsv", lambda b: b.replace(b"\n0\t", b"\n7\t", 1)),
            "mrpc_test.tsv: row 2: the label '7'",
        ),
        (edit("mrpc/mrpc_train.tsv", lambda b: b""), "mrpc_train.tsv: it has no rows"),
        (
            edit("mrpc/mrpc_train.tsv", lambda b: b.decode().encode("utf-16")),
            "mrpc_train.tsv, line 1: not UTF-8",
        ),
        (edit("model/vocab.txt", lambda b: b + b"more\n"), "vocab.txt does not fit"),
        (edit("model/vocab.txt", lambda b: None), "has no tokenizer"),
        (edit("model/config.json", config_of(model_type="gpt2")), "model_type='gpt2'"),
        (edit("model/config.json", config_of(hidden_size=64)), "misshapen"),
        (edit("model/config.json", config_of(vocab_size=2**31 - 1)), "misshapen"),
        (edit("model/config.json", lambda b: b"[" * 100_000), "nested too deeply"),
        (edit("model/model.safetensors", lambda b: b[:99]), "model.safetensors: "),
        (edit("model/config.json", config_of(model_type="roberta")), "missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_work_is_refused_in_one_line(
    change, said, inputs, tmp_path, monkeypatch, capsys
):
    # Without it the hub's client asks the network for a model of that name.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    own = change if isinstance(change, list) else change(inputs, tmp_path / "inputs")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    argv = flags(inputs, work / "run", *own)
    # The last of a flag that is given twice counts.
    assert main(argv) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1 and said in lines[0], lines
    assert len(lines[0]) < 900
    assert printed.out == ""
    assert list(work.iterdir()) == []


def test_help_explains_every_flag(capsys, monkeypatch):
    check_help(main, Glue, capsys, monkeypatch)


# Parts of the job


def settings(inputs, **changes):
    return Glue(
        task="mrpc",
        data=str(inputs / "mrpc"),
        model=str(inputs / "model"),
        batch_size=8,
        max_length=16,
        rank=2,
        learning_rate=1e-2,
        **changes,
    )


def test_rows_that_fill_a_batch_up_count_for_nothing(inputs):
    given = prepare(settings(inputs), Path("x"))
    params = job.params_of(given.model("adamw", 0, given.weights))
    loss = jax.jit(partial(job.weighted_loss, given.graph("adamw"), False))
    rows = np.array([4, 9, 11])
    exact = float(loss(params, given.train.batch(rows, 3)))
    filled = float(loss(params, given.train.batch(rows, 8)))
    other = float(loss(params, given.train.batch(rows[:2], 8)))
    assert filled == pytest.approx(exact, rel=1e-5)
    assert abs(other - exact) > 1e-4


def test_numbers_are_learnt_by_squares_and_classes_by_entropy():
    numbers = job._losses(jnp.array([[1.0], [4.0]]), jnp.array([2.0, 4.5]))
    np.testing.assert_allclose(numbers, [1.0, 0.25])
    logits = np.array([[0.0, np.log(3.0)]])
    np.testing.assert_allclose(
        job._losses(jnp.asarray(logits), jnp.array([1])), -np.log(0.75), rtol=1e-6
    )


@pytest.mark.parametrize(
    "method", ["mlorc_adamw", "galore_plus_adamw", "dora", "factorized"]
)
def test_every_kind_of_method_fits_the_encoder(method, inputs):
    given = prepare(settings(inputs, methods=(method,)), Path("x"))
    if ALL_METHODS[method].linear is None:
        rows = lro.describe(given.optimizer(method, 1e-3), given.shapes(method))
        assert {row.rank for row in rows if row.view is not None} == {2}
    model = given.model(method, 0, given.weights)
    batch = given.train.batch(np.arange(3), 3)
    logits = jax.jit(partial(job._logits, given.graph(method)), static_argnums=2)(
        job.params_of(model), batch, None
    )
    plain = given.weights.model(nnx.Rngs(0))
    expected = job._logits(given.graph("adamw"), job.params_of(plain), batch, None)
    if method != "factorized":  # which begins with the nearest of the rank
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


# The model that is made here

MADE = (
    "--smoke --train-examples 32 --validation-examples 16 --batch-size 16"
    " --max-length 16 --pretrain-steps 3 --methods adamw scratch"
).split()


@pytest.fixture(scope="module")
def stdlib():
    """Has the standard library read once, and few of its docstrings."""
    dataset, docstrings = glue.load_stdlib()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glue, "load_stdlib", lambda: (dataset, docstrings[:1000]))
        yield


@pytest.fixture(scope="module")
def made(stdlib, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "run"
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main([*MADE, "--out", str(out)]) == 0
    (out.parent / "out").write_text(printed.getvalue())
    return out


def test_a_model_is_made_first_where_none_is_given(made):
    result = result_of(made)
    assert "masked language modelling" in result["start"]
    assert result["runs"]["adamw"]["start"] == result["start"]
    assert result["runs"]["scratch"]["start"] == "from scratch"
    assert len(result["data"]["labels"]) == 10
    assert "from scratch" in (made / "report.md").read_text()
    assert "masked language modelling" in (made.parent / "out").read_text()

    base = load_classifier(made / "pretrained", labels=result["data"]["labels"])
    assert all(name.startswith("classifier.") for name in base.fresh)
    steps = [r["step"] for r in read_metrics(made / "pretrained" / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3]
    # Adam moves by its rate at most: one row begins with what was made, one does not.
    names = {"adamw": True, "scratch": False}
    for method, near in names.items():
        best = load_classifier(next((made / method).glob("*/best")))
        table = ("encoder", "embeddings", "word_embeddings", "embedding")
        distance = np.abs(best.read[table] - base.read[table]).max()
        assert (distance < 0.0025) == near


def test_a_damaged_tokenizer_of_a_run_is_refused(made, tmp_path, capsys):
    out = shutil.copytree(made, tmp_path / "run")
    cut_tokenizer(out)
    assert main(["--resume", "--out", str(out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"{out / 'tokenizer.json'} is no tokenizer" in lines[0]


def test_a_damaged_base_of_a_run_is_refused(made, tmp_path, capsys):
    out = shutil.copytree(made, tmp_path / "run")
    for name in ("result.json", "report.md"):  # as if it had been stopped before
        (out / name).unlink()
    shutil.rmtree(out / "scratch")
    tensors = out / "pretrained" / "model.safetensors"
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(content)
    assert main(["--resume", "--out", str(out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"{tensors} is not as it was written" in lines[0]


@pytest.mark.long
def test_making_it_goes_on_too_after_a_stop_and_crashes(
    made, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    # The first two batches of a call give shapes, the fourth is that of step 2.
    at_call(monkeypatch, Masking, "batch", 4, stop)
    assert main([*MADE, "--out", str(out)]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert "masked tokens stopped after step 2" in last
    argv = ["--resume", "--out", str(out)]
    points = [
        (Masking, "batch", 3),  # in step 3
        (EncoderConfig, "to_json", 1),  # its weights are there, but no config
        (job.Job, "run", 2),  # between two methods
    ]
    for owner, name, call in points:
        at_call(monkeypatch, owner, name, call, crash)
        with pytest.raises(Crash):
            main(argv)
    assert main(argv) == 0
    assert result_of(out) == result_of(made)
    assert files(out) == files(made)
    tensors = "pretrained/model.safetensors"
    assert (out / tensors).read_bytes() == (made / tensors).read_bytes()
