"""The training loop: steps, validation, metrics, checkpoints, stop and resume."""

import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from tqdm import tqdm

import lowrank_optax as lro
from examples.common import checkpoints
from examples.common.errors import BadFile
from examples.common.interrupt import Interrupted, StopRequest
from examples.common.mesh import Placement, laid
from examples.common.metrics import MetricsLog, NoLog, Record
from examples.common.processes import any_of, by_first, is_first, of_first, whole

METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"


class ForeignCheckpoint(BadFile):
    """What a run would go on from is of another model, or of another method."""


@dataclass(frozen=True)
class Task:
    """What is trained, and on what.

    Attributes:
      init: makes the parameters, equal at every call.
      loss: of parameters and a batch, a scalar: the mean over the batch.
      batch: the batch of a step, counted from 0; a pure function, so that every
        optimizer sees the same batches and a resumed run needs only the step.
      validation: the batches of the fixed validation set.
      tokens_per_step: how many tokens, or of another unit, a batch predicts.
      probed: of parameters and a batch, the gradient that the probe measures; None for
        that of the loss.
      evaluate: of parameters, what a validation puts on record; None for the mean of
        the loss over `validation`, as `validation_loss`.
      shapes: a batch of each shape that `batch` may give, the values being of no
        matter; empty where it gives only one.
      unit: what `tokens_per_step` counts.
      step_of: of an optimizer, its training step, parameters, state and a batch to the
        new ones and a record; None for the ordinary one, by the gradient of the loss.
    """

    init: Callable[[], Any]
    loss: Callable[[Any, Any], jax.Array]
    batch: Callable[[int], Any]
    validation: Sequence[Any]
    tokens_per_step: int
    probed: Callable[[Any, Any], Any] | None = None
    evaluate: Callable[[Any], Record] | None = None
    shapes: Sequence[Any] = ()
    unit: str = "tokens"
    step_of: Callable[[optax.GradientTransformation], Callable[..., Any]] | None = None


@dataclass(frozen=True)
class Best:
    """What is done with the parameters of the best validation after the start.

    Attributes:
      metric: the key of the record that is to be as large as possible; of equal ones
        the first counts.
      save: called with the parameters whenever they are better than all before. It
        may be called again with the same ones, by a run that resumes.
    """

    metric: str
    save: Callable[[Any], None]


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


class Probe(Protocol):
    """What is measured at each validation."""

    def start(self, params: Any) -> list[jax.Array]:
        """The arrays that the first measurement is given."""

    @property
    def measure(self) -> Callable[..., tuple[Record, list[jax.Array]]]:
        """Called with the gradient, the optimizer's state and the arrays of before.

        Returns what is put on record, zeros apart, and the arrays for the next time.
        """


class TrainState(NamedTuple):
    """Everything that a checkpoint holds.

    Attributes:
      params: the parameters.
      opt_state: the optimizer's state.
      bases: the arrays that the probe keeps from one measurement to the next.
    """

    params: Any
    opt_state: Any
    bases: list[jax.Array]


def train(
    task: Task,
    tx: optax.GradientTransformation,
    timetable: Timetable,
    probe: Probe | None,
    directory: Path,
    label: str,
    stop: StopRequest,
    best: Best | None = None,
    placement: Placement | None = None,
) -> TrainState:
    """Trains to the end, from the directory's latest whole checkpoint if it has one.

    A run that was stopped, or killed, and is called again takes the same steps as one
    that was not: parameters, state and metrics agree bit for bit on one machine, but
    for the measured seconds.

    Args:
      task: what is trained.
      tx: the optimizer, learning rate included.
      timetable: how many steps, and when to log, validate and save.
      probe: what is measured of the gradient at each validation, if anything.
      directory: where metrics.jsonl and checkpoints/ are kept; made if missing.
      label: what the progress bar calls the run.
      stop: asked after every step.
      best: what becomes of the best parameters.
      placement: where all of it lies; None for a single device. A checkpoint may be
        of another mesh.

    Returns:
      The state after the last step; its parameters on the host, where there is a
      placement.

    Raises:
      Interrupted: `stop` was requested; a checkpoint of the step then under way is
        saved.
      ForeignCheckpoint: the directory's checkpoint is of something else.
      BadFile: its checkpoints or metrics are damaged, none of them being whole.
      OSError: something cannot be written, such as on a full disk.
    """
    directory.mkdir(parents=True, exist_ok=True)
    loop = _Loop(task, tx, timetable, probe, directory, label, stop, best, placement)
    state = loop.run()
    return state if placement is None else state._replace(params=whole(state.params))


class _Loop:
    """A run under way; the arguments are those of `train`."""

    def __init__(
        self,
        task: Task,
        tx: optax.GradientTransformation,
        timetable: Timetable,
        probe: Probe | None,
        directory: Path,
        label: str,
        stop: StopRequest,
        best: Best | None,
        placement: Placement | None,
    ):
        self.task, self.tx, self.timetable, self.probe = task, tx, timetable, probe
        self.directory, self.label, self.stop, self.best = directory, label, stop, best
        self.placement = placement
        self.metrics = directory / METRICS_FILE
        self.gradient = jax.jit(task.probed or jax.grad(task.loss))
        self.loss = jax.jit(task.loss)

    def run(self) -> TrainState:
        """The state after the last step."""
        folder = self.directory / CHECKPOINTS
        start = of_first(partial(self._newest, folder))
        state = self._initial()
        with _manager(folder) as manager:
            if start is not None:
                state = self._restored(manager, start, state)
                # Its ranks may have shrunk since the start.
                self.tx = lro.rank.fit(self.tx, state.opt_state)
            if start == self.timetable.steps:
                return state
            with MetricsLog(self.metrics, keep=start) if is_first() else NoLog() as log:
                return self._take_steps(manager, log, state, start)

    def _newest(self, folder: Path) -> int | None:
        """The step to go on from."""
        start = checkpoints.newest(folder, checkpoints.warn)
        if start is not None:
            checkpoints.check_metrics(folder / str(start), self.metrics)
        return start

    def _initial(self) -> TrainState:
        init, tx_init, where = self.task.init, self.tx.init, self.placement
        params = init() if where is None else where.made(init)
        bases = []
        if self.probe is not None:
            batch = self.task.validation[0]
            bases = self.probe.start(jax.eval_shape(self.gradient, params, batch))
        if where is not None:
            bases = where.copies(bases)
            tx_init = jax.jit(tx_init, out_shardings=where.state(self.tx, params))
        return TrainState(params, tx_init(params), bases)

    def _batch(self, batch: Any) -> Any:
        return batch if self.placement is None else self.placement.batch(batch)

    def _restored(
        self, manager: ocp.CheckpointManager, start: int, state: TrainState
    ) -> TrainState:
        path = self.directory / CHECKPOINTS / str(start)
        try:
            saved = _shapes_of(manager.item_metadata(start), state)
        except ForeignCheckpoint as error:
            raise ForeignCheckpoint(
                f"The checkpoint {path} is of another model or method: {error}"
            ) from error
        if self.placement is not None:
            # What has shrunk may be split otherwise.
            fitted = lro.rank.fit(self.tx, saved.opt_state)
            where = self.placement.state(fitted, saved.params)
            saved = saved._replace(opt_state=laid(saved.opt_state, where))
        restored: Any = manager.restore(start, args=ocp.args.StandardRestore(saved))
        return restored

    def _take_steps(
        self,
        manager: ocp.CheckpointManager,
        log: MetricsLog | NoLog,
        state: TrainState,
        start: int | None,
    ) -> TrainState:
        at, task = self.timetable, self.task
        # Compiled ahead, so that no measured step holds the compilation.
        shapes = [self._batch(x) for x in task.shapes or [task.batch(0)]]
        steps = _compiled(task, self.tx, state, shapes, self.placement)
        if start is None:
            record, state = self._validate(state)
            peak = max(map(_peak_bytes, steps.values()))
            log.write({"step": 0, "peak_bytes": peak, **record})
        top = of_first(partial(self._top, log.kept))
        first = (start or 0) + 1
        with _progress_bar(self.label, first - 1, at.steps) as bar:
            for done in range(first, at.steps + 1):
                state, record = self._step(steps, state, done, bar)
                last = done == at.steps
                validated = last or done % at.eval_every == 0
                if validated:
                    extra, state = self._validate(state)
                    record |= extra
                    top = self._keep_best(record, top, state)
                freed = 0
                if not last and done % at.shrink_every == 0:
                    self.tx, state, freed = _shrink(self.tx, state)
                if freed:
                    record["freed_bytes"] = freed
                    bar.write(f"{self.label}: step {done} freed {freed:,} bytes")
                    state = self._again_placed(state)
                    steps = _compiled(task, self.tx, state, shapes, self.placement)
                if validated or freed or done % at.log_every == 0:
                    log.write({"step": done, **record})
                stopped = any_of(self.stop.requested)
                if last or stopped or done % at.checkpoint_every == 0:
                    log.sync()
                    checkpoints.save(manager, done, state, self.metrics)
                if stopped:
                    raise Interrupted(f"{self.label} stopped after step {done}")
        return state

    def _again_placed(self, state: TrainState) -> TrainState:
        """The state after it has shrunk: it may be split otherwise."""
        if self.placement is None:
            return state
        where = self.placement.state(self.tx, state.params)
        return state._replace(opt_state=jax.device_put(state.opt_state, where))

    def _step(
        self, steps: dict[Hashable, Any], state: TrainState, done: int, bar: tqdm
    ) -> tuple[TrainState, Record]:
        batch = self._batch(self.task.batch(done - 1))
        began = time.perf_counter()
        params, opt_state, measured = steps[_shape_of(batch)](*state[:2], batch)
        record: Record = {name: float(value) for name, value in measured.items()}
        record["seconds"] = time.perf_counter() - began
        rate = self.task.tokens_per_step / record["seconds"]
        bar.set_postfix_str(
            f"loss {record['loss']:.3f}, {rate:,.0f} {self.task.unit}/s", refresh=False
        )
        bar.update()
        return state._replace(params=params, opt_state=opt_state), record

    def _validate(self, state: TrainState) -> tuple[Record, TrainState]:
        task, probe = self.task, self.probe
        record: Record = {}
        if task.evaluate is not None:
            record |= task.evaluate(state.params)
        else:
            batches = map(self._batch, task.validation)
            losses = [float(self.loss(state.params, x)) for x in batches]
            record["validation_loss"] = float(np.mean(losses))
        if probe is None:
            return record, state
        grads = self.gradient(state.params, self._batch(task.validation[0]))
        measured, bases = probe.measure(grads, state.opt_state, state.bases)
        record["probe"] = {name: float(x) for name, x in measured.items() if x}
        return record, state._replace(bases=bases)

    def _top(self, kept: Sequence[Record]) -> float:
        """The best of the validations after the start."""
        if self.best is None:
            return -math.inf
        found = [r.get(self.best.metric, -math.inf) for r in kept if r["step"] > 0]
        return max(found, default=-math.inf)

    def _keep_best(self, record: Record, top: float, state: TrainState) -> float:
        if self.best is None or not record[self.best.metric] > top:
            return top
        params = state.params if self.placement is None else whole(state.params)
        by_first(partial(self.best.save, params))
        return record[self.best.metric]


def _compiled(
    task: Task,
    tx: optax.GradientTransformation,
    state: TrainState,
    batches: Sequence[Any],
    placement: Placement | None,
) -> dict[Hashable, Any]:
    """The step for each shape of a batch."""
    out = None
    if placement is not None:
        # What goes into the next step lies as what came into this one.
        leaves, treedef = jax.tree.flatten(state[:2])
        out = tuple(x.sharding for x in leaves), treedef, placement.replicated
    step = _step(task.loss, task.step_of, tx, out)
    return {
        _shape_of(batch): step.lower(*state[:2], batch).compile() for batch in batches
    }


def _shape_of(batch: Any) -> Hashable:
    return tuple(np.shape(x) for x in jax.tree.leaves(batch))


def _peak_bytes(compiled: Any) -> int:
    """What a step holds at most: its arguments, results of their own, and scratch."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


# Kept, so that the runs of several seeds, which share loss and optimizer, compile once.
@lru_cache(maxsize=8)
def _step(
    loss_of: Callable[[Any, Any], jax.Array],
    step_of: Callable[[optax.GradientTransformation], Callable[..., Any]] | None,
    tx: optax.GradientTransformation,
    out: tuple[tuple[Any, ...], Any, Any] | None,
) -> Any:
    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Record]:
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        measured = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return optax.apply_updates(params, updates), opt_state, measured

    where = None
    if out is not None:
        leaves, treedef, measured = out
        where = (*treedef.unflatten(leaves), measured)
    return jax.jit(
        step_of(tx) if step_of else step, donate_argnums=(0, 1), out_shardings=where
    )


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
    for name, x in named(state):
        if name not in shapes or (
            # Ranks, of the optimizer's state, may have shrunk since the start.
            name.startswith("params/") and shapes[name] != x.shape
        ):
            raise ForeignCheckpoint(
                f"it has {shapes.get(name, 'nothing')} for {name}, expected {x.shape}."
            )
    leaves = [
        jax.ShapeDtypeStruct(shapes[name], x.dtype, sharding=x.sharding)
        for name, x in named(state)
    ]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def _manager(folder: Path) -> ocp.CheckpointManager:
    # Saved before the next step begins: that step is given the arrays' memory
    # (donation), which a save in the background might still be reading.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2,
        enable_async_checkpointing=False,
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(
        folder.resolve(),
        options=options,
        item_handlers=ocp.StandardCheckpointHandler(),
    )


def _progress_bar(label: str, start: int, steps: int) -> tqdm:
    return tqdm(
        desc=label,
        initial=start,
        total=steps,
        dynamic_ncols=True,
        disable=not is_first(),
        bar_format="{desc}: {n_fmt}/{total_fmt} |{bar}| ETA {remaining}{postfix}",
    )
