"""The report of how low-rank fine-tuning is: tables and plots of what was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from examples.common.files import write_json
from examples.common.metrics import Record
from examples.common.report import Plot, markdown_table, write_page
from examples.roberta.job import Job
from examples.roberta.report import setting

RESULT = "spectra.json"
QUANTITIES = {
    "gradient": "gradient",
    "first_moment": "first moment",
    "second_moment": "second moment",
}
# Shares of the squared norm that may be left out: AdaRankGrad's default, and less.
RESIDUALS = (0.48, 0.3, 0.1)


@dataclass(frozen=True)
class Matrix:
    """A matrix of the model.

    Attributes:
      name: the path of the parameter.
      shape: its rows and columns.
      rank: the largest that AdaRankGrad may give it.
    """

    name: str
    shape: tuple[int, ...]
    rank: int


@dataclass(frozen=True)
class Run:
    """One run and what was measured along it.

    Attributes:
      learning_rate: its peak.
      scores: of the final weights, on the validation set.
      records: the metrics of the steps at which something was measured.
    """

    learning_rate: float
    scores: Mapping[str, float]
    records: Sequence[Record]

    def series(self, prefix: str, names: Sequence[str]) -> tuple[list[int], np.ndarray]:
        """Steps, and (steps, names) what was measured at them under the names.

        Moments and ranks begin after the first step.
        """
        found = [
            record
            for record in self.records
            if any(key.startswith(prefix) for key in record["probe"])
        ]
        # Zeros are not on record.
        values = [[r["probe"].get(prefix + n, 0.0) for n in names] for r in found]
        return [record["step"] for record in found], np.array(values)


def quantity_table(dense: Run, names: Sequence[str]) -> str:
    """The mean over all matrices of each quantity."""
    header = ["", "top 8 / all, first", "mean", "last", "effective rank (entropy)"]
    rows = []
    for quantity, title in QUANTITIES.items():
        _, share = dense.series(f"{quantity}/top8/", names)
        _, rank = dense.series(f"{quantity}/entropy_rank/", names)
        means = (share[0].mean(), share.mean(), share[-1].mean())
        rows.append([title, *(f"{x:.3f}" for x in means), f"{rank.mean():.1f}"])
    return markdown_table(header, rows)


def matrix_table(dense: Run, adaptive: Run, matrices: Sequence[Matrix]) -> str:
    """Ranks and shares of each matrix: at the first, at the last measurement, mean."""
    names = [matrix.name for matrix in matrices]
    _, share = dense.series("gradient/top8/", names)
    _, ranks = dense.series(f"gradient/rank@{RESIDUALS[0]:g}/", names)
    _, chosen = adaptive.series("rank/", names)
    header = [
        "matrix",
        "shape",
        "top 8 / all of the gradient",
        "its effective rank, first",
        "last",
        "mean",
        "AdaRankGrad's rank, mean",
        "numbers saved, mean",
    ]
    rows = []
    for i, matrix in enumerate(matrices):
        m, n = matrix.shape
        mean_rank = chosen[:, i].mean()
        rows.append(
            [
                _short(matrix.name),
                f"{m} x {n}",
                f"{share[:, i].mean():.3f}",
                f"{ranks[0, i]:.0f}",
                f"{ranks[-1, i]:.0f}",
                f"{ranks[:, i].mean():.1f}",
                f"{mean_rank:.2f} of {matrix.rank}",
                f"{(matrix.rank - mean_rank) * (m + n):,.0f}",
            ]
        )
    return markdown_table(header, rows)


def _shares(dense: Run, names: Sequence[str]) -> tuple[Figure, str]:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for quantity, title in QUANTITIES.items():
        _band(axes, *dense.series(f"{quantity}/top8/", names), title)
    axes.set(xlabel="step", ylabel="top 8 singular values / all", ylim=(0, 1))
    axes.legend()
    return figure, (
        "Share of the 8 largest singular values in the sum of all, along full"
        " fine-tuning by AdamW: mean over the matrices, the band from the lowest to the"
        " highest. Compare MLorc's Figures 1 and 4."
    )


def _band(axes: Axes, steps: list[int], values: np.ndarray, label: str) -> None:
    (line,) = axes.plot(steps, values.mean(axis=1), marker="o", ms=3, label=label)
    low, high = values.min(axis=1), values.max(axis=1)
    axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, lw=0)


def _by_matrix(dense: Run, names: Sequence[str]) -> tuple[Figure, str]:
    steps, ranks = dense.series(f"gradient/rank@{RESIDUALS[0]:g}/", names)
    figure, axes = plt.subplots(
        figsize=(8, 1.6 + 0.22 * len(names)), layout="constrained"
    )
    image = axes.pcolormesh(
        np.arange(len(steps) + 1), np.arange(len(names) + 1), ranks.T, vmin=1
    )
    every = max(1, len(steps) // 8)
    axes.set_xticks(
        np.arange(len(steps))[::every] + 0.5, [str(step) for step in steps[::every]]
    )
    axes.set_yticks(np.arange(len(names)) + 0.5, [_short(name) for name in names])
    axes.set(xlabel="step")
    axes.invert_yaxis()
    axes.grid(visible=False)
    figure.colorbar(
        image, label="effective rank of the gradient", ticks=MaxNLocator(integer=True)
    )
    return figure, (
        f"The smallest rank that leaves out at most {RESIDUALS[0]:g} of the gradient's"
        " squared norm, matrix by matrix along full fine-tuning by AdamW. Compare"
        " AdaRankGrad's Figure 3."
    )


def _by_threshold(dense: Run, names: Sequence[str]) -> tuple[Figure, str]:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for left_out in RESIDUALS:
        series = dense.series(f"gradient/rank@{left_out:g}/", names)
        _band(axes, *series, f"{left_out:g} left out")
    axes.set(xlabel="step", ylabel="effective rank of the gradient")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure, (
        "The smallest rank that leaves out at most a share of the gradient's squared"
        " norm: mean over the matrices, the band from the lowest to the highest."
        " AdaRankGrad's Figure 5 varies the same threshold."
    )


def _chosen(adaptive: Run, names: Sequence[str]) -> tuple[Figure, str]:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    steps, ranks = adaptive.series("rank/", names)
    left.plot(steps, ranks, drawstyle="steps-post", color="C0", alpha=0.25, lw=1)
    steps, means = adaptive.series("rank", [""])
    left.plot(steps, means, drawstyle="steps-post", color="C0", lw=2)
    left.set(xlabel="step", ylabel="rank of the subspace")
    left.set_ylim(bottom=0)
    _, saved = adaptive.series("memory_reduction", [""])
    right.plot(steps, saved[-len(steps) :], drawstyle="steps-post", color="C2")
    right.set(xlabel="step", ylabel="numbers saved, all matrices")
    right.set_ylim(bottom=0)
    return figure, (
        "The ranks that AdaRankGrad chooses, each matrix thin and their mean weighted"
        " with m + n bold, and how many numbers all bases with one moment each have"
        " less than at the largest rank. Compare its Figure 4."
    )


def _short(name: str) -> str:
    """A matrix's name without what all have in common.

    >>> _short("encoder/layers/0/attention/query/kernel")
    'layers/0/attention/query'
    """
    return name.removeprefix("encoder/").removesuffix("/kernel")


def write_files(
    job: Job, runs: Mapping[str, Run], matrices: Sequence[Matrix]
) -> list[Path]:
    """Writes report.md with its plots and, last, spectra.json; returns the paths."""
    dense, adaptive = runs.values()
    names = [matrix.name for matrix in matrices]
    lines = setting(job) | {
        "methods": "; ".join(
            f"`{method}`, learning rate {run.learning_rate:g}, {job.score}"
            f" {run.scores[job.score]:.3f} in the end"
            for method, run in runs.items()
        ),
        "gradient": "of one fixed training batch",
        "effective rank": f"the smallest that leaves out at most {RESIDUALS[0]:g} of"
        " the squared norm (AdaRankGrad, equation 2); by entropy where it says so",
        "means": f"over the measurements, at {len(dense.records)} steps of the run",
    }
    sections: list[str | Plot] = [
        quantity_table(dense, names),
        Plot("shares", "Singular values", partial(_shares, dense, names)),
        Plot("ranks", "Effective rank by matrix", partial(_by_matrix, dense, names)),
        matrix_table(dense, adaptive, matrices),
        Plot("thresholds", "Thresholds", partial(_by_threshold, dense, names)),
        Plot("chosen", "AdaRankGrad", partial(_chosen, adaptive, names)),
    ]
    title = f"Spectra of fine-tuning on {job.settings.chosen_task.title}"
    paths = write_page(job.out, title, lines, sections)
    result = {
        **job.facts,
        "steps": job.steps,
        "matrices": {matrix.name: matrix.shape for matrix in matrices},
        "runs": {
            method: {
                "learning_rate": run.learning_rate,
                "scores": run.scores,
                "measured": [
                    {"step": record["step"], **record["probe"]}
                    for record in run.records
                ],
            }
            for method, run in runs.items()
        },
    }
    # Last and whole: that it exists says that the run is complete.
    return [write_json(job.out / RESULT, result), *paths]
