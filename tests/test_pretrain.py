"""The pre-training job: what it writes, what it refuses, stopping and resuming."""

import io
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from tokenizers import Tokenizer

from examples.common.checkpoints import seal
from examples.common.data import load_corpus
from examples.common.lock import is_free, sole_use
from examples.common.loop import TrainState
from examples.common.metrics import read_metrics
from examples.common.schedule import warmup_cosine
from examples.common.settings import read_record, settings_record, write_record
from examples.common.tokens import END_OF_TEXT, Packed
from examples.llama import finetune, pretrain
from examples.llama.finetune_settings import Finetune
from examples.llama.pretrain import CONFIGS, Pretrain, main
from examples.llama.weights import load_llama
from tests.faults import contents, flip, full_disk, largest, truncate
from tests.flags import check_help

METHODS = Pretrain().methods
STEPS = pretrain.SMOKE.steps


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A finished run of `--smoke`, and beside it what it printed."""
    out = tmp_path_factory.mktemp("smoke") / "run"
    printed = {"out": io.StringIO(), "err": io.StringIO()}
    with redirect_stdout(printed["out"]), redirect_stderr(printed["err"]):
        assert main(["--smoke", "--out", str(out)]) == 0
    for name, text in printed.items():
        (out.parent / name).write_text(text.getvalue())
    return out


def metrics_of(out, method):
    """The metrics but for the measured times."""
    records = read_metrics(out / method / "metrics.jsonl")
    assert all(record.pop("seconds", 1) > 0 for record in records)
    return records


def result_of(out):
    """The result but for the measured times."""
    result = json.loads((out / "result.json").read_text())
    for run in result["runs"].values():
        assert run.pop("timing")["step_seconds"] > 0
    return result


def final_checkpoint(out, method):
    """Every array of the last checkpoint, by its path."""
    directory = (out / method / "checkpoints" / str(STEPS) / "default").resolve()
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(directory)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


# A finished run


def test_every_method_learns_from_the_same_start(smoke):
    runs = result_of(smoke)["runs"]
    assert tuple(runs) == METHODS
    starts = {run["initial_validation_loss"] for run in runs.values()}
    assert len(starts) == 1
    assert starts.pop() == pytest.approx(math.log(512), abs=0.1)
    for method, run in runs.items():
        assert run["validation_loss"] < run["initial_validation_loss"] - 0.1, method
        assert run["perplexity"] == pytest.approx(math.exp(run["validation_loss"]))


def test_every_method_sees_the_same_batches(smoke):
    # The loss of the first step is taken before any method has moved.
    first = {metrics_of(smoke, method)[1]["loss"] for method in METHODS}
    assert len(first) == 1


def test_metrics_have_a_line_a_step_and_validations_in_time(smoke):
    for method in METHODS:
        records = metrics_of(smoke, method)
        assert [record["step"] for record in records] == list(range(STEPS + 1))
        validated = [r["step"] for r in records if "validation_loss" in r]
        assert validated == [0, 5, 10, 15, 20]
        for record in records[1:]:
            assert math.isfinite(record["loss"]) and record["grad_norm"] > 0
        overlaps = [r["probe"].get("overlap") for r in records if "probe" in r]
        assert overlaps[0] is None
        assert all(0 < overlap <= 1.0001 for overlap in overlaps[1:])
    moments = metrics_of(smoke, "adamw")[-1]["probe"]
    assert set(moments) == {"overlap", "gradient", "first_moment", "second_moment"}


def test_the_result_says_what_it_was_measured_on(smoke):
    result = result_of(smoke)
    corpus = load_corpus("stdlib", 0)
    assert result["data"]["source"] == "stdlib"
    assert result["data"]["sha256"] == corpus.sha256
    assert result["data"]["python"] == platform.python_version()
    assert result["versions"]["jax"] == jax.__version__
    assert result["settings"]["steps"] == STEPS
    assert result["model"]["vocab_size"] == 512


def test_state_bytes_are_those_of_the_checkpoint(smoke):
    for method, run in result_of(smoke)["runs"].items():
        arrays = final_checkpoint(smoke, method)
        state = sum(a.nbytes for path, a in arrays.items() if "opt_state" in path)
        assert run["state_bytes"] == state, method
        assert 0 < run["matrix_state_bytes"] < run["state_bytes"]
    adamw, *low_rank = result_of(smoke)["runs"].values()
    assert all(run["state_bytes"] < adamw["state_bytes"] for run in low_rank)


def test_the_final_models_are_saved_with_their_tokenizer(smoke):
    for method in METHODS:
        model = load_llama(smoke / method / "model")
        saved = final_checkpoint(smoke, method)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            # Layers are counted by words in a checkpoint.
            keys = "".join(f"['{part.key}']" for part in path)
            np.testing.assert_array_equal(leaf, saved[f"['params']{keys}"])
        tokenizer = Tokenizer.from_file(str(smoke / method / "model/tokenizer.json"))
        assert model.config.eos_token_id == tokenizer.token_to_id(END_OF_TEXT)


def test_the_report_is_written_and_its_paths_printed(smoke):
    printed = (smoke.parent / "out").read_text()
    for name in (
        "result.json",
        "report.md",
        "loss.png",
        "memory.png",
        "subspace_overlap.png",
        "singular_values.png",
    ):
        assert (smoke / name).stat().st_size > 0
        assert str(smoke / name) in printed
    report = (smoke / "report.md").read_text()
    assert "from scratch" in report
    for method, run in result_of(smoke)["runs"].items():
        row = next(line for line in report.splitlines() if f"| `{method}`" in line)
        assert f"{run['validation_loss']:.3f} |" in row
        assert f"{run['state_bytes']:,} B" in row
        assert row in printed


def test_there_is_a_progress_bar(smoke):
    printed = (smoke.parent / "err").read_text()
    for method in METHODS:
        assert re.search(rf"{method}: 20/20.*ETA.*loss \d.*tokens/s", printed)


# Per-layer updates


def test_a_layerwise_run_takes_the_same_steps_in_less_memory(smoke, tmp_path):
    out = tmp_path / "run"
    flags = ["--smoke", "--layerwise", "--methods", "adamw", "--out", str(out)]
    assert main(flags) == 0
    expected, got = metrics_of(smoke, "adamw"), metrics_of(out, "adamw")
    assert got[0]["peak_bytes"] < expected[0]["peak_bytes"]
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    # The saved models do not tell one from the other.
    models = (load_llama(run / "adamw" / "model") for run in (smoke, out))
    weights = [nnx.to_pure_dict(nnx.state(model, nnx.Param)) for model in models]
    # Of the head, each of 20 steps moves by 0.03, whose rounding AdamW's root enlarges.
    chex.assert_trees_all_close(*weights, rtol=1e-4, atol=1e-4)


# Stopping and resuming


def signal_at(monkeypatch, step, number):
    """Has the process signal itself when the batch of a step is first asked for."""
    original = Packed.batch

    def batch(self, seed, at, batch_size):
        if at == step:
            monkeypatch.setattr(Packed, "batch", original)
            os.kill(os.getpid(), number)
        return original(self, seed, at, batch_size)

    monkeypatch.setattr(Packed, "batch", batch)


def test_a_run_stopped_in_every_method_resumes_bit_for_bit(
    smoke, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    argv = ["--smoke", "--out", str(out)]
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGINT)
    for method, number in zip(METHODS, numbers, strict=True):
        signal_at(monkeypatch, 12, number)
        assert main(argv) == 130
        last = capsys.readouterr().err.splitlines()[-1]
        assert f"{method} stopped after step 13" in last
        assert f"python -m examples.llama.pretrain --resume --out {out}" in last
        assert metrics_of(out, method)[-1]["step"] == 13
        assert not (out / "result.json").exists()
        # The settings, --smoke's too, come from the record.
        argv = ["--resume", "--out", str(out)]
    assert main(argv) == 0

    assert result_of(out) == result_of(smoke)
    for method in METHODS:
        assert metrics_of(out, method) == metrics_of(smoke, method)
        expected, found = final_checkpoint(smoke, method), final_checkpoint(out, method)
        assert len(expected) > 20 and expected.keys() == found.keys()
        for path, array in expected.items():
            assert array.dtype == found[path].dtype
            assert array.tobytes() == found[path].tobytes(), (method, path)


def test_a_killed_run_resumes_from_its_last_checkpoint(smoke, tmp_path):
    out = tmp_path / "run"
    argv = ["--smoke", "--methods", "adamw", "--out", str(out)]
    program = (
        "import os, signal, sys\n"
        "from examples.common.tokens import Packed\n"
        "from examples.llama.pretrain import main\n"
        "original = Packed.batch\n"
        "def batch(self, seed, step, size):\n"
        "    if step == 13:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(self, seed, step, size)\n"
        "Packed.batch = batch\n"
        f"main({argv!r})\n"
    )
    root = Path(pretrain.__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", program], cwd=root, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    # Steps past the checkpoint are on record, and have to be taken back.
    assert metrics_of(out, "adamw")[-1]["step"] == 13
    assert main([*argv, "--resume"]) == 0
    assert metrics_of(out, "adamw") == metrics_of(smoke, "adamw")
    expected, found = final_checkpoint(smoke, "adamw"), final_checkpoint(out, "adamw")
    assert all(expected[path].tobytes() == found[path].tobytes() for path in expected)


def test_a_finished_run_resumes_to_its_report(smoke):
    before = metrics_of(smoke, "adamw"), result_of(smoke)
    (smoke / "report.md").unlink()
    assert main(["--resume", "--out", str(smoke)]) == 0
    assert (smoke / "report.md").exists()
    assert (metrics_of(smoke, "adamw"), result_of(smoke)) == before


def test_a_run_does_not_go_on_from_another_models_checkpoint(smoke, tmp_path, capsys):
    out = shutil.copytree(smoke, tmp_path / "run")
    (out / "result.json").unlink()
    foreign = TrainState({"norm": {"scale": jnp.ones(7)}}, (jnp.ones(3),), [])
    checkpoints = out / "adamw" / "checkpoints"
    shutil.rmtree(checkpoints)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((checkpoints / "10" / "default").resolve(), foreign)
    seal(checkpoints / "10")
    assert main(["--resume", "--out", str(out)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"The checkpoint {checkpoints / '10'} is of another model" in said
    assert not (out / "result.json").exists()


def test_resume_without_a_directory_takes_the_latest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for date in ("20260101-000000", "20260102-000000"):
        run = tmp_path / "runs" / f"pretrain-{date}"
        run.mkdir(parents=True)
        write_record(run, settings_record(Pretrain(steps=7)))
    assert main(["--resume", "--steps", "8"]) == 2
    said = capsys.readouterr().err
    assert "runs/pretrain-20260102-000000 with steps = 8" in said
    assert "started with 7" in said


# Faults of disks and of hands


def no_settings(out):
    write_record(out, {"device": "x"})


def unknown_setting(out):
    record = read_record(out)
    record["settings"]["stepz"] = 3
    write_record(out, record)


def setting_of_another_type(out):
    record = read_record(out)
    record["settings"]["steps"] = "20"
    write_record(out, record)


def no_model(out):
    record = read_record(out)
    del record["model"]["hidden_size"]
    write_record(out, record)


def edited_record(out):
    path = out / "run.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


def cut_record(out):
    truncate(out / "run.json")


def deep_record(out):
    (out / "run.json").write_text("[" * 100_000 + "]" * 100_000)


def flipped_tokens(out):
    flip(out / "data" / "train.npy")


def cut_tokens(out):
    truncate(out / "data" / "validation.npy")


def no_tokens(out):
    (out / "data" / "train.npy").unlink()


def edited_tokenizer(out):
    path = out / "data" / "tokenizer.json"
    path.write_text(path.read_text().replace("endoftext", "endoftexts"))


def edited_metrics(out):
    path = out / "adamw" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 3', '"step": 4', 1))


def cut_metrics(out):
    truncate(out / "adamw" / "metrics.jsonl")


def flipped_checkpoints(out):
    for checkpoint in (out / "adamw" / "checkpoints").iterdir():
        flip(largest(checkpoint))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_settings, "run.json is of another command"),
        (unknown_setting, "run.json is of another command: unknown field 'stepz'"),
        (setting_of_another_type, "steps must be int, got '20'"),
        (no_model, "run.json is of another command: ValueError('it lacks hidden_size"),
        (edited_record, "run.json is not as it was written"),
        (cut_record, "run.json is not JSON"),
        (deep_record, "run.json is nested too deeply"),
        (flipped_tokens, "data is not as it was written"),
        (cut_tokens, "data is not as it was written"),
        (no_tokens, "data has no train.npy. Restore it"),
        (edited_tokenizer, "data is not as it was written"),
        (edited_metrics, "adamw/metrics.jsonl is not as it was written up to step 20"),
        (cut_metrics, "adamw/metrics.jsonl is not as it was written up to step 20"),
        (flipped_checkpoints, "adamw/checkpoints/20: its file"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_run_is_refused_in_one_line(spoil, said, smoke, tmp_path, capsys):
    out = shutil.copytree(smoke, tmp_path / "run")
    spoil(out)
    before = contents(out)
    assert main(["--resume", "--out", str(out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("pretrain: ")
    assert str(out) in lines[0] and said in lines[0]
    assert contents(out) == before


@pytest.mark.long
def test_one_flipped_bit_does_not_change_the_results(smoke, tmp_path, capsys):
    out = shutil.copytree(smoke, tmp_path / "run")
    flip(largest(out / "mlorc_adamw" / "checkpoints" / str(STEPS)))
    assert main(["--resume", "--out", str(out)]) == 0
    assert "Going on from that of step 10" in capsys.readouterr().err
    assert result_of(out) == result_of(smoke)
    for method in METHODS:
        assert metrics_of(out, method) == metrics_of(smoke, method)


@pytest.mark.long
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(smoke, tmp_path, capsys):
    out = shutil.copytree(smoke, tmp_path / "run")
    shutil.rmtree(out / "adamw")
    # All but the checkpoints fits.
    with full_disk(20_000):
        assert main(["--resume", "--out", str(out)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"Cannot write the checkpoint {out / 'adamw/checkpoints/10'}" in last
    assert main(["--resume", "--out", str(out)]) == 0
    assert metrics_of(out, "adamw") == metrics_of(smoke, "adamw")


@pytest.mark.parametrize(
    ("limit", "file"), [(1000, "tokenizer.json"), (30_000, "train.npy")]
)
def test_a_full_disk_at_the_start_leaves_no_run(limit, file, tmp_path, capsys):
    out, text = tmp_path / "run", tmp_path / "texts"
    text.mkdir()
    for i in range(20):
        numbers = np.random.default_rng(i).integers(0, 10**6, 500)
        (text / f"{i}.txt").write_text(" ".join(map(str, numbers)))
    argv = ["--smoke", "--data", f"path:{text}", "--seq-len", "4", "--steps", "2"]
    argv += ["--batch-size", "1", "--methods", "adamw", "--out", str(out)]
    with full_disk(limit):
        assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"Cannot write {out / 'data' / file}: " in lines[0]
    assert is_free(out)
    assert main(argv) == 0


def test_a_run_that_was_killed_before_its_record_says_what_to_do(
    smoke, tmp_path, capsys
):
    out = shutil.copytree(smoke, tmp_path / "run")
    (out / "run.json").unlink()
    assert main(["--resume", "--out", str(out)]) == 2
    assert f"delete {out}, and start it again" in capsys.readouterr().err


def test_a_directory_in_which_another_process_works_is_refused(smoke, tmp_path, capsys):
    out = shutil.copytree(smoke, tmp_path / "run")
    before = contents(out)
    with sole_use(out, resumed=True):
        assert main(["--resume", "--out", str(out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"Cannot work in {out}: another process does" in lines[0]
    assert contents(out) == before


# What is refused


def absurd(**fields):
    def flag(tmp_path):
        config = json.loads((CONFIGS / "smoke.json").read_text())
        file = tmp_path / "absurd.json"
        long = {"max_position_embeddings": 128}  # as are the rows
        file.write_text(json.dumps(config | long | fields))
        return str(file)

    flag.__name__ = str(fields)
    return flag


def bad_line(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "good"}\n{"text": 5}\n')
    return f"path:{file}"


def small_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("A short text, line by line.\n" * 40)
    return f"path:{file}"


def broken_config(tmp_path):
    config = json.loads((CONFIGS / "smoke.json").read_text())
    file = tmp_path / "broken.json"
    file.write_text(json.dumps(config | {"num_attention_heads": 3}))
    return str(file)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--methods", "adamw", "sgdd"], "'sgdd': choose from adamw, lion"),
        (["--methods", "adamw", "adamw"], "each at most once"),
        (["--data", "path:nowhere/at/all"], "nowhere/at/all': no such path"),
        (["--data", "nonsense"], "expected auto, stdlib"),
        (["--data", small_text], "batch of 8 rows"),
        (["--rank", "0"], "rank 0"),
        (["--rank", "-3"], "rank -3"),
        (["--model", broken_config], "num_attention_heads=3 does not divide"),
        (["--model", "huge"], "'huge': choose from"),
        (["--model", absurd(intermediate_size=2**30)], "weights in float32"),
        (["--model", absurd(num_hidden_layers=10**9)], "must be at most 4,096"),
        (["--model", absurd(vocab_size=10**30)], "vocab_size must be at most"),
        (["--model", absurd(intermediate_size=2**31)], "intermediate_size must be"),
        (["--model", absurd(rope_scaling={"factor": 8.0})], "rope_scaling: factor=8.0"),
        (["--data", bad_line], "text.jsonl, line 2: no text under 'text'"),
        (["--seq-len", "9999"], "9999 tokens: the model takes"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--learning-rate", "-1"], "learning_rate must be above 0"),
        (["--weight-decay", "-1"], "weight_decay must be at least 0"),
        (["--resume"], "no run"),
        (["--layerwise", "--methods", "lora"], "Cannot train lora layerwise"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_work_is_refused_in_one_line(
    flags, said, tmp_path, monkeypatch, capsys
):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    flags = [flag if isinstance(flag, str) else flag(inputs) for flag in flags]
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    assert main(flags) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1 and said in lines[0]
    assert printed.out == ""
    assert list(work.iterdir()) == []


def test_a_directory_in_use_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep me")
    assert main(["--smoke", "--out", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_resumed_run_keeps_its_settings(smoke, capsys):
    assert main(["--resume", "--out", str(smoke), "--rank", "2"]) == 2
    said = capsys.readouterr().err
    assert "rank = 2" in said and "started with 4" in said
    assert main(["--resume", "--out", str(smoke / "adamw")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_bad_flags_exit_with_status_2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags in (["--steps", "many"], ["--stepz", "3"]):
        with pytest.raises(SystemExit) as caught:
            main(flags)
        assert caught.value.code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("main", "settings"), [(main, Pretrain), (finetune.main, Finetune)]
)
def test_help_explains_every_flag(main, settings, capsys, monkeypatch):
    check_help(main, settings, capsys, monkeypatch)


# The schedule


def test_the_rate_warms_up_and_decays_to_a_tenth():
    schedule = warmup_cosine(1.0, 100)
    rates = np.array([float(schedule(step)) for step in range(101)])
    assert rates[0] == pytest.approx(0.1)
    assert rates.argmax() == 10 and rates[10] == pytest.approx(1.0)
    assert np.all(np.diff(rates[:11]) > 0) and np.all(np.diff(rates[10:]) < 0)
    assert rates[55] == pytest.approx(0.55, abs=1e-6)  # half-way between 1 and 0.1
    assert rates[100] == pytest.approx(0.1)


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_short_runs_have_a_schedule_too(steps):
    rates = [float(warmup_cosine(2.0, steps)(step)) for step in range(steps)]
    assert all(0 < rate <= 2 for rate in rates)
