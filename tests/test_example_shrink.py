"""The training loop frees the memory of unused ranks, and resumes what is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_optax as lro
from examples.common.interrupt import Interrupted, StopRequest
from examples.common.loop import METRICS_FILE, Task, Timetable, train
from examples.common.metrics import read_metrics
from examples.common.probe import Probe

STEPS, SHRINK = 9, 4
SHAPES = {"up": (20, 24), "down": (24, 20)}


def start():
    return {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


def batch(step):
    """Targets of rank 2, so that no gradient is of a higher one than 4."""
    rng = np.random.default_rng(step % 2)
    return {
        name: jnp.asarray(rng.standard_normal((m, 2)) @ rng.standard_normal((2, n)))
        for name, (m, n) in SHAPES.items()
    }


def loss(params, target):
    return sum(jnp.mean((params[k] - target[k]) ** 2) for k in SHAPES)


TASK = Task(start, loss, batch, [batch(0)], tokens_per_step=1)
# An epsilon that hides what float32 leaves of moments that should be zero.
TX = lro.adarankgrad_adamw(
    0.1,
    16,
    eps=1e-4,
    max_residual_energy=1e-3,
    max_interval=3,
    matrices=lro.MatrixAxes(),
)


def run(directory, shrink_every=SHRINK, stop_at=None):
    """The state, and the metrics but for the measured times."""
    stop = StopRequest()

    def stopping(step):
        stop.requested = step + 1 == stop_at
        return batch(step)

    task = (
        TASK
        if stop_at is None
        else TASK.__class__(
            start, loss, stopping, TASK.validation, TASK.tokens_per_step
        )
    )
    timetable = Timetable(STEPS, 1, STEPS, STEPS, shrink_every)
    state = train(task, TX, timetable, Probe.of(start(), 2), directory, "run", stop)
    records = read_metrics(directory / METRICS_FILE)
    return state, [{k: r[k] for k in r.keys() - {"seconds"}} for r in records]


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory):
    return run(tmp_path_factory.mktemp("shrunk") / "run")


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_bytes_are_freed_and_logged(tmp_path, shrunk, capsys):
    state, records = shrunk
    freed = {r["step"]: r["freed_bytes"] for r in records if "freed_bytes" in r}
    assert set(freed) == {SHRINK}  # afterwards there is nothing to free
    before = lro.state_bytes(TX, start())
    assert nbytes(state.opt_state) == before - sum(freed.values())
    # Of 16 columns, 8 stay, of a basis and of two moments.
    assert sum(freed.values()) == 4 * 8 * 2 * (24 + 2 * 20)

    masked, unshrunk = run(tmp_path / "run", shrink_every=STEPS)
    assert nbytes(masked.opt_state) == before
    for record, want in zip(records, unshrunk, strict=True):
        if "loss" in record:
            np.testing.assert_allclose(record["loss"], want["loss"], rtol=1e-5)
    for name in SHAPES:
        np.testing.assert_allclose(
            state.params[name], masked.params[name], rtol=1e-4, atol=1e-5
        )
    assert "freed" not in capsys.readouterr().err


@pytest.mark.parametrize("stop_at", [SHRINK - 1, SHRINK, SHRINK + 2])
def test_a_run_resumes_with_what_was_left(tmp_path, shrunk, stop_at, capsys):
    with pytest.raises(Interrupted):
        run(tmp_path / "run", stop_at=stop_at)
    said = f"step {SHRINK} freed" in "".join(capsys.readouterr())
    assert said == (stop_at >= SHRINK)
    state, records = run(tmp_path / "run")
    assert records == shrunk[1]
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(shrunk[0]), strict=True):
        np.testing.assert_array_equal(x, y)
