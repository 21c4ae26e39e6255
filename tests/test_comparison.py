"""The comparison of methods: its protocol over made-up losses, and all of it, small."""

import argparse
import dataclasses
import json
import math
from pathlib import Path

import pytest

from benchmarks.comparison import record
from benchmarks.comparison.__main__ import QUICK, main
from benchmarks.comparison.protocol import METHODS, Protocol, Study, Trial
from benchmarks.record import write_record
from examples.common import methods


def loss(trial):
    """Lowest where the dense rate is 0.06 and the matrices' 16 times the start."""
    d, m = (
        math.log2(x / y)
        for x, y in (
            (trial.dense_rate, 0.06),
            (trial.rate, 16 * METHODS[trial.method]),
        )
    )
    return 4 + 0.1 * d**2 + 0.01 * m**2 + 0.001 * trial.seed


def protocol(**changes):
    equal = {"galore_adamw": 32, "mlorc_adamw": 26}
    return Protocol(rank=32, equal_bytes=equal.get, **changes)


def carried_out(chosen, methods, loss=loss):
    """All trials, one after the other, as a run makes them."""
    losses: dict[Trial, float] = {}
    while (wanted := next(Study(chosen, losses).missing(methods), None)) is not None:
        assert wanted not in losses
        losses[wanted] = loss(wanted)
    return losses


def test_rates_are_tuned_on_a_seed_of_their_own_until_the_best_is_within():
    chosen, names = protocol(), ("adamw", "galore_adamw")
    losses = carried_out(chosen, names)
    study = Study(chosen, losses)
    for name in names:
        rates = study.rate_ladder(name)
        best = min(rates, key=rates.get)
        assert len(rates) >= 4 and best == pytest.approx(16 * METHODS[name])
        assert min(rates) < best < max(rates)
    assert min(study.dense_ladder("adamw").items(), key=lambda x: x[1])[0] == 0.06
    tuning = [trial for trial in losses if trial.seed == 1000]
    assert {trial.dense_rate for trial in tuning if trial.rank} == {0.06}
    counted = study.counted("galore_adamw")
    assert [trial.seed for trial in counted] == [0, 1, 2, 3, 4]
    assert set(losses) - set(tuning) == {*counted, *study.counted("adamw")}


def test_equal_bytes_has_another_rank_and_the_same_rates():
    chosen = protocol(seeds=(0, 1))
    losses = carried_out(chosen, ("mlorc_adamw", "adamw"))
    study = Study(chosen, losses)
    alike = study.counted("mlorc_adamw"), study.counted("mlorc_adamw", True)
    assert [t.rank for trials in alike for t in trials] == [32, 32, 26, 26]
    assert len({t.rate for trials in alike for t in trials}) == 1
    assert study.counted("adamw", same_bytes=True) == []
    assert study.expected(("mlorc_adamw", "adamw")) == 4 + 2 * (4 + 2) + 2


def test_a_ladder_whose_best_is_at_its_end_is_named():
    chosen, names = protocol(most=4), ("adamw", "galore_adamw", "lion")

    def falling(trial):  # the lower the rate, the better, but for GaLore
        return loss(trial) if trial.method == "galore_adamw" else trial.rate

    losses = carried_out(protocol(most=4), names[:2], falling)
    assert Study(chosen, losses).at_an_edge(names) == ["adamw", "galore_adamw"]
    losses = carried_out(protocol(), names[:2], falling)
    study = Study(protocol(), losses)
    assert study.at_an_edge(names) == ["adamw"]
    results = {trial: {"validation_loss": x} for trial, x in losses.items()}
    *_, last = record.ladders(study, results, names).splitlines()
    assert last == "Best at an end of 9 rates: adamw."


def test_a_record_has_no_path_of_a_machine(tmp_path):
    @dataclasses.dataclass
    class Settings:
        model: str = str(tmp_path / "MiniLM")
        task: str = "small/task"
        out: Path | None = None
        runs: Path = tmp_path / "runs"

    write_record("x", Settings(), {}, "", tmp_path)
    kept = json.loads((tmp_path / "x.json").read_text())["settings"]
    assert kept == {"model": "MiniLM", "task": "small/task"}


def test_a_ladder_on_which_everything_diverges_ends():
    losses = carried_out(protocol(most=5), ("adamw",), lambda trial: math.nan)
    assert 5 < len(losses) < 20


def test_the_interval_is_that_of_students_t():
    # 2.776 is the two-sided 5% quantile of 4 degrees of freedom.
    middle, half = record.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (middle, half) == (3.0, pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=1e-3))
    assert record.interval([1.0])[1] == math.inf


def test_every_method_has_a_way_to_be_built():
    assert METHODS.keys() <= methods.METHODS.keys()


def test_a_quick_run_writes_its_record_and_goes_on_from_what_is_there(tmp_path):
    few = dataclasses.replace(
        QUICK,
        methods=("adamw", "galore_adamw"),
        data=f"path:{argparse.__file__}",  # any text will do
        out=tmp_path,
    )
    main(dataclasses.replace(few, minutes=0.0))  # as if the time were up
    page = (tmp_path / "comparison.md").read_text()
    assert "**Not complete**: at least 1 trials are missing, of adamw first." in page
    main(few)
    files = sorted((tmp_path / "comparison").iterdir())
    assert [file.stem for file in files] == ["adamw", "galore_adamw"]
    kept = [file.read_text() for file in files]
    assert "All trials of the protocol are there." in (
        page := (tmp_path / "comparison.md").read_text()
    )
    assert (tmp_path / "comparison.png").stat().st_size > 0
    lines = [json.loads(line) for text in kept for line in text.splitlines()]
    assert len(lines) == len({tuple(line.values()) for line in map(hashable, lines)})
    rows = [line for line in page.splitlines() if line.startswith("| galore_adamw")]
    assert len(rows) == 2  # of equal rank and of equal bytes
    counted = [
        line["validation_loss"]
        for line in lines
        if line["method"] == "galore_adamw" and line["seed"] < 1000
    ]
    assert f" {sum(counted) / 2:.3f} ± " in rows[0] and " 2 of 2 " in rows[0]
    main(few)
    assert [file.read_text() for file in files] == kept


def hashable(line):
    return {name: str(value) for name, value in line.items()}
