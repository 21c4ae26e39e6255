"""The report of a GLUE job: what each method reached, over the seeds."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from examples.common.files import write_json
from examples.common.report import (
    RATES,
    Plot,
    Run,
    markdown_table,
    memory_bars,
    write_page,
)
from examples.common.seeds import curves, mean_and_spread, scores, written
from examples.roberta.job import Job, Trained
from examples.roberta.scores import SCORES
from examples.roberta.settings import SCRATCH

RESULT = "result.json"

_NOTES = {
    "lora": "trains adapters and head only",
    "lora_lion": "trains adapters and head only",
    "dora": "trains adapters and head only",
    SCRATCH: "adamw from random weights, so from scratch",
}


def comparison(job: Job, trained: Mapping[str, Trained]) -> str:
    """The methods as a Markdown table, a row each; scores in percent."""
    names = score_names(job)
    header = [
        "method",
        "rank",
        *RATES,
        *names,
        "trained parameters",
        "optimizer state",
        "peak memory",
        "median step",
    ]
    rows = []
    for method, found in trained.items():
        runs = list(found.runs.values())
        run, seconds = runs[0], mean(run.step_seconds for run in runs)
        rows.append(
            [
                f"`{method}`",
                "" if run.rank is None else str(run.rank),
                *run.rates,
                *(written(_percents(job, runs, name)) for name in names),
                f"{run.trained_parameters:,}",
                f"{run.state_bytes:,} B",
                f"{run.peak_bytes / 2**20:,.1f} MiB",
                f"{seconds * 1e3:,.1f} ms",
            ]
        )
    return markdown_table(header, rows)


def score_names(job: Job) -> list[str]:
    """The scores on record: of all validation sets, and of each if there are more."""
    names = job.settings.chosen_task.scores
    parts = [part for part in job.validation if part]
    return [*names, *(f"{name}_{part}" for part in parts for name in names)]


def constant_score(job: Job) -> float:
    """The best score of an answer that is always the same."""
    labels = np.concatenate([part.labels for part in job.validation.values()])
    score = SCORES[job.score]
    return max(
        score(np.full_like(labels, label), labels) for label in np.unique(labels)
    )


def setting(job: Job) -> dict[str, str]:
    """What was trained, how and where, as named facts."""
    s, task, facts = job.settings, job.settings.chosen_task, job.facts
    data, preset = facts["data"], task.preset
    return {
        "task": f"{task.title}, {data['source']} (SHA-256 {data['sha256'][:16]}):"
        f" {data['train_examples']:,} examples to train on,"
        f" {data['validation_examples']:,} to validate on",
        "model": f"{facts['model']['source']}, {facts['model']['start']}",
        "training": f"{job.steps} steps ({preset.epochs:g} epochs) of"
        f" {preset.batch_size} examples of at most {preset.max_length} tokens, weight"
        f" decay {s.weight_decay:g}, warm-up over {s.warmup:.0%} of the steps, then"
        f" linear decay; seeds {', '.join(map(str, s.seeds))}",
        "machine": facts["device"],
        "versions": ", ".join(f"{k} {v}" for k, v in facts["versions"].items()),
    }


def write_files(job: Job, trained: Mapping[str, Trained]) -> list[Path]:
    """Writes report.md with its plots and, last, result.json; returns the paths."""
    s, task, constant = job.settings, job.settings.chosen_task, constant_score(job)
    lines = setting(job) | {
        "scores": f"in percent, at the validation with the best {job.score}, the mean"
        " and, of several seeds, the standard deviation; the best answer that is always"
        f" the same has {100 * constant:.2f}",
        "peak memory": "of the compiled step: weights, gradients, state, activations",
    }
    if s.grid:
        lines["learning rates"] = (
            f"the best of {', '.join(f'{x:g}' for x in s.grid)} times the task's own on"
            f" seed {s.seeds[0]}"
        )
    notes = {method: note for method, note in _NOTES.items() if method in trained}
    lines |= {f"`{method}`": note for method, note in notes.items()}

    groups = {method: list(found.runs.values()) for method, found in trained.items()}
    percents = {m: _percents(job, runs, job.score) for m, runs in groups.items()}
    axis = f"{task.title if task.published else 'validation'} {job.score}"
    sections: list[str | Plot] = [
        comparison(job, trained),
        *_papers(job),
        *_tried(trained),
        Plot(
            "scores",
            "Scores",
            partial(scores, percents, task.published, f"{axis} (%)", 100 * constant),
        ),
        Plot("curves", "Along the run", partial(curves, groups, job.score, axis)),
        Plot(
            "memory",
            "Optimizer state",
            partial(memory_bars, [runs[0] for runs in groups.values()]),
        ),
    ]
    paths = write_page(job.out, f"Fine-tuning on {task.title}", lines, sections)
    start = job.facts["model"]["start"]
    result = {
        **job.facts,
        "start": start,
        "steps": job.steps,
        "constant_answer": {job.score: constant},
        "runs": {
            method: {"start": "from scratch" if method == SCRATCH else start}
            | _summary(job, found)
            for method, found in trained.items()
        },
    }
    # Last and whole: that it exists says that the run is complete.
    return [write_json(job.out / RESULT, result), *paths]


def _percents(job: Job, runs: Sequence[Run], name: str) -> list[float]:
    return [100 * job.best(run)[name] for run in runs]


def _papers(job: Job) -> list[str]:
    """The papers' own figures, marked as such."""
    task = job.settings.chosen_task
    rows = [
        [f"`{method}`", source, f"{value:.2f}"]
        for source, values in task.published.items()
        for method, value in values.items()
    ]
    if not rows:
        return []
    text = (
        "## From the papers\n\nRoBERTa-Base, as the papers report it: **not measured"
        " here**, and not comparable with another model, other data or fewer epochs."
    )
    return [text, markdown_table(["method", "source", task.title], rows)]


def _tried(trained: Mapping[str, Trained]) -> list[str]:
    rows = [
        [f"`{method}`", f"{rate:g}", f"{100 * score:.2f}"]
        for method, found in trained.items()
        for rate, score in found.tried.items()
    ]
    if len(rows) == len(trained):
        return []
    table = markdown_table(["method", "learning rate", "score"], rows)
    return ["## Learning rates that were tried", table]


def _summary(job: Job, found: Trained) -> dict[str, Any]:
    """One method for the result file; the measured times stand apart."""
    runs = list(found.runs.values())
    first, names = runs[0], score_names(job)
    return {
        "rank": first.rank,
        "learning_rate": found.learning_rate,
        "dense_learning_rate": first.dense_learning_rate,
        "tried": {f"{rate:g}": score for rate, score in found.tried.items()},
        "trained_parameters": first.trained_parameters,
        "state_bytes": first.state_bytes,
        "matrix_state_bytes": first.matrix_state_bytes,
        "peak_bytes": first.peak_bytes,
        "scores": {
            name: mean_and_spread([job.best(run)[name] for run in runs])
            for name in names
        },
        "seeds": {
            str(seed): {
                "best_step": job.best(run)["step"],
                "validation_loss": job.best(run)["validation_loss"],
                **{name: job.best(run)[name] for name in names},
                "last": {name: run.records[-1][name] for name in names},
            }
            for seed, run in found.runs.items()
        },
        "timing": {
            "step_seconds": mean(run.step_seconds for run in runs),
            "examples_per_second": mean(run.tokens_per_second for run in runs),
        },
    }
