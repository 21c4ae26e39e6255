"""The training loop: steps, validation, metrics, checkpoints, stop and resume."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from tqdm import tqdm

import lowrank_optax as lro
from examples.common.interrupt import Interrupted, StopRequest
from examples.common.metrics import MetricsLog, Record
from examples.common.probe import Probe

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Task:
    """What is trained, and on what.

    Attributes:
      init: makes the parameters, equal at every call.
      loss: of parameters and a batch, a scalar: the mean over the batch.
      batch: the batch of a step, counted from 0; a pure function, so that every
        optimizer sees the same batches and a resumed run needs only the step.
      validation: the batches of the fixed validation set.
      tokens_per_step: how many tokens a batch predicts.
      probed: of parameters and a batch, the gradient that the probe measures; None for
        that of the loss.
    """

    init: Callable[[], Any]
    loss: Callable[[Any, Any], jax.Array]
    batch: Callable[[int], Any]
    validation: Sequence[Any]
    tokens_per_step: int
    probed: Callable[[Any, Any], Any] | None = None


@dataclass(frozen=True)
class Timetable:
    """How many steps there are, and after how many of them what is done.

    The start and the end of a run are always validated, its end always saved. At
    `shrink_every` the memory of ranks that are no longer used is freed.
    """

    steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    shrink_every: int


class TrainState(NamedTuple):
    """Everything that a checkpoint holds.

    Attributes:
      params: the parameters.
      opt_state: the optimizer's state.
      bases: the probe's last subspaces.
    """

    params: Any
    opt_state: Any
    bases: list[jax.Array]


def train(
    task: Task,
    tx: optax.GradientTransformation,
    timetable: Timetable,
    probe: Probe,
    directory: Path,
    label: str,
    stop: StopRequest,
) -> TrainState:
    """Trains to the end, from the directory's latest checkpoint if it has one.

    A run that was stopped, or killed, and is called again takes the same steps as one
    that was not: parameters, state and metrics agree bit for bit on one machine, but
    for the measured seconds.

    Args:
      task: what is trained.
      tx: the optimizer, learning rate included.
      timetable: how many steps, and when to log, validate and save.
      probe: what is measured of the gradient at each validation.
      directory: where metrics.jsonl and checkpoints/ are kept; made if missing.
      label: what the progress bar calls the run.
      stop: asked after every step.

    Returns:
      The state after the last step.

    Raises:
      Interrupted: `stop` was requested; a checkpoint of the step then under way is
        saved.
    """
    directory.mkdir(parents=True, exist_ok=True)
    params = task.init()
    gradient = jax.jit(task.probed or jax.grad(task.loss))
    measured = jax.eval_shape(gradient, params, task.validation[0])
    state = TrainState(params, tx.init(params), probe.start(measured))
    loss = jax.jit(task.loss)

    def validate(state: TrainState) -> tuple[Record, TrainState]:
        losses = [float(loss(state.params, batch)) for batch in task.validation]
        grads = gradient(state.params, task.validation[0])
        measured, bases = probe.measure(grads, state.opt_state, state.bases)
        record = {
            "validation_loss": float(np.mean(losses)),
            "probe": {name: float(x) for name, x in measured.items() if x},
        }
        return record, state._replace(bases=bases)

    with _checkpoints(directory) as checkpoints:
        start = checkpoints.latest_step()
        if start is not None:
            saved = _shapes_of(checkpoints.item_metadata(start), state)
            restore = ocp.args.StandardRestore(saved)
            state = checkpoints.restore(start, args=restore)
        if start == timetable.steps:
            return state
        with MetricsLog(directory / METRICS_FILE, keep=start) as log:
            if start is None:
                record, state = validate(state)
                log.write({"step": 0, **record})
            # Compiled ahead, so that no measured step holds the compilation.
            step = _step(task, tx).lower(*state[:2], task.batch(0)).compile()
            first = (start or 0) + 1
            with _progress_bar(label, first - 1, timetable.steps) as bar:
                for done in range(first, timetable.steps + 1):
                    batch = task.batch(done - 1)
                    began = time.perf_counter()
                    params, opt_state, measured = step(*state[:2], batch)
                    state = state._replace(params=params, opt_state=opt_state)
                    record = {name: float(value) for name, value in measured.items()}
                    record["seconds"] = time.perf_counter() - began
                    rate = task.tokens_per_step / record["seconds"]
                    bar.set_postfix_str(
                        f"loss {record['loss']:.3f}, {rate:,.0f} tokens/s",
                        refresh=False,
                    )
                    bar.update()

                    last = done == timetable.steps
                    validated = last or done % timetable.eval_every == 0
                    if validated:
                        extra, state = validate(state)
                        record |= extra
                    freed = 0
                    if not last and done % timetable.shrink_every == 0:
                        tx, state, freed = _shrink(tx, state)
                    if freed:
                        record["freed_bytes"] = freed
                        bar.write(f"{label}: step {done} freed {freed:,} bytes")
                        step = _step(task, tx).lower(*state[:2], batch).compile()
                    if validated or freed or done % timetable.log_every == 0:
                        log.write({"step": done, **record})
                    if last or stop.requested or done % timetable.checkpoint_every == 0:
                        checkpoints.save(done, args=ocp.args.StandardSave(state))
                    if stop.requested:
                        raise Interrupted(f"{label} stopped after step {done}")
    return state


def _step(task: Task, tx: optax.GradientTransformation) -> Any:
    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Record]:
        loss, grads = jax.value_and_grad(task.loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        measured = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return optax.apply_updates(params, updates), opt_state, measured

    return jax.jit(step, donate_argnums=(0, 1))


def _shrink(tx: Any, state: TrainState) -> tuple[Any, TrainState, int]:
    """The optimizer and its state without unused ranks, and how many bytes these had.

    An optimizer whose state stays as it is is the given one.
    """

    def size(tree: Any) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    smaller, opt_state = lro.rank.shrink(tx, state.opt_state, state.params)
    freed = size(state.opt_state) - size(opt_state)
    return (smaller if freed else tx), state._replace(opt_state=opt_state), freed


def _shapes_of(saved: Any, state: TrainState) -> Any:
    """The state as it was saved: its ranks may have shrunk since the start."""

    def named(tree: Any) -> list[tuple[str, Any]]:
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        return [
            (jax.tree_util.keystr(path, simple=True, separator="/"), x)
            for path, x in flat
        ]

    shapes = {name: x.shape for name, x in named(saved)}
    leaves = [
        jax.ShapeDtypeStruct(shapes[name], x.dtype, sharding=x.sharding)
        for name, x in named(state)
    ]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def _checkpoints(directory: Path) -> ocp.CheckpointManager:
    # Saved before the next step begins: that step is given the arrays' memory
    # (donation), which a save in the background might still be reading.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(
        (directory / "checkpoints").resolve(),
        options=options,
        item_handlers=ocp.StandardCheckpointHandler(),
    )


def _progress_bar(label: str, start: int, steps: int) -> tqdm:
    return tqdm(
        desc=label,
        initial=start,
        total=steps,
        dynamic_ncols=True,
        bar_format="{desc}: {n_fmt}/{total_fmt} |{bar}| ETA {remaining}{postfix}",
    )
