"""The report of a comparison: tables and a few plots, from what each run wrote."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.common.files import aside, write_text
from examples.common.gaps import HEADER, gap_rows
from examples.common.metrics import Record

STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 150,
}
# The two columns of `Run.rates`.
RATES = ("learning rate", "of embeddings, head, norms")
_SMOOTHING = 0.9  # of the training curves: weight of the past in the moving average


@dataclass(frozen=True)
class Run:
    """One finished run of one method.

    Attributes:
      method: its name.
      rank: its rank, None where it has none.
      learning_rate: the peak rate of the matrices.
      dense_learning_rate: that of all other leaves.
      trained_parameters: how many numbers the optimizer may change.
      state_bytes: what the optimizer's state takes.
      matrix_state_bytes: the part of it that belongs to the matrices, which are the
        leaves that low-rank methods treat; the rest belongs to embeddings, head,
        norms.
      tokens_per_step: tokens predicted in a step.
      records: the metrics, one a logged step, the last one validated.
    """

    method: str
    rank: int | None
    learning_rate: float
    dense_learning_rate: float
    trained_parameters: int
    state_bytes: int
    matrix_state_bytes: int
    tokens_per_step: int
    records: Sequence[Record]

    @property
    def rates(self) -> tuple[str, str]:
        """Both rates, for a table."""
        return f"{self.learning_rate:g}", f"{self.dense_learning_rate:g}"

    @property
    def initial_validation_loss(self) -> float:
        return self.records[0]["validation_loss"]

    @property
    def validation_loss(self) -> float:
        return self.records[-1]["validation_loss"]

    @property
    def perplexity(self) -> float:
        return math.exp(self.validation_loss)

    @property
    def step_seconds(self) -> float:
        """The median over the logged steps."""
        return median(r["seconds"] for r in self.records if "seconds" in r)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_seconds

    @property
    def peak_bytes(self) -> int:
        """What a compiled step holds: weights, state, gradients, activations."""
        return self.records[0]["peak_bytes"]

    def summary(self) -> dict[str, Any]:
        """The run in figures; the measured times stand apart, under "timing"."""
        return {
            "rank": self.rank,
            "learning_rate": self.learning_rate,
            "dense_learning_rate": self.dense_learning_rate,
            "initial_validation_loss": self.initial_validation_loss,
            "validation_loss": self.validation_loss,
            "perplexity": self.perplexity,
            "trained_parameters": self.trained_parameters,
            "state_bytes": self.state_bytes,
            "matrix_state_bytes": self.matrix_state_bytes,
            "timing": {
                "step_seconds": self.step_seconds,
                "tokens_per_second": self.tokens_per_second,
            },
        }

    def series(self, *keys: str) -> tuple[list[int], list[float]]:
        """Steps and values of the records that hold the (nested) key."""
        steps, values = [], []
        for record in self.records:
            value = record
            for key in keys:
                value = value.get(key) if value is not None else None
            if value is not None:
                steps.append(record["step"])
                values.append(value)
        return steps, values


@dataclass(frozen=True)
class Plot:
    """A section of a page that is a plot.

    Attributes:
      name: of the file, without its ending.
      heading: of the section.
      draw: makes the figure and its caption.
    """

    name: str
    heading: str
    draw: Callable[[], tuple[Figure, str]]


def write_report(
    directory: Path, title: str, facts: dict[str, str], runs: Sequence[Run]
) -> list[Path]:
    """Writes report.md and its plots for runs that are compared, one a method.

    Args:
      directory: where they go; must exist.
      title: heading of the page.
      facts: named facts about the job, listed under the heading.
      runs: what is compared, in this order.

    Returns:
      The paths written, report.md first.
    """
    plots = [
        Plot("loss", "Loss", partial(loss_curves, runs)),
        Plot("memory", "Optimizer state", partial(memory_bars, runs)),
        Plot("subspace_overlap", "Subspace of the gradient", partial(_overlap, runs)),
        Plot("singular_values", "Singular values", partial(_singular_values, runs)),
    ]
    return write_page(directory, title, facts, [table(runs), *_gaps(runs), *plots])


def write_page(
    directory: Path, title: str, facts: dict[str, str], sections: Sequence[str | Plot]
) -> list[Path]:
    """Writes report.md and its plots.

    Args:
      directory: where they go; must exist.
      title: heading of the page.
      facts: named facts about the job, listed under the heading.
      sections: Markdown as it is, and plots.

    Returns:
      The paths written, report.md first.
    """
    page = [f"# {title}", _list(facts)]
    paths = [directory / "report.md"]
    for section in sections:
        if isinstance(section, str):
            page.append(section)
            continue
        path = directory / f"{section.name}.png"
        with plt.rc_context(STYLE):
            figure, caption = section.draw()
            with aside(path) as draft:
                figure.savefig(draft, format="png")
            plt.close(figure)
        heading = section.heading
        page += [f"## {heading}", f"![{heading}]({path.name})", caption]
        paths.append(path)
    write_text(paths[0], "\n\n".join(page) + "\n")
    return paths


def _gaps(runs: Sequence[Run]) -> list[str]:
    """Perplexities of sampled and leading subspaces, where both were run."""
    rows = gap_rows({run.method: run.perplexity for run in runs})
    if not rows:
        return []
    note = "Of the perplexity, between leading subspace and full rank; one seed."
    return ["## Gap to full rank", markdown_table(HEADER, rows), note]


def _list(facts: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items())


def table(runs: Sequence[Run]) -> str:
    """The runs as a Markdown table, a row each."""
    header = [
        "method",
        "rank",
        *RATES,
        "validation loss",
        "perplexity",
        "trained parameters",
        "optimizer state",
        "of which matrices",
        "median step",
        "tokens/s",
    ]
    rows = [
        [
            f"`{run.method}`",
            "" if run.rank is None else str(run.rank),
            *run.rates,
            f"{run.initial_validation_loss:.3f} → {run.validation_loss:.3f}",
            f"{run.perplexity:,.1f}",
            f"{run.trained_parameters:,}",
            f"{run.state_bytes:,} B",
            f"{run.matrix_state_bytes:,} B"
            f" ({run.matrix_state_bytes / max(1, run.state_bytes):.0%})",
            f"{run.step_seconds * 1e3:,.1f} ms",
            f"{run.tokens_per_second:,.0f}",
        ]
        for run in runs
    ]
    return markdown_table(header, rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that can be read in a terminal too, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, *rows]
    first = [row[0].ljust(widths[0]) for row in lines]
    rest = [
        [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        for row in lines
    ]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [[name, *cells] for name, cells in zip(first, rest, strict=True)]
    lines.insert(1, rule)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def loss_curves(runs: Sequence[Run]) -> tuple[Figure, str]:
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4), sharey=True, layout="constrained"
    )
    for run in runs:
        steps, losses = run.series("loss")
        left.plot(steps, smooth(losses), label=run.method)
        right.plot(*run.series("validation_loss"), marker="o", ms=3, label=run.method)
    left.set(xlabel="step", ylabel="loss (nats per token)", title="training, smoothed")
    right.set(xlabel="step", title="validation")
    right.legend()
    return figure, (
        "Mean loss per token: of each training batch (moving average) and of the fixed"
        " validation set."
    )


def smooth(values: Sequence[float]) -> list[float]:
    """Moving average without the bias towards zero at the start."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = _SMOOTHING * total + value
        weight = _SMOOTHING * weight + 1
        smoothed.append(total / weight)
    return smoothed


def memory_bars(runs: Sequence[Run]) -> tuple[Figure, str]:
    figure, axes = plt.subplots(
        figsize=(8, 1.2 + 0.5 * len(runs)), layout="constrained"
    )
    names = [run.method for run in runs]
    matrices = [run.matrix_state_bytes / 2**20 for run in runs]
    rest = [run.state_bytes / 2**20 - m for run, m in zip(runs, matrices, strict=True)]
    axes.barh(names, matrices, label="matrices")
    bars = axes.barh(
        names, rest, left=matrices, label="embeddings, head, norms", color="lightgray"
    )
    totals = [f"{run.state_bytes / 2**20:.2f}" for run in runs]
    axes.bar_label(bars, totals, padding=3)
    axes.set(xlabel="optimizer state (MiB)")
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper center", ncols=2)
    return figure, (
        "Bytes of the optimizer's state. Low-rank methods shrink the part of the"
        " matrices; the rest keeps full-rank state in every method."
    )


def _overlap(runs: Sequence[Run]) -> tuple[Figure, str]:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for run in runs:
        axes.plot(*run.series("probe", "overlap"), marker="o", ms=3, label=run.method)
    axes.set(xlabel="step", ylabel="overlap with the measurement before", ylim=(0, 1))
    axes.legend()
    return figure, (
        "Overlap of the leading left singular subspace of the gradient, on one fixed"
        " batch, with that of the measurement before; mean over the measured matrices."
        " 1: the same subspace, 0: orthogonal."
    )


_SPECTRA = {
    "gradient": "gradient",
    "first_moment": "first moment",
    "second_moment": "second moment",
}


def _singular_values(runs: Sequence[Run]) -> tuple[Figure, str]:
    figure, panels = plt.subplots(
        1, 3, figsize=(11, 4), sharex=True, sharey=True, layout="constrained"
    )
    for axes, (key, name) in zip(panels, _SPECTRA.items(), strict=True):
        for index, run in enumerate(runs):
            steps, shares = run.series("probe", key)
            if steps:
                axes.plot(
                    steps, shares, marker="o", ms=3, color=f"C{index}", label=run.method
                )
        axes.set(xlabel="step", title=name, ylim=(0, 1))
        _legend_or_note(axes)
    panels[0].set(ylabel="top 8 singular values / all")
    return figure, (
        "Share of the 8 largest singular values in the sum of all; mean over the"
        " measured matrices. Moments are measured where the optimizer keeps them at"
        " full size."
    )


def _legend_or_note(axes: Axes) -> None:
    if axes.lines:
        axes.legend()
    else:
        note = "no method here keeps it\nat full size"
        axes.text(0.5, 0.5, note, ha="center", va="center", transform=axes.transAxes)
