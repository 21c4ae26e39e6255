"""How low-rank gradients and moments are while an encoder is fine-tuned.

    python -m examples.spectra
    python -m examples.spectra --task mrpc --data MRPC/ --model roberta-base/
    python -m examples.spectra --resume

Full fine-tuning by AdamW, whose gradient and two moments are measured matrix by matrix
along the run: the share of the 8 largest singular values in the sum of all (MLorc's
Figures 1 and 4) and the effective rank (AdaRankGrad's Figures 3 and 5). Then the same
by AdaRankGrad: the ranks that it chooses, and the memory that they save (its Figure 4).
"""

import dataclasses
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

import lowrank_optax as lro
from examples.common.command import command
from examples.common.interrupt import StopRequest
from examples.common.loop import CHECKPOINTS, METRICS_FILE, Probe, Timetable, train
from examples.common.metrics import Record, summed_up
from examples.common.probe import LEADING, full_moments
from examples.common.settings import parse_settings, settings_record
from examples.common.typed import checked_fields
from examples.roberta.glue import begin, prepare
from examples.roberta.job import SUMMARY, Job
from examples.roberta.settings import SMOKE as GLUE_SMOKE
from examples.roberta.settings import Glue
from examples.roberta.spectra_report import (
    RESIDUALS,
    Matrix,
    Run,
    quantity_table,
    write_files,
)
from examples.roberta.weights import Weights
from lowrank_optax import diagnostics

DENSE, ADAPTIVE = METHODS = ("adamw", "adarankgrad_adamw")


@dataclass(frozen=True)
class Spectra:
    """Fine-tune an encoder; measure how low-rank its gradients and moments are.

    Writes one directory: spectra.json, report.md and its plots. Ctrl-C saves a
    checkpoint and says how to go on. Without arguments nothing is downloaded.
    """

    task: str = "stdlib"
    """As of examples.roberta.glue: cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, or
    stdlib."""
    model: str = "small"
    """Hugging Face directory or hub name; or small, an encoder that is pre-trained
    first. A run of examples.roberta.glue leaves it in its directory pretrained."""
    data: str = "auto"
    """Directory with the task's files, or one file; hf:OWNER/NAME; or auto."""
    out: Path | None = None
    """Directory of the run, new or empty but with --resume. Default: runs/ and the
    date; with --resume, the latest there."""
    resume: bool = False
    """Continue the run in --out with the settings it was started with."""
    measurements: int = 24
    """How many times along the run, besides its start; each takes the singular values
    of every matrix."""
    seed: int = 0
    """Seed of the fresh head, of the order of the batches and of dropout."""
    learning_rate: float | None = None
    """Peak learning rate of both methods' matrices. Default: the papers' for task and
    method."""
    dense_learning_rate: float | None = None
    """Peak learning rate of embeddings, head, biases and norms. Default: that of the
    matrices, as in the papers."""
    rank: int = 8
    """Largest rank of AdaRankGrad."""
    epochs: float | None = None
    """Passes over the training set. Default: the task's."""
    batch_size: int | None = None
    """Examples in a batch. Default: the task's."""
    max_length: int | None = None
    """Tokens kept of an example. Default: the task's."""
    update_every: int | None = None
    """The most steps between two choices of AdaRankGrad's subspace. Default: the
    task's."""
    train_examples: int | None = None
    """Train on so many examples at most. Default: the task's, all in GLUE."""
    validation_examples: int | None = None
    """Validate on so many examples at most. Default: the task's, all in GLUE."""
    pretrain_steps: int = 1000
    """Steps of masked language modelling, for the models that are made here."""
    smoke: bool = False
    """Smaller defaults: all of it in less than a minute, to see that it works."""

    def glue(self) -> Glue:
        """The settings of the fine-tuning.

        Raises:
          ValueError: for no measurement.
        """
        if self.measurements < 1:
            raise ValueError(
                f"measurements must be at least 1, not {self.measurements}"
            )
        known = {field.name for field in dataclasses.fields(Glue)}
        shared = {k: v for k, v in vars(self).items() if k in known}
        return Glue(**shared, seeds=(self.seed,), methods=METHODS)


SMOKE = Spectra(
    measurements=4,
    **{
        field.name: getattr(GLUE_SMOKE, field.name)
        for field in dataclasses.fields(Spectra)
        if hasattr(GLUE_SMOKE, field.name)
    },
)


# What is measured


@jax.jit
def measures(x: jax.Array) -> dict[str, jax.Array]:
    """How low-rank a matrix is.

    Returns:
      `top8`, the share of the 8 largest singular values in the sum of all;
      `entropy_rank`, the effective rank by entropy; and for each of `RESIDUALS`, as
      `rank@0.48`, the smallest rank that leaves out no more than this share of the
      squared norm (AdaRankGrad, equation 2).
    """
    return {
        "top8": diagnostics.singular_value_ratio(x, LEADING),
        "entropy_rank": diagnostics.effective_rank(x),
    } | {
        f"rank@{left_out:g}": diagnostics.effective_rank(x, energy=1 - left_out)
        for left_out in RESIDUALS
    }


class _KeepsNothing:
    """A probe that compares no measurement with the one before."""

    def start(self, params: Any) -> list[jax.Array]:
        return []


@dataclass(frozen=True)
class Spectrum(_KeepsNothing):
    """Measures the gradient and the moments of the named matrices."""

    names: tuple[str, ...]

    def measure(
        self, grads: Any, opt_state: Any, bases: list[jax.Array]
    ) -> tuple[Record, list[jax.Array]]:
        record = {}
        measured = {"gradient": grads, **full_moments(opt_state, grads)}
        for quantity, tree in measured.items():
            leaves = {
                jax.tree_util.keystr(path, simple=True, separator="/"): x
                for path, x in jax.tree_util.tree_leaves_with_path(tree)
            }
            for name in self.names:
                for measure, value in measures(leaves[name]).items():
                    record[f"{quantity}/{measure}/{name}"] = value
        return record, bases


class Ranks(_KeepsNothing):
    """Tells the ranks that AdaRankGrad has chosen, and the memory that they save."""

    def measure(
        self, grads: Any, opt_state: Any, bases: list[jax.Array]
    ) -> tuple[Record, list[jax.Array]]:
        return diagnostics.state_metrics(opt_state), bases


def follow(
    job: Job, weights: Weights, method: str, probe: Probe, count: int, stop: StopRequest
) -> Run:
    """Trains with one method, or goes on with it, and measures so many times.

    The gradient that is measured is that of one fixed training batch, so that nothing
    but the weights changes from one measurement to the next.

    Raises:
      Interrupted: on request of `stop`.
    """
    s = job.settings
    rate = s.rates(method)[0]
    task = job.task(method, weights, job.loss(method), s.seeds[0])
    task = dataclasses.replace(
        task, validation=[task.batch(job.steps)], evaluate=lambda params: {}
    )
    every = -(-job.steps // count)
    timetable = Timetable(job.steps, 1, every, s.checkpoint_every, job.steps)
    tx, directory = job.optimizer(method, rate), job.out / method

    def summary() -> dict[str, Any]:
        state = train(task, tx, timetable, probe, directory, method, stop)
        scores = job.evaluate(job.graph(method), state.params)
        return {"learning_rate": rate, "scores": scores}

    found, records = summed_up(
        directory / SUMMARY,
        directory / METRICS_FILE,
        summary,
        partial(checked_fields, Run, but=("records",)),
    )
    # Of use only to a run that is under way, and larger than all else.
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
    return Run(**found, records=[r for r in records if "probe" in r])


def work(settings: Spectra, job: Job, stop: StopRequest) -> tuple[str, list[Path]]:
    """Trains with both methods; the table that is printed, and the files written."""
    tx, shapes = job.optimizer(ADAPTIVE, 1.0), job.shapes(ADAPTIVE)
    matrices = [
        Matrix(row.path, row.shape, row.rank)
        for row in lro.describe(tx, shapes)
        if row.rank is not None
    ]
    names = tuple(matrix.name for matrix in matrices)
    probes = {DENSE: Spectrum(names), ADAPTIVE: Ranks()}
    weights = job.load(stop)
    runs = {
        method: follow(job, weights, method, probe, settings.measurements, stop)
        for method, probe in probes.items()
    }
    paths = write_files(job, runs, matrices)
    return quantity_table(runs[DENSE], names), paths


def main(argv: list[str] | None = None) -> int:
    """Runs the job; returns the exit status: 0, 2 for bad input, 130 if stopped."""
    argv = sys.argv[1:] if argv is None else argv
    settings: list[Spectra] = []

    def prepared() -> Job:
        given, out = parse_settings(argv, "spectra", Spectra(), SMOKE)
        job = prepare(given.glue(), out)
        job.facts.update(settings_record(given))
        settings.append(given)
        return job

    return command(
        "examples.spectra",
        prepared,
        begin,
        lambda job, stop: work(settings[0], job, stop),
    )


if __name__ == "__main__":
    sys.exit(main())
