"""The benchmarks of the papers' own figures: variants, and bases of one head."""

import argparse
import dataclasses
import json

import jax
import numpy as np
import pytest

from benchmarks import ablations, cross_head
from benchmarks.subspaces import figures
from examples.common.methods import METHODS

SMALL = {"model": "smoke", "data": f"path:{argparse.__file__}", "seq_len": 32}


def test_every_variant_and_what_it_is_of_can_be_built():
    assert {*ablations.VARIANTS, *ablations.VARIANTS.values()} <= METHODS.keys()


def test_differences_are_paired_by_seed():
    settings = ablations.Settings(variants=("mlorc_m", "mlorc_v"), seeds=(0, 1, 2))
    losses = {
        settings.trial(name, seed): value + seed * step
        for name, value, step in (("mlorc_m", 4.1, 10.0), ("mlorc_adamw", 4.0, 10.0))
        for seed in (0, 1, 2)
    }
    found = ablations.figures(settings, losses)
    assert list(found) == ["mlorc_m"]  # of the other no trial is there
    assert ablations.differences(found["mlorc_m"]) == pytest.approx([0.1] * 3)
    del losses[settings.trial("mlorc_adamw", 1)]
    row = ablations.table(ablations.figures(settings, losses)).splitlines()[-1]
    assert row.split()[5] == "2" and row.endswith("+0.100 ± 0.000 |")


@pytest.mark.long
def test_a_run_takes_what_is_there_and_goes_on(tmp_path):
    settings = ablations.Settings(
        variants=("uniform_adamw",),
        **SMALL,
        steps=4,
        seeds=(0, 1),
        rank=4,
        update_every=2,
        batch_size=2,
        out=tmp_path,
    )
    ablations.main(dataclasses.replace(settings, minutes=0))
    page = (tmp_path / "ablations.md").read_text()
    assert "None is there yet." in page and "4 of 4 trials are missing" in page
    ablations.main(dataclasses.replace(settings, seeds=(0,)))
    files = sorted((tmp_path / "ablations").iterdir())
    assert [file.stem for file in files] == ["i3s_adamw", "uniform_adamw"]
    # As a trial of the comparison it counts too, and is not run again.
    (tmp_path / "comparison").mkdir()
    files[0].rename(tmp_path / "comparison" / files[0].name)
    ablations.main(settings)
    record = json.loads((tmp_path / "ablations.json").read_text())
    found = record["figures"]["uniform_adamw"]
    assert found["losses"].keys() == found["base"].keys() == {"0", "1"}
    lines = (tmp_path / "ablations" / "i3s_adamw.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [1]
    page = (tmp_path / "ablations.md").read_text()
    assert "| uniform_adamw | i3s_adamw |     2 |" in page and "Not compl" not in page


def test_a_basis_of_one_head_leaves_out_what_is_not_in_it():
    rng = np.random.default_rng(0)
    heads = rng.normal(size=(3, 12, 5)).astype(np.float32)
    grad = np.concatenate(heads, axis=1)
    whole, one = map(float, cross_head.errors(jax.random.key(0), grad, heads=3, rank=4))

    def error(basis):
        return np.linalg.norm(grad - basis @ (basis.T @ grad)) / np.linalg.norm(grad)

    def leading(x):
        return np.linalg.svd(x)[0][:, :4]

    assert whole == pytest.approx(error(leading(grad)), rel=1e-4)
    assert one in [pytest.approx(error(leading(x)), rel=1e-4) for x in heads]
    assert one > whole


def test_the_record_of_cross_heads_says_means_by_rank(tmp_path):
    settings = cross_head.Settings(
        **SMALL, steps=3, every=2, ranks=(2, 4), batch_size=2, out=tmp_path
    )
    cross_head.main(settings)
    record = json.loads((tmp_path / "cross_head.json").read_text())["figures"]
    for found in record.values():
        assert 0 < found["whole"] < found["one_head"] < 1
    assert record["4"]["whole"] < record["2"]["whole"]
    assert (tmp_path / "cross_head.png").stat().st_size > 10_000


def test_the_record_of_subspaces_has_means_of_the_second_half():
    rows = [
        {"method": m, "step": step, "layer": "x", "adjacent": a, "first": a / 2}
        for m, base in (("galore_adamw", 0.5), ("i3s_adamw", 0.1))
        for step, a in ((10, 0.9), (20, base), (30, base), (40, base + 0.2))
    ]
    values = [
        {"method": m, "layer": layer, "index": i, "value": value}
        for m, count in (("galore_adamw", 2), ("i3s_adamw", 4))
        for layer, more in (("x", 0), ("y", 1))
        for i, value in enumerate([1.0] * (count + more) + [0.05] * 3)
    ]
    found = figures(rows, values)
    means = {"adjacent": 0.6, "first": 0.3, "large": 2.5}
    assert found["galore_adamw"] == pytest.approx(means)
    assert found["i3s_adamw"]["large"] == 4.5
