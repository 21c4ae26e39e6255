"""Fine-tuning an encoder, each method at its own rate.

    python -m benchmarks.finetuning
    python -m benchmarks.finetuning --task mrpc --model DIR --data MRPC/ --epochs 2

The protocol is that of `benchmarks.comparison`: the rate of embeddings, head, biases
and norms is tuned once with full fine-tuning, then a ladder of rates of the matrices
for each method, on a seed of its own, then the seeds that count. Rates are chosen by
the least validation loss of a run; of the seeds that count, the score is that of the
validation at which it is best. What is missing is run until the time is up; each trial
(a minute of a core for stdlib) is kept. The encoder that is made first stays in runs/.
"""

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import optax
import tyro

from benchmarks.comparison.protocol import Missing, Protocol, Study, Trial
from benchmarks.comparison.record import ladders
from benchmarks.comparison.trials import Result, Results, complete
from benchmarks.record import RECORDS, write_record, written
from examples.common.interrupt import StopRequest
from examples.common.methods import matrix_state_bytes
from examples.common.report import markdown_table
from examples.roberta.glue import prepare
from examples.roberta.job import Job
from examples.roberta.report import constant_score
from examples.roberta.settings import SCRATCH, Glue
from examples.roberta.weights import Weights

_REFERENCE = "adamw"


@dataclass(frozen=True)
class Settings:
    """Score and state of fine-tuning methods, each at its own rate."""

    task: str = "stdlib"
    """Of examples.roberta.glue."""
    model: str = "small"
    """A directory, or small, which is pre-trained first."""
    data: str = "auto"
    """Of examples.roberta.glue."""
    methods: tuple[str, ...] = (
        _REFERENCE,
        "mlorc_adamw",
        "galore_adamw",
        "lora",
        SCRATCH,
    )
    """By the names in examples/common/methods.py, and scratch."""
    rank: int = 8
    """Of every low-rank method."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the head, the order of the batches and dropout, in the trials that count."""
    epochs: float | None = None
    batch_size: int | None = None
    max_length: int | None = None
    train_examples: int | None = None
    validation_examples: int | None = None
    pretrain_steps: int = 1000
    """Of the model that is made here."""
    rungs: tuple[int, int] = (4, 9)
    """Rates of a ladder, at least and at most."""
    minutes: float = 60.0
    """Ends after the trial that crosses it; what is there is kept and gone on from."""
    out: Path = RECORDS
    """Directory of the record, and of the trials below it."""
    runs: Path = Path("runs")
    """Where the model that is made here is kept."""

    @property
    def name(self) -> str:
        """Of the record."""
        return "glue_stdlib" if self.task == "stdlib" else self.task

    def glue(self) -> Glue:
        """The settings of the example with the same task, model and lengths."""
        own = "task model data rank epochs batch_size max_length train_examples"
        own += " validation_examples pretrain_steps"
        return Glue(methods=(_REFERENCE,), **{k: getattr(self, k) for k in own.split()})


class Finetuning:
    """Runs trials on one task and model; a method is compiled once."""

    def __init__(self, settings: Settings):
        made = settings.runs / f"finetuning-{settings.task}"
        self.job: Job = prepare(settings.glue(), made)
        self._compiled = lru_cache(maxsize=2)(self._compile)
        self._weights: Weights | None = None

    @property
    def weights(self) -> Weights:
        """Of the model, which is made at the first call if it is made here."""
        if self._weights is None:
            with StopRequest() as stop:
                self._weights = self.job.load(stop)
        return self._weights

    @property
    def setup(self) -> str:
        """What all trials have in common, in a line."""
        job, data = self.job, self.job.facts["data"]
        return (
            f"{job.settings.model} on {job.settings.task} {data['sha256'][:16]},"
            f" {len(job.train)} examples of at most {max(data['lengths'])} tokens,"
            f" {job.steps} steps of {job.batch_size},"
            f" {data['validation_examples']} to validate on"
        )

    def _compile(self, method: str) -> Any:
        loss = self.job.loss(method)

        def step(params, state, batch, rate, dense):
            tx = self.job.optimizer(method, rate, dense)
            grads = jax.grad(loss)(params, batch)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        def init(params):
            return self.job.optimizer(method, 0.0, 0.0).init(params)

        return loss, jax.jit(init), jax.jit(step, donate_argnums=(0, 1))

    def run(self, trial: Trial) -> Result:
        """The validations of one trial, and the bytes of its state."""
        job, began = self.job, time.process_time()
        loss, init, step = self._compiled(trial.method)
        task = job.task(trial.method, self.weights, loss, trial.seed)
        params = task.init()
        state, validations = init(params), []
        an_epoch = job.train.steps(job.batch_size)
        for done in range(1, job.steps + 1):
            batch = task.batch(done - 1)
            params, state = step(params, state, batch, trial.rate, trial.dense_rate)
            if done % an_epoch == 0 or done == job.steps:
                validations.append(task.evaluate(params))
        tx, shapes = job.optimizer(trial.method, 0.0, 0.0), job.shapes(trial.method)
        losses = [x["validation_loss"] for x in validations]
        best = max(validations, key=lambda x: x[job.score])
        return {
            "validation_loss": min(losses),
            "scores": {name: best[name] for name in job.settings.chosen_task.scores},
            "matrix_state_bytes": matrix_state_bytes(tx, shapes),
            "cpu_seconds": round(time.process_time() - began, 1),
        }

    def protocol(self, settings: Settings) -> Protocol:
        glue, (least, most) = self.job.settings, settings.rungs
        rates = {m: glue.rates(m)[0] for m in (*settings.methods, _REFERENCE, "lion")}
        return Protocol(
            settings.rank,
            glue.rank_of,
            seeds=settings.seeds,
            least=least,
            most=most,
            rates=rates,
            dense_rates={m: rates[m] for m in (_REFERENCE, "lion")},
        )


def rows(
    settings: Settings, study: Study, results: Mapping[Trial, Result]
) -> dict[str, dict[str, Any]]:
    """Of each method whose rates are known, its trials that count and are there."""
    found = {}
    for method in settings.methods:
        try:
            wanted = study.counted(method)
        except Missing:
            continue
        if there := {t.seed: results[t] for t in wanted if t in results}:
            first = wanted[0]
            found[method] = {
                "rank": first.rank,
                "dense_rate": first.dense_rate,
                "rate": first.rate,
                "scores": {seed: x["scores"] for seed, x in there.items()},
                "losses": {seed: x["validation_loss"] for seed, x in there.items()},
                "matrix_state_bytes": next(iter(there.values()))["matrix_state_bytes"],
            }
    return found


def table(found: Mapping[str, Mapping[str, Any]], scores: tuple[str, ...]) -> str:
    """Means with 95% intervals, in percent, and differences to full fine-tuning."""
    if not found:
        return "None is there yet."
    header = ["method", "rank", "d", "m", "seeds", *scores]
    header += [f"{scores[0]} minus {_REFERENCE}", "validation loss"]
    header += ["state of matrices, KiB"]
    base = found.get(_REFERENCE, {}).get("scores", {})
    lines = []
    for method, x in found.items():
        of = {n: {s: 100 * y[n] for s, y in x["scores"].items()} for n in scores}
        paired = [
            y - 100 * base[s][scores[0]] for s, y in of[scores[0]].items() if s in base
        ]
        lines.append(
            [
                method,
                "" if x["rank"] is None else str(x["rank"]),
                f"{x['dense_rate']:g}",
                f"{x['rate']:g}",
                str(len(x["scores"])),
                *(written(list(of[name].values()), 2) for name in scores),
                "" if method == _REFERENCE else written(paired, 2, "+"),
                written(list(x["losses"].values()), 3),
                f"{x['matrix_state_bytes'] / 2**10:,.0f}",
            ]
        )
    return markdown_table(header, lines)


def main(settings: Settings) -> None:
    """Runs what is missing until the time is up, then writes the record."""
    s = settings
    tuning = Finetuning(s)
    results = Results(s.out / s.name, tuning.setup)
    protocol = tuning.protocol(s)
    study = complete(results, protocol, s.methods, tuning.run, s.minutes)
    missing = len(list(study.missing(s.methods)))
    found = rows(s, study, results.all)
    tuned = dict.fromkeys((*s.methods, *(t.method for t in results.all)))
    parts = [
        f"**Not complete**: at least {missing} trials are missing." if missing else "",
        _about(s, tuning),
        table(found, tuning.job.settings.chosen_task.scores),
        "## Ladders",
        f"Least validation loss by m, seed {protocol.tuning_seed}:",
        ladders(study, results.all, list(tuned)),
    ]
    figures = {
        "methods": found,
        "setup": tuning.setup,
        "constant_answer": constant_score(tuning.job),
    }
    write_record(s.name, s, figures, "\n\n".join(filter(None, parts)), s.out)


def _about(s: Settings, tuning: Finetuning) -> str:
    job = tuning.job
    model, data = job.facts["model"], job.facts["data"]
    validations = math.ceil(job.steps / job.train.steps(job.batch_size))
    return (
        f"{tuning.setup}. The model: {model['source']}, {model['start']}. d is the rate"
        " of embeddings, head, biases and norms, tuned once with full fine-tuning (of"
        " LoRA that of the head, which is all that it trains beside its adapters); m"
        " that of the matrices. Each m is the best of a ladder on a seed of its own, by"
        " the least validation loss; scores, in percent, are those of the validation at"
        f" which {job.score} is best, of {validations} in a run. ± is half of the 95%"
        " confidence interval of the mean; differences are paired, seed by seed."
        f" Always the same of the {len(data['labels'])} answers has"
        f" {100 * constant_score(job):.2f} of {job.score}."
    )


if __name__ == "__main__":
    # Before the first computation: one core, as several sessions share a machine.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    main(tyro.cli(Settings))
