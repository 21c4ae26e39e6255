"""The example that compares how the subspaces of GaLore and I3S move."""

import csv

import numpy as np
import pytest
from jax.tree_util import DictKey

from examples.llama import subspaces


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FLAGS = ["--model", "smoke", "--batch-size", "2", "--seq-len", "16", "--rank", "4"]


def test_a_run_writes_overlaps_and_spectra(tmp_path, capsys):
    out = tmp_path / "run"
    argv = [*FLAGS, "--steps", "7", "--update-every", "2", "--window", "2"]
    argv += ["--out", str(out)]
    assert subspaces.main(argv) == 0
    assert (out / "subspaces.png").stat().st_size > 10_000
    rows = read(out / "overlap.csv")
    seen = {(row["method"], row["step"], row["layer"]) for row in rows}
    expected = {
        (method, step, layer)
        for method in subspaces.METHODS
        for step in ("2", "4", "6")
        for layer in LAYERS
    }
    assert seen == expected and len(rows) == len(expected)
    assert all(0 < float(row[k]) < 1 for row in rows for k in ("adjacent", "first"))
    # At the second choice the first subspace is the one before; afterwards not.
    assert all(
        (row["adjacent"] == row["first"]) == (row["step"] == "2") for row in rows
    )

    values = read(out / "singular_values.csv")
    for method in subspaces.METHODS:
        for layer in LAYERS:
            mine = [r for r in values if (r["method"], r["layer"]) == (method, layer)]
            spectrum = np.array([float(row["value"]) for row in mine])
            assert spectrum.shape == (32,) and spectrum[0] == pytest.approx(1)
            assert np.all(np.diff(spectrum) <= 0)
            # The last two steps are in two subspaces of rank 4, the others left out.
            assert spectrum[4] > 1e-3 and spectrum[8] < 1e-3
    printed = capsys.readouterr().out
    assert str(out / "overlap.csv") in printed

    assert subspaces.main(argv) == 2
    assert "not empty" in capsys.readouterr().err


def test_layers_of_a_type_are_averaged_and_spectra_are_numpys():
    rng = np.random.default_rng(0)
    a, b, norm = rng.normal(size=(5, 6)), rng.normal(size=(5, 6)), rng.normal(size=5)
    tree = {
        "layers": {
            0: {"up_proj": {"kernel": a}, "norm": {"scale": norm}},
            1: {"up_proj": {"kernel": b}, "norm": {"scale": norm}},
        }
    }
    bases = {"layers": {i: {"up_proj": {"kernel": np.eye(5)}} for i in (0, 1)}}
    found = subspaces.mean_by_type(subspaces.spectra(tree, bases))
    s = [np.linalg.svd(x, compute_uv=False) for x in (a, b)]
    expected = (s[0] / s[0][0] + s[1] / s[1][0]) / 2
    assert list(found) == ["up_proj"]
    np.testing.assert_allclose(found["up_proj"], expected, rtol=1e-5)
    path = (DictKey("mlp"), DictKey("gate_proj"), DictKey("kernel"))
    assert subspaces.layer_type(path) == "gate_proj"


@pytest.mark.parametrize("window", ["0", "5"])
def test_a_window_is_part_of_the_run(window, tmp_path, capsys):
    flags = ["--steps", "4", "--update-every", "2", "--out", str(tmp_path / "run")]
    assert subspaces.main([*FLAGS, *flags, "--window", window]) == 2
    assert f"window of {window} steps out of 4" in capsys.readouterr().err


def test_too_few_steps_are_refused(tmp_path, capsys):
    flags = ["--steps", "3", "--update-every", "3", "--out", str(tmp_path / "run")]
    assert subspaces.main([*FLAGS, *flags]) == 2
    assert "Raise --steps" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
