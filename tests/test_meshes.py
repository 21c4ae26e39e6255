"""What an update moves on a mesh of eight devices: one process for all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.accelerators.meshes import A_GROUP, A_MODEL, ROOM
from benchmarks.accelerators.targets import environment

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found():
    """What `on_a_mesh.py` prints."""
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    done = subprocess.run(
        [sys.executable, str(HERE / "on_a_mesh.py")],
        env=os.environ | environment("cpu") | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


# Columns of a sketch, and of both moments' factors of rank 8, which move together.
COLUMNS = {"mlorc": 16}


def test_no_matrix_is_gathered(found):
    # A gradient has 24,576 numbers, and a Gram matrix of its short side 1,024.
    for name, (ordinary, refresh) in found["moved"].items():
        most = ROOM * COLUMNS.get(name, 12) * 768
        assert 0 < ordinary["largest"] <= refresh["largest"] <= most


def test_a_loop_over_rows_gathers_nothing(found):
    for moved in found["slabs"].values():
        assert moved["count"] == 0 < moved["loops"]


def test_leaves_share_their_collectives(found):
    for ordinary, _ in found["moved"].values():
        assert ordinary["count"] <= 4 * A_GROUP + A_MODEL


def test_a_refresh_is_one_chain_of_few_collectives(found):
    for name, (one, _) in found["refreshes"].items():
        for split, moved in one.items():
            assert moved["count"] <= A_GROUP + A_MODEL, (name, split)
    # Of four leaves together: two sketches and a projection each, and the update. (Not
    # joined here, as they are for an H100.) Of I3S each has a chain of its own.
    one, four = found["refreshes"]["galore"]
    for split, moved in four.items():
        assert moved["count"] - one[split]["count"] <= 3 * 4, split


def test_states_split_by_all_axes_are_gathered_as_thin_arrays(found):
    (ordinary, _), own = found["moved by all"]["mlorc"], found["moved"]["mlorc"][0]
    assert ordinary["largest"] <= ROOM * COLUMNS["mlorc"] * 768
    assert ordinary["bytes"] > own["bytes"]  # which is what is paid for the memory
    # 31 were counted; 37 where the gathers of both moments are not joined, which they
    # are not on a TPU either, and 59 where what is thin is split within a step.
    assert ordinary["count"] <= 34
    # Scales are no thin arrays: they lie as the leaf does.
    assert found["moved by all"]["bytes"] == found["moved"]["bytes"]


def test_no_gradient_is_moved_to_where_thin_arrays_are(found):
    for name, (ordinary, _) in found["wide by all"].items():
        most = ROOM * COLUMNS.get(name, 12) * 768
        assert 0 < ordinary["largest"] <= most < 256 * 768 // 8
    for moved in found["coded basis"]:
        assert 0 < moved["largest"] <= ROOM * 24 * 1376 < 512 * 1376 // 8


def test_entries_of_a_product_on_several_devices_are_found_on_each(found):
    # Which entries are kept is found once, of all.
    assert 0 < found["entries"]["largest"] <= ROOM * (8 + 8) * 768


def test_blocks_on_several_devices_have_the_codes_of_one(found):
    assert all(found["codes"].values())


def test_exact_subspaces_are_those_of_one_device(found):
    assert max(found["exact"].values()) < 1e-5


def test_kernels_on_a_mesh_are_refused(found):
    for said in found["kernels"].values():
        assert "jax.shard_map" in said and "a, b" in said
