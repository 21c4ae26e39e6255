"""The papers' methods beside each other on real text: equal rank, tuned, three seeds.

    python -m benchmarks.comparison

Trains the example's model with each method. The learning rate is tuned on a seed of its
own: from the method's default up and down a ladder of factors of three, until the best
rate stands between two worse ones. Then every seed is trained, and which of the papers'
orderings reproduce is read off the differences seed by seed. Each finished trial is
kept in a file at once, so a run that is called again goes on where it was; times are
measured last, one step of each method in turn.
"""

import dataclasses
import json
import math
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from threading import Lock
from typing import Any

import jax
import numpy as np
import optax
import tyro
from tqdm import tqdm

import lowrank_optax as lro
from benchmarks.record import write_record
from benchmarks.steps import matrices
from examples.common.tokens import Packed
from examples.llama.pretrain import Job, Pretrain, prepare

METHODS = (
    "adamw galore_adamw i3s_adamw fira_adamw fira_i3s_adamw adarankgrad_adamw"
    " galore_plus_adamw mlorc_adamw mlorc_lion golore_adamw ldadamw"
).split()
_LADDER = 3.0
_TUNING_SEED = 1000  # none of the seeds that count
_VALIDATION_BATCHES = 64
_SHRINK_EVERY = 250
_REFRESH_RANK = 128

Trial = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Perplexity, state and time of the methods on real text."""

    methods: tuple[str, ...] = tuple(METHODS)
    """By the names in examples/common/methods.py."""
    model: str = "tiny"
    """Name of a file in examples/llama/configs."""
    data: str = "stdlib"
    """Text, as of examples.llama.pretrain."""
    steps: int = 1000
    """Steps of each run that counts."""
    tuning_steps: int = 500
    """Steps of each run on the ladder of learning rates, with a schedule of its own."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the initial weights and the order of the batches."""
    rank: int = 32
    """Of every low-rank method."""
    update_every: int = 50
    """Steps between two choices of the subspace."""
    batch_size: int = 8
    """Sequences in a batch."""
    seq_len: int = 64
    """Tokens in a sequence."""
    workers: int = 2
    """Runs at a time, on one core each."""
    rounds: int = 30
    """Steps of each method that are timed."""
    work: Path = Path("runs/comparison")
    """Where finished trials are kept; of one choice of the settings only."""
    out: Path | None = None
    """Directory of the record; default benchmarks/records."""


def job(settings: Settings) -> Job:
    """The text and the model; methods, seeds and rates are those of each trial."""
    example = Pretrain(
        model=settings.model,
        methods=("adamw",),
        data=settings.data,
        steps=settings.steps,
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        rank=settings.rank,
        update_every=settings.update_every,
    )
    return prepare(example, settings.work)


_cached_job = cache(job)  # of a worker, for all its trials


def with_settings(job: Job, **changes: Any) -> Job:
    return dataclasses.replace(
        job, settings=dataclasses.replace(job.settings, **changes)
    )


def _train_step(job: Job, tx: optax.GradientTransformation) -> Any:
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(job.task.loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def _bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def train(
    settings: Settings, method: str, rate: float, seeds: tuple[int, ...], steps: int
) -> list[Trial]:
    """One trial a seed; what it compiles is shared by them."""
    trials, compiled = [], {}
    for seed in seeds:
        run = with_settings(
            _cached_job(settings), seed=seed, steps=steps, learning_rate=rate
        )
        validation = Packed(run.tokens.validation, settings.seq_len).fixed_batches(
            _VALIDATION_BATCHES, settings.batch_size
        )
        tx = run.optimizer(method)
        params = run.task.init()
        state, sizes, began = tx.init(params), [], time.perf_counter()
        for done in range(steps):
            if done and done % _SHRINK_EVERY == 0:  # as the example does
                smaller, state = lro.rank.shrink(tx, state, params)
                tx = smaller if _bytes(state) < sizes[-1] else tx
            shapes = tuple(x.shape for x in jax.tree.leaves(state))
            if shapes not in compiled:
                compiled[shapes] = _train_step(run, tx)
            params, state, _ = compiled[shapes](params, state, run.task.batch(done))
            sizes.append(_bytes(state))
        loss = jax.jit(run.task.loss)
        losses = [float(loss(params, batch)) for batch in validation]
        trials.append(
            {
                "method": method,
                "rate": rate,
                "seed": seed,
                "steps": steps,
                "validation_loss": float(np.mean(losses)),
                "state_bytes": sizes[-1],
                "mean_state_bytes": float(np.mean(sizes)),
                "seconds": time.perf_counter() - began,
            }
        )
    return trials


class Trials:
    """Finished trials in a file, and a pool that makes those which are missing."""

    def __init__(self, settings: Settings, pool: ProcessPoolExecutor, bar: tqdm):
        settings.work.mkdir(parents=True, exist_ok=True)
        self._settings, self._pool, self._bar = settings, pool, bar
        self._path, self._lock = settings.work / "trials.jsonl", Lock()
        self.all: list[Trial] = []
        if self._path.exists():
            self.all = [json.loads(x) for x in self._path.read_text().splitlines()]

    def get(
        self, method: str, rate: float, seeds: tuple[int, ...], steps: int
    ) -> list[Trial]:
        wanted = {"method": method, "rate": rate, "steps": steps}
        known = {x["seed"]: x for x in self.all if wanted.items() <= x.items()}
        missing = tuple(seed for seed in seeds if seed not in known)
        if missing:
            args = (self._settings, method, rate, missing, steps)
            made = self._pool.submit(train, *args).result()
            with self._lock, self._path.open("a") as file:
                self.all += made
                file.writelines(json.dumps(x) + "\n" for x in made)
            known |= {x["seed"]: x for x in made}
        self._bar.update()
        return [known[seed] for seed in seeds]


def tune(trials: Trials, settings: Settings, method: str, default: float) -> dict:
    """Validation loss by learning rate; the best one has a worse one on each side."""
    losses: dict[float, float] = {}

    def loss(rung: int) -> float:
        rate = float(f"{default * _LADDER**rung:.3g}")
        if rate not in losses:
            seeds, steps = (_TUNING_SEED,), settings.tuning_steps
            (trial,) = trials.get(method, rate, seeds, steps)
            value = trial["validation_loss"]
            losses[rate] = value if math.isfinite(value) else math.inf
        return losses[rate]

    best = 0
    while True:
        around = min((best, best - 1, best + 1), key=loss)
        if around == best:
            return losses
        best = around


def compare(settings: Settings, base: Job) -> dict[str, Any]:
    """The figures of each method: tuned rate, ladder, its trials."""
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"  # for the workers

    def one(trials: Trials, method: str) -> dict[str, Any]:
        default, rank = with_settings(base, learning_rate=None).hyperparameters(method)
        ladder = tune(trials, settings, method, default)
        rate = min(ladder, key=lambda x: ladder[x])
        runs = trials.get(method, rate, settings.seeds, settings.steps)
        ladder = dict(sorted(ladder.items()))
        return {"rank": rank, "rate": rate, "ladder": ladder, "trials": runs}

    context = get_context("spawn")
    with (
        tqdm(desc="ladders and runs", unit=" trial") as bar,
        ProcessPoolExecutor(settings.workers, mp_context=context) as pool,
        ThreadPoolExecutor(len(settings.methods)) as threads,
    ):
        trials = Trials(settings, pool, bar)
        found = threads.map(lambda method: one(trials, method), settings.methods)
        return dict(zip(settings.methods, found, strict=True))


def step_times(settings: Settings, base: Job) -> dict[str, float]:
    """Median seconds of a whole training step, the methods taking turns."""
    running, times = {}, {method: [] for method in settings.methods}
    for method in tqdm(settings.methods, desc="compile"):
        tx, params = base.optimizer(method), base.task.init()
        step = _train_step(base, tx)
        running[method] = step, *step(params, tx.init(params), base.task.batch(0))[:2]
    for i in tqdm(range(1, settings.rounds + 1), desc="rounds"):
        for method, (step, params, state) in running.items():
            batch, began = base.task.batch(i), time.perf_counter()
            params, state, _ = jax.block_until_ready(step(params, state, batch))
            times[method].append(time.perf_counter() - began)
            running[method] = step, params, state
    return {method: statistics.median(x) for method, x in times.items()}


def refresh_times(rounds: int = 5) -> dict[str, float]:
    """Seconds that a choice of all subspaces of a LLaMA-60M layer takes.

    The difference between the medians of steps with and of steps without it.
    """
    shapes = matrices("60m", 1)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(
        lambda s: np.float32(rng.standard_normal(s)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )

    def galore(every):
        return lro.galore_adamw(
            1e-3, _REFRESH_RANK, update_every=every, subspace=lro.TopSingular("svd")
        )

    def galore_plus(every):
        return lro.galore_plus_adamw(
            1e-3, rank=_REFRESH_RANK, update_every=every, num_heads=8, warmup=0
        )

    found = {}
    for name, make in {"galore_svd": galore, "galore_plus": galore_plus}.items():
        medians = []
        for every in (1, 1_000_000_000):
            tx = make(every)
            update, state, times = jax.jit(tx.update), tx.init(grads), []
            for _ in range(rounds + 1):
                began = time.perf_counter()
                _, state = jax.block_until_ready(update(grads, state, grads))
                times.append(time.perf_counter() - began)
            medians.append(statistics.median(times[1:]))
        found[name] = medians[0] - medians[1]
    return found


def table(figures: dict[str, Any], times: dict[str, float]) -> str:
    rows = [
        "| method | rank | learning rate | validation loss | perplexity "
        "| optimizer state, KiB | step, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, found in figures.items():
        losses = [x["validation_loss"] for x in found["trials"]]
        state = statistics.mean(x["mean_state_bytes"] for x in found["trials"])
        rows.append(
            f"| {method} | {found['rank'] or ''} | {found['rate']:g} "
            f"| {_spread(losses, 3)} | {_spread([math.exp(x) for x in losses], 1)} "
            f"| {state / 2**10:,.0f} | {1e3 * times[method]:.1f} |"
        )
    return "\n".join(rows)


def _spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def orderings(figures: dict[str, Any], refresh: dict[str, float]) -> list[str]:
    """Which of the papers' orderings reproduce, seed by seed."""
    lines = []

    def loss_of(method):
        return [x["validation_loss"] for x in figures[method]["trials"]]

    for better, worse in (
        ("i3s_adamw", "galore_adamw"),
        ("fira_i3s_adamw", "fira_adamw"),
        ("adarankgrad_adamw", "galore_adamw"),
    ):
        if {better, worse} <= figures.keys():
            pairs = zip(loss_of(better), loss_of(worse), strict=True)
            differences = [x - y for x, y in pairs]
            lower = sum(x < 0 for x in differences)
            signed = ", ".join(f"{x:+.4f}" for x in differences)
            lines.append(
                f"{better} - {worse}, validation loss by seed: {signed} "
                f"(lower in {lower} of {len(differences)})"
            )
    if {"adarankgrad_adamw", "galore_adamw"} <= figures.keys():
        means, ends = (
            [
                statistics.mean(x[key] for x in figures[method]["trials"])
                for method in ("adarankgrad_adamw", "galore_adamw")
            ]
            for key in ("mean_state_bytes", "state_bytes")
        )
        lines.append(
            f"adarankgrad_adamw keeps {means[0] / means[1]:.1%} of galore_adamw's "
            f"optimizer state over the run, {ends[0] / ends[1]:.1%} at its end "
            "(embedding and head, which both keep whole, included)"
        )
    svd, plus = refresh["galore_svd"], refresh["galore_plus"]
    lines.append(
        f"choice of all subspaces of a LLaMA-60M layer at rank {_REFRESH_RANK}: "
        f"GaLore's SVD {1e3 * svd:.0f} ms, GaLore+ {1e3 * plus:.0f} ms, "
        f"{svd / plus:.1f} times less"
    )
    return lines


def main(settings: Settings) -> None:
    """Run what is missing, time the steps, and write the record."""
    base = job(settings)
    figures = compare(settings, base)
    times = step_times(settings, base)
    refresh = refresh_times()
    found = orderings(figures, refresh)
    ladders = [
        f"- {method}: "
        + ", ".join(f"{rate:g} {loss:.3f}" for rate, loss in x["ladder"].items())
        for method, x in figures.items()
    ]
    data = base.facts["data"]
    about = (
        f"{base.model_fact} on {data['source']} (Python {data['python']}, SHA-256 "
        f"{data['sha256'][:16]}); {settings.steps} steps of {settings.batch_size} x "
        f"{settings.seq_len} tokens, subspaces every {settings.update_every}, seeds "
        f"{', '.join(map(str, settings.seeds))}; mean ± standard deviation. State: the "
        f"mean over the run, unused ranks freed every {_SHRINK_EVERY} steps. Step: the "
        "whole training step."
    )
    rates = (
        f"Ladders of the learning rate (seed {_TUNING_SEED}, {settings.tuning_steps} "
        "steps), with validation loss:"
    )
    order = "\n".join(f"- {line}" for line in found)
    parts = (
        about,
        table(figures, times),
        "The papers' orderings:",
        order,
        rates,
        "\n".join(ladders),
    )
    text = "\n\n".join(parts)
    kept = {"methods": figures, "step_s": times, "refresh_s": refresh}
    write_record("comparison", settings, kept, text, settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings))
