"""The record of the trials that are there: tables with intervals, and a plot."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.comparison.protocol import METHODS, Missing, Study, Trial
from benchmarks.comparison.trials import VALIDATION_BATCHES, Result, Trainer
from benchmarks.record import interval, write_record, written
from examples.common.files import aside
from examples.common.report import STYLE, markdown_table

Results = Mapping[Trial, Result]
REFERENCES = ("adamw", "galore_adamw")
_PLOT = "comparison.png"


@dataclasses.dataclass(frozen=True)
class Row:
    """What the trials of a method at one rank say.

    Attributes:
      trials: those that count and are there, with their results.
      wanted: how many there will be.
    """

    method: str
    trials: Results
    wanted: int

    @property
    def losses(self) -> dict[int, float]:
        """By seed."""
        return {t.seed: x["validation_loss"] for t, x in self.trials.items()}

    @property
    def used_bytes(self) -> float:
        """Of the state of the matrices, without unused ranks; mean over the run."""
        used = [mean(x["used_state_bytes"]) for x in self.trials.values()]
        return mean(used) - next(iter(self.trials.values()))["dense_state_bytes"]

    def summary(self) -> dict[str, Any]:
        return {
            "rank": next(iter(self.trials)).rank,
            "losses": self.losses,
            "matrix_state_bytes": self.used_bytes,
        }


def differences(row: Row, other: Row) -> list[float]:
    """Of the losses, seed by seed where both are there."""
    return [
        loss - other.losses[seed]
        for seed, loss in row.losses.items()
        if seed in other.losses
    ]


def rows(
    study: Study, results: Results, methods: Sequence[str], same_bytes: bool
) -> dict[str, Row]:
    """Of the methods of which at least one trial that counts is there."""
    found = {}
    for method in methods:
        try:
            wanted = study.counted(method, same_bytes)
        except Missing:
            continue
        there = {trial: results[trial] for trial in wanted if trial in results}
        if there:
            found[method] = Row(method, there, len(wanted))
    return found


def table(found: Mapping[str, Row], references: Mapping[str, Row]) -> str:
    """The rows, with differences to the reference methods."""
    if not found:
        return "None is there yet."
    header = ["method", "rank", "d", "m", "seeds", "validation loss"]
    header += [f"minus {name}" for name in REFERENCES] + ["state of matrices, KiB"]
    lines = []
    for method, row in found.items():
        trial = next(iter(row.trials))
        lines.append(
            [
                method,
                "" if trial.rank is None else str(trial.rank),
                f"{trial.dense_rate:g}",
                f"{trial.rate:g}",
                f"{len(row.trials)} of {row.wanted}",
                written(list(row.losses.values())),
                *(
                    written(differences(row, references[name]), sign="+")
                    if name in references and name != method
                    else ""
                    for name in REFERENCES
                ),
                f"{row.used_bytes / 2**10:,.0f}",
            ]
        )
    return markdown_table(header, lines)


def ladders(study: Study, results: Results, methods: Sequence[str]) -> str:
    """The losses on the tuning seed by rate, those of ladders under way included.

    And whose best rate may not be the best there is, as it is at a ladder's end.
    """
    tuning = [x for x in results if x.seed == study.protocol.tuning_seed]
    lines = []
    for method in methods:
        own = [x for x in tuning if x.method == method]
        for dense in sorted({x.dense_rate for x in own}):
            rungs = sorted(
                (x.rate, results[x]["validation_loss"])
                for x in own
                if x.dense_rate == dense
            )
            shown = ", ".join(f"{rate:g} {loss:.3f}" for rate, loss in rungs)
            lines.append(f"- {method}, d {dense:g}: {shown}")
    if edges := study.at_an_edge(methods):
        rungs = study.protocol.most
        lines += ["", f"Best at an end of {rungs} rates: {', '.join(edges)}."]
    return "\n".join(lines) or "None is there yet."


def plot(panels: Mapping[str, Mapping[str, Row]], path: Path) -> None:
    """Loss against bytes of the matrices' state, with confidence intervals.

    Args:
      panels: by their titles, the rows of each, AdamW among them once it is there.
      path: of the file.
    """
    with plt.rc_context(STYLE):
        figure, all_axes = plt.subplots(
            1, len(panels), figsize=(13, 6), sharey=True, layout="constrained"
        )
        for axes, (title, found) in zip(all_axes, panels.items(), strict=True):
            if "adamw" in found:
                _points(axes, found)
            axes.axhline(0, color="gray", lw=1)
            axes.set(xlabel="optimizer state of the matrices (KiB)", title=title)
        all_axes[0].set(ylabel="validation loss minus AdamW's, seed by seed")
        figure.legend(
            *all_axes[0].get_legend_handles_labels(), loc="outside right", fontsize=8
        )
        with aside(path) as draft:
            figure.savefig(draft, format="png")
        plt.close(figure)


def _points(axes: Any, found: Mapping[str, Row]) -> None:
    """A point a method; those of equal bytes stand beside each other."""
    gap, last = max(row.used_bytes for row in found.values()) / 2**10 / 110, -math.inf
    for row in sorted(found.values(), key=lambda row: row.used_bytes):
        middle, half = interval(differences(row, found["adamw"]))
        last = max(last + gap, row.used_bytes / 2**10)
        style = list(METHODS).index(row.method)
        axes.errorbar(
            last,
            middle,
            yerr=half if math.isfinite(half) else None,
            fmt="os^D"[style // 5],
            color=f"C{style % 10}",
            capsize=2,
            label=row.method,
        )
    axes.set_xlim(left=0)


def write(settings: Any, study: Study, results: Results, trainer: Trainer) -> None:
    """Writes comparison.md, comparison.json and the plot, of whatever is there."""
    out: Path = settings.out
    equal_rank, equal_bytes = (
        rows(study, results, settings.methods, same_bytes)
        for same_bytes in (False, True)
    )
    references = {k: equal_rank[k] for k in REFERENCES if k in equal_rank}
    out.mkdir(parents=True, exist_ok=True)
    panels = {"equal rank": equal_rank, "equal bytes": references | equal_bytes}
    plot(panels, out / _PLOT)
    parts = (
        missing(study, settings.methods),
        about(settings, study, results, trainer),
        "## Equal rank",
        table(equal_rank, references),
        "## Equal bytes",
        "The rank of each method is that with which the state of its matrices is "
        f"nearest to GaLore's at rank {settings.rank}, the rates those of the table "
        "above. No rank is larger than the model's width; LDAdam's error has no rank, "
        "and of AdaRankGrad, the largest rank is what is chosen.",
        table(equal_bytes, references),
        f"![Loss against bytes of the state]({_PLOT})",
        "Points of equal bytes stand beside each other, the leftmost at its place.",
        "## Ladders",
        f"Validation loss by m, seed {study.protocol.tuning_seed}:",
        ladders(study, results, settings.methods),
    )
    figures = {
        "equal_rank": {name: row.summary() for name, row in equal_rank.items()},
        "equal_bytes": {name: row.summary() for name, row in equal_bytes.items()},
    }
    write_record("comparison", settings, figures, "\n\n".join(parts), out)


def about(settings: Any, study: Study, results: Results, trainer: Trainer) -> str:
    """What was run, and what the columns mean."""
    protocol = study.protocol
    return (
        f"{trainer.job.model_fact}; {trainer.setup}; {len(results)} trials of about "
        f"{study.expected(settings.methods)}. d is the learning rate of embedding, "
        "head and norms, tuned once with the method at full rank (AdamW, and Lion for "
        "the two with its signs) and the same for all others; m that of the matrices, "
        "as the method's "
        "`learning_rate`: GaLore and its kind multiply it by their scale, 0.25 "
        "(APOLLO and Flora 1, APOLLO-Mini the root of 128). Each m "
        f"is the best of a ladder on seed {protocol.tuning_seed}; the losses are those "
        f"of seeds {', '.join(map(str, protocol.seeds))} on "
        f"{VALIDATION_BATCHES * settings.batch_size} sequences. ± is half of the 95% "
        "confidence interval of the mean; differences are paired, seed by seed. State: "
        "of the matrices alone, without ranks that are not used, mean over the run."
    )


def missing(study: Study, methods: Sequence[str]) -> str:
    """Whether all of the protocol is there, and else what is not."""
    wanted = list(study.missing(methods))
    if not wanted:
        return "All trials of the protocol are there."
    names = dict.fromkeys(trial.method for trial in wanted)
    return (
        f"**Not complete**: at least {len(wanted)} trials are missing, of "
        f"{', '.join(names)} first. `python -m benchmarks.comparison` goes on."
    )
