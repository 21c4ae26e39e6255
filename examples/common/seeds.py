"""The runs of several seeds as one: means, spreads, and curves with a band."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.common.report import Run, smooth

Groups = Mapping[str, Sequence[Run]]
"""The runs of each method, one a seed."""


def mean_and_spread(values: Sequence[float]) -> dict[str, float | None]:
    """The mean, and the standard deviation of a sample; None for a single value."""
    spread = stdev(values) if len(values) > 1 else None
    return {"mean": mean(values), "spread": spread}


def written(values: Sequence[float], digits: int = 2) -> str:
    """The mean and the spread for a table: `90.12 ± 0.34`, or `90.12` of one value."""
    found = mean_and_spread(values)
    shown = f"{found['mean']:.{digits}f}"
    if found["spread"] is not None:
        shown += f" ± {found['spread']:.{digits}f}"
    return shown


def curves(groups: Groups, score: str, score_name: str) -> tuple[Figure, str]:
    """The training loss beside a score that validations put on record.

    Args:
      groups: what is compared; the runs of a group log the same steps.
      score: the key of the score in the records.
      score_name: what its axis says.

    Returns:
      The figure and its caption.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for method, runs in groups.items():
        losses = [run.series("loss") for run in runs]
        _band(left, [(steps, smooth(values)) for steps, values in losses], method)
        _band(right, [run.series(score) for run in runs], method, marker="o", ms=3)
    left.set(xlabel="step", ylabel="loss", title="training, smoothed")
    right.set(xlabel="step", ylabel=score_name, title="validation")
    # Below: a legend in the axes would hide curves that reach all its corners.
    figure.legend(
        *right.get_legend_handles_labels(), loc="outside lower center", ncols=4
    )
    return figure, (
        "Loss of the training batches (moving average) and score on the validation set:"
        " mean over the seeds, the band from the lowest to the highest."
    )


def scores(
    values: Mapping[str, Sequence[float]],
    published: Mapping[str, Mapping[str, float]],
    score_name: str,
    constant: float | None = None,
) -> tuple[Figure, str]:
    """A row a method: every seed, their mean, and what papers report.

    Args:
      values: of each method, one a seed.
      published: what each source reports of each method, in the unit of the values.
        Methods that are not in `values` are left out.
      score_name: what the axis says.
      constant: the best score of an answer that is always the same, to be marked.

    Returns:
      The figure and its caption.
    """
    figure, axes = plt.subplots(
        figsize=(8, 1.6 + 0.5 * len(values)), layout="constrained"
    )
    rows = {method: row for row, method in enumerate(values)}
    for method, row in rows.items():
        found = values[method]
        first = row == 0
        label = "a seed, here" if first else None
        axes.plot(found, [row] * len(found), "o", color="C0", alpha=0.4, label=label)
        label = "mean, here" if first else None
        axes.plot(mean(found), row, "|", color="C0", ms=16, mew=2, label=label)
    for index, (source, reported) in enumerate(published.items(), start=1):
        known = {rows[m]: value for m, value in reported.items() if m in rows}
        axes.plot(
            list(known.values()),
            list(known),
            "DsX^"[index % 4],
            color=f"C{index}",
            mfc="none",
            label=source,
        )
    if constant is not None:
        axes.axvline(constant, color="gray", ls=":", label="always the same answer")
    axes.set(xlabel=score_name)
    axes.set_yticks(list(rows.values()), list(rows))
    axes.margins(y=0.5 / max(1, len(rows)))
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=2)
    text = "Score of each seed, and the mean."
    if published:
        text += (
            " Hollow marks are the papers' own figures, of their models and data: they"
            " were not measured here."
        )
    return figure, text


def _band(
    axes: Axes, series: Sequence[tuple[list[int], list[float]]], label: str, **style
) -> None:
    steps = series[0][0]
    values = np.array([values for _, values in series])
    (line,) = axes.plot(steps, values.mean(axis=0), label=label, **style)
    if len(series) > 1 and math.isfinite(values.sum()):
        low, high = values.min(axis=0), values.max(axis=0)
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, lw=0)
