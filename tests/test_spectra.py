"""The spectra of gradients and moments along a fine-tuning, against NumPy."""

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout

import jax
import numpy as np
import pytest

from examples import spectra
from examples.common.metrics import read_metrics
from examples.roberta.batches import Encoded
from examples.roberta.glue import prepare
from examples.roberta.job import params_of
from examples.roberta.spectra_report import RESIDUALS, Run
from examples.spectra import Spectra, main
from tests.interrupting import at_call, stop
from tests.mrpc import write_data, write_model

STEPS = 4  # an epoch and a third of 20 pairs, 8 in a batch
MATRIX = "encoder/layers/1/up/kernel"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_data(folder / "mrpc")
    write_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def flags(inputs):
    return (
        f"--task mrpc --data {inputs / 'mrpc'} --model {inputs / 'model'} --batch-size"
        " 8 --epochs 1.3 --max-length 16 --rank 2 --learning-rate 1e-2"
        " --update-every 2 --measurements 2"
    ).split()


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """A finished run, and beside it what it printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(io.StringIO()):
        assert main([*flags, "--out", str(out)]) == 0
    (out.parent / "out").write_text(printed.getvalue())
    return out


def measured(out, method):
    result = json.loads((out / "spectra.json").read_text())
    assert result["steps"] == STEPS
    return result["runs"][method]["measured"]


def job_of(inputs, **given):
    places = {"data": str(inputs / "mrpc"), "model": str(inputs / "model")}
    settings = Spectra(task="mrpc", max_length=16, **places, **given).glue()
    return prepare(settings, inputs / "none")


def test_measures_are_those_of_numpys_singular_values(finished, inputs):
    """Moments summed in float64 from the gradients of the same steps."""
    job = job_of(inputs, batch_size=8, epochs=1.3, learning_rate=1e-2)
    params = params_of(job.model("adamw", 0, job.weights))
    tx = job.optimizer("adamw", 1e-2)
    state, update = tx.init(params), jax.jit(tx.update)
    gradient = jax.jit(jax.grad(job.loss("adamw")))

    def matrix(tree):
        for name in MATRIX.split("/"):
            tree = tree[int(name) if name.isdigit() else name]
        return np.asarray(tree, np.float64)

    first = second = 0.0
    for step in range(STEPS):
        grads = gradient(params, job.train.training_batch(0, step, 8))
        squares = [
            np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(grads)
        ]
        clipped = matrix(grads) / max(1.0, np.sqrt(np.sum(squares)))
        first = 0.9 * first + 0.1 * clipped
        second = 0.999 * second + 0.001 * clipped**2
        updates, state = update(grads, state, params)
        params = jax.tree.map(np.add, params, updates)
    fixed = matrix(gradient(params, job.train.training_batch(0, STEPS, 8)))

    last = measured(finished, "adamw")[-1]
    assert last["step"] == STEPS
    named = {"gradient": fixed, "first_moment": first, "second_moment": second}
    for quantity, x in named.items():
        s = np.linalg.svd(x, compute_uv=False)
        p = s / s.sum()
        expected = {
            "top8": p[:8].sum(),
            "entropy_rank": np.exp(-np.sum(p * np.log(p))),
        }
        left = np.cumsum((s**2)[::-1])[::-1] / np.sum(s**2)
        for residual in RESIDUALS:
            expected[f"rank@{residual:g}"] = np.sum(left > residual)
        for measure, value in expected.items():
            found = last[f"{quantity}/{measure}/{MATRIX}"]
            assert found == pytest.approx(value, rel=1e-3), (quantity, measure)


def test_both_rates_reach_the_optimizer(inputs):
    job = job_of(inputs, learning_rate=1e-3, dense_learning_rate=4e-3)
    params = params_of(job.model("adamw", 0, job.weights))
    grads = jax.tree.map(np.ones_like, params)
    tx = job.optimizer("adamw", *job.settings.rates("adamw"))
    updates, _ = tx.update(grads, tx.init(params), params)
    layer = updates["encoder"]["layers"][1]["up"]
    ratio = np.mean(layer["bias"]) / np.mean(layer["kernel"])
    assert ratio == pytest.approx(4, rel=1e-3)


def test_every_matrix_is_measured_and_moments_after_the_first_step(finished):
    first, *later = measured(finished, "adamw")
    names = set(json.loads((finished / "spectra.json").read_text())["matrices"])
    assert len(names) == 2 * 6 and MATRIX in names
    assert [record["step"] for record in later] == [2, 4]
    quantities = ("gradient", "first_moment", "second_moment")
    for record, known in ((first, quantities[:1]), (later[0], quantities)):
        keys = {k for k in record if k.count("/") > 1}
        assert {k.split("/")[0] for k in keys} == set(known)
        assert {k.split("/", 2)[2] for k in keys} == names
    start, *ranks = measured(finished, "adarankgrad_adamw")
    assert "rank" not in start
    for record in ranks:
        chosen = {n: record[f"rank/{n}"] for n in names}
        assert set(chosen.values()) <= {1, 2}
        assert record["rank"] == pytest.approx(
            np.average(
                [chosen[n] for n in sorted(names)],
                # Feed-forward matrices are 32 x 64, the others 32 x 32.
                weights=[
                    96 if n.split("/")[3] in ("up", "down") else 64
                    for n in sorted(names)
                ],
            )
        )


def test_a_missing_value_is_zero_and_a_missing_quantity_no_row():
    records = [
        {"step": 0, "probe": {"a/x": 1.0}},
        {"step": 5, "probe": {"a/x": 2.0, "b/y": 3.0}},
    ]
    run = Run(1e-3, {}, records)
    steps, values = run.series("b/", ["x", "y"])
    assert steps == [5] and values.tolist() == [[0.0, 3.0]]
    steps, values = run.series("a/", ["x"])
    assert steps == [0, 5] and values.tolist() == [[1.0], [2.0]]


def test_the_report_has_tables_and_plots(finished):
    page, printed = (finished / "report.md").read_text(), finished.parent / "out"
    last = measured(finished, "adamw")
    shares = [
        np.mean([v for k, v in r.items() if k.startswith("second_moment/top8/")])
        for r in last[1:]
    ]

    def cells(start):
        row = next(x for x in page.splitlines() if x.startswith(f"| {start} "))
        return row, row.replace(" ", "").split("|")[2:-1]

    row, found = cells("second moment")
    shown = (shares[0], np.mean(shares), shares[-1])
    assert found[:3] == [f"{share:.3f}" for share in shown]
    assert row in printed.read_text()
    _, found = cells("layers/1/up")
    ranks = [r[f"gradient/rank@0.48/{MATRIX}"] for r in last]
    shown = (f"{ranks[0]:.0f}", f"{ranks[-1]:.0f}", f"{np.mean(ranks):.1f}")
    assert found[0] == "32x64" and tuple(found[2:5]) == shown
    chosen = [r[f"rank/{MATRIX}"] for r in measured(finished, "adarankgrad_adamw")[1:]]
    saved = (2 - np.mean(chosen)) * (32 + 64)
    assert found[5:] == [f"{np.mean(chosen):.2f}of2", f"{saved:,.0f}"]
    for name in ("shares", "ranks", "thresholds", "chosen"):
        assert f"({name}.png)" in page
        assert (finished / f"{name}.png").stat().st_size > 5000
        assert str(finished / f"{name}.png") in printed.read_text()


@pytest.mark.long
def test_a_stopped_run_goes_on(finished, flags, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    at_call(monkeypatch, Encoded, "training_batch", 4, stop)
    assert main([*flags, "--out", str(out)]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert "adamw stopped after step 3" in last
    assert f"python -m examples.spectra --resume --out {out}" in last
    assert not (out / "spectra.json").exists()
    # The other method has nothing to do with it.
    shutil.copytree(finished / "adarankgrad_adamw", out / "adarankgrad_adamw")
    assert main(["--resume", "--out", str(out)]) == 0
    found, expected = (
        json.loads((folder / "spectra.json").read_text()) for folder in (out, finished)
    )
    assert found == expected
    assert not list(out.rglob("checkpoints"))
    assert len(read_metrics(out / "adamw" / "metrics.jsonl")) == STEPS + 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--measurements", "0"], "measurements must be at least 1"),
        (["--task", "wnli"], "'wnli': choose from stdlib, cola"),
        (["--data", "nowhere"], "'nowhere': no such file"),
        (["--rank", "0"], "rank"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_cannot_work_is_refused_in_one_line(
    change, said, flags, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert spectra.main([*flags, "--out", "run", *change]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1 and said in printed.err
    assert printed.out == "" and list(tmp_path.iterdir()) == []
