"""The benchmark of fine-tuning: what its rows say, and that it goes on."""

import dataclasses
import json

import pytest

from benchmarks import finetuning
from benchmarks.comparison.protocol import Protocol, Study, Trial

SMALL = {
    "model": "smoke",
    "epochs": 1,
    "batch_size": 16,
    "max_length": 48,
    "train_examples": 48,
    "validation_examples": 48,
    "pretrain_steps": 2,
    "rungs": (1, 1),
    "seeds": (0,),
    "rank": 4,
}


def result(accuracy, loss=1.0):
    return {
        "scores": {"accuracy": accuracy},
        "validation_loss": loss,
        "matrix_state_bytes": 2048,
    }


def test_scores_are_paired_with_those_of_full_finetuning():
    settings = finetuning.Settings(methods=("adamw", "lora"), seeds=(0, 1))
    rates = {"adamw": 1e-3, "lora": 5e-3}
    protocol = Protocol(
        8,
        {"adamw": None, "lora": 8}.get,
        seeds=(0, 1),
        least=1,
        most=1,
        rates=rates,
        dense_rates=rates,
    )
    tuning = [
        Trial("adamw", None, 1e-3, 1e-3, 1000),
        Trial("lora", 8, 1e-3, 5e-3, 1000),
    ]
    found = {trial: result(0.1) for trial in tuning}
    for seed in (0, 1):
        found[Trial("adamw", None, 1e-3, 1e-3, seed)] = result(0.7 + 0.1 * seed)
        found[Trial("lora", 8, 1e-3, 5e-3, seed)] = result(0.6 + 0.1 * seed)
    study = Study(protocol, {t: x["validation_loss"] for t, x in found.items()})
    rows = finetuning.rows(settings, study, found)
    assert rows["lora"]["rate"] == 5e-3 and rows["lora"]["dense_rate"] == 1e-3
    *_, last = finetuning.table(rows, ("accuracy",)).splitlines()
    cells = [cell.strip() for cell in last.split("|")[5:8]]
    assert cells == ["2", "65.00 ± 63.53", "-10.00 ± 0.00"]
    assert not list(study.missing(settings.methods))


@pytest.mark.long
def test_a_run_goes_on_from_what_is_there(tmp_path, capsys):
    settings = finetuning.Settings(
        methods=("adamw",),
        out=tmp_path / "records",
        runs=tmp_path,
        **SMALL,
        minutes=0,
    )
    finetuning.main(settings)
    assert "**Not complete**: at least 1" in capsys.readouterr().out
    finetuning.main(dataclasses.replace(settings, minutes=9))
    record = json.loads((tmp_path / "records" / "glue_stdlib.json").read_text())
    assert list(record["figures"]["methods"]["adamw"]["scores"]) == ["0"]
    (file,) = (tmp_path / "records" / "glue_stdlib").iterdir()
    before = file.read_text()
    assert (
        len(before.splitlines()) == 2
    )  # of the tuning seed, and of the one that counts
    finetuning.main(settings)
    assert file.read_text() == before
