"""Checkpoints under faults: the newest whole one is used, and said."""

import shutil
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from examples.common.checkpoints import save
from examples.common.errors import BadFile
from examples.common.interrupt import Interrupted, StopRequest
from examples.common.loop import Task, Timetable, train
from examples.common.metrics import read_metrics
from tests.faults import DAMAGES, contents, flip, full_disk, largest, truncate

RATE, STEPS, STOPPED = 0.25, 6, 5
# Large enough that what is flipped in the middle of the largest file is a number.
START = np.linspace(1.0, 2.0, 3000).astype(np.float32)


def target(step):
    """What the loss of a step draws the parameters to: no two steps are alike."""
    return np.float32(step % 3)


def after(steps):
    """The parameters after so many steps, in NumPy: each goes a quarter of the way."""
    x = START
    for step in range(steps):
        x = x - np.float32(RATE) * (x - target(step))
    return x


TASK = Task(
    init=lambda: {"x": jnp.asarray(START)},
    loss=lambda params, batch: jnp.sum((params["x"] - batch) ** 2) / 2,
    batch=target,
    validation=[np.float32(0)],
    tokens_per_step=1,
)


def run(directory, steps=STEPS, stop=None):
    """Trains with a checkpoint every other step; two are kept."""
    request = StopRequest()

    def batch(step):
        request.requested = step + 1 == stop
        return target(step)

    task = Task(**{**vars(TASK), "batch": batch})
    table = Timetable(steps, 1, 3, 2, steps)
    return train(task, optax.sgd(RATE), table, None, directory, "run", request)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run stopped after step 5: its checkpoints are those of steps 4 and 5."""
    directory = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Interrupted):
        run(directory, stop=STOPPED)
    names = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert names == ["4", "5"]
    return directory


@pytest.fixture
def copy(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


def assert_whole(directory, state):
    np.testing.assert_allclose(state.params["x"], after(STEPS), rtol=1e-6)
    records = read_metrics(directory / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    for record in records[1:]:
        x = after(record["step"] - 1).astype(np.float64)
        loss = np.sum((x - target(record["step"] - 1)) ** 2) / 2
        assert record["loss"] == pytest.approx(loss, rel=1e-5)


def remove_all(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def remove_manifest(folder):
    (folder / "checksums.json").unlink()


def edit_manifest(folder):
    path = folder / "checksums.json"
    path.write_text(path.read_text().replace('"bytes": 1', '"bytes": 2', 1))


def cut_manifest(folder):
    truncate(folder / "checksums.json")


def remove_orbax_manifest(folder):
    next(folder.rglob("manifest.ocdbt")).unlink()


def add_file(folder):
    (folder / "default" / "stray").write_text("x")


def rename(folder):
    folder.rename(folder.with_name("9"))


def swap(folder):
    """The directory of one step holds the files of another, manifest included."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("4"), folder)


def flip_every_file(folder):
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size:
            flip(path)


def of_the_largest(damage):
    def spoil(folder):
        damage(largest(folder))

    spoil.__name__ = f"{damage.__name__}_the_largest"
    return spoil


SPOILS = [
    *(of_the_largest(damage) for damage in DAMAGES),
    remove_all,
    remove_manifest,
    edit_manifest,
    cut_manifest,
    remove_orbax_manifest,
    add_file,
    rename,
    swap,
    flip_every_file,
]


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
def test_the_one_before_a_damaged_checkpoint_is_used(spoil, copy, capsys):
    spoil(copy / "checkpoints" / "5")
    assert_whole(copy, run(copy))
    said = capsys.readouterr().err.splitlines()[0]
    name = "9" if spoil is rename else "5"
    assert f"The checkpoint {copy / 'checkpoints' / name} is damaged" in said
    assert "Going on from that of step 4" in said
    # It is kept for whoever wants to look at it.
    assert (copy / "checkpoints" / f"{name}.damaged-0").is_dir()


@pytest.mark.parametrize("name", ["9", "12", "nine", "07", "5.tmp", "-1"])
def test_a_stray_directory_is_no_checkpoint(name, copy, capsys):
    stray = copy / "checkpoints" / name
    (stray / "default").mkdir(parents=True)
    (stray / "default" / "file").write_text("mine")
    assert_whole(copy, run(copy))
    said = capsys.readouterr().err
    assert ("is damaged: it has no checksums.json" in said) == (name in ("9", "12"))
    kept = next(copy.rglob("file"))
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("name", ["5.bak", "step_5", "05"])
def test_a_checkpoint_under_another_name_is_told(name, copy, capsys):
    checkpoints = copy / "checkpoints"
    (checkpoints / "5").rename(checkpoints / name)
    kept = contents(checkpoints / name)
    assert_whole(copy, run(copy))
    said = capsys.readouterr().err
    assert (
        f"{checkpoints / name} is not used: a checkpoint is named by its step" in said
    )
    assert contents(checkpoints / name) == kept


def test_a_run_whose_checkpoints_have_other_names_does_not_start_over(copy):
    for name in ("4", "5"):
        path = copy / "checkpoints" / name
        path.rename(path.with_name(f"{name}.bak"))
    before = contents(copy)
    with pytest.raises(BadFile, match=r"Cannot go on from .*/4\.bak: .* Rename it"):
        run(copy)
    assert contents(copy) == before


def test_a_damaged_older_checkpoint_does_not_matter(copy, capsys):
    flip(largest(copy / "checkpoints" / "4"))
    assert_whole(copy, run(copy))
    assert "damaged" not in capsys.readouterr().err


def test_where_all_are_damaged_nothing_is_changed(copy):
    for name in ("4", "5"):
        flip(largest(copy / "checkpoints" / name))
    before = contents(copy)
    with pytest.raises(BadFile) as caught:
        run(copy)
    assert f"Cannot go on from {copy / 'checkpoints' / '5'}: its file" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    assert contents(copy) == before


def test_a_finished_run_is_checked_too(copy, capsys):
    run(copy)
    capsys.readouterr()
    flip(largest(copy / "checkpoints" / str(STEPS)))
    assert_whole(copy, run(copy))
    assert "Going on from that of step 5" in capsys.readouterr().err


def drop_line(lines):
    del lines[2]


def drop_last(lines):
    del lines[STOPPED:]


def edit_number(lines):
    lines[3] = lines[3].replace(b'"loss": ', b'"loss": 1')


def drop_all(lines):
    lines.clear()


@pytest.mark.parametrize("edit", [drop_line, drop_last, edit_number, drop_all])
def test_metrics_that_were_changed_are_refused(edit, copy):
    path = copy / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    edit(lines)
    path.write_bytes(b"".join(lines))
    before = contents(copy)
    with pytest.raises(BadFile) as caught:
        run(copy)
    assert f"{path} is not as it was written up to step 5" in str(caught.value)
    assert contents(copy) == before


def test_writes_that_outlast_a_failed_one_say_nothing(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    at_once = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(tmp_path / "run", options=at_once) as manager:
        for step in (1, 2):
            with full_disk(1000), pytest.raises(OSError, match="Cannot write"):
                save(manager, step, {"x": START})
    late = SimpleNamespace(exc_value=RuntimeError("Event loop is closed"))
    other = SimpleNamespace(exc_value=RuntimeError("another"))
    for error in (late, other):
        sys.unraisablehook(error)
    assert told == [other]


def test_a_checkpoint_that_does_not_fit_on_the_disk_loses_nothing(copy, capsys):
    with full_disk(4096), pytest.raises(OSError) as caught:
        run(copy)
    path = copy / "checkpoints" / str(STEPS)
    assert f"Cannot write the checkpoint {path}" in str(caught.value)
    assert sorted(p.name for p in path.parent.iterdir()) == ["4", "5"]
    assert "Traceback" not in capsys.readouterr().err
    assert_whole(copy, run(copy))
