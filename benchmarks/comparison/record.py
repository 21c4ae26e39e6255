"""The record of the trials that are there: tables with intervals, and a plot."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from scipy.stats import t as student

from benchmarks.comparison.protocol import Missing, Study, Trial, best, dense_rule
from benchmarks.comparison.trials import Result, Trainer
from benchmarks.record import RECORDS, write_record
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


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half of the width of its 95% confidence interval (Student's t)."""
    if len(values) < 2:
        return mean(values), math.inf
    quantile = float(student.ppf(0.975, len(values) - 1))
    return mean(values), quantile * stdev(values) / math.sqrt(len(values))


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
                _written(list(row.losses.values())),
                *(
                    _written(differences(row, references[name]), sign="+")
                    if name in references and name != method
                    else ""
                    for name in REFERENCES
                ),
                f"{row.used_bytes / 2**10:,.0f}",
            ]
        )
    return markdown_table(header, lines)


def _written(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return ""
    middle, half = interval(values)
    return f"{middle:{sign}.3f}" + (f" ± {half:.3f}" if math.isfinite(half) else "")


def ladders(study: Study, methods: Sequence[str]) -> str:
    """The losses by rate of every ladder, those under way included."""
    lines = []
    for rule in dict.fromkeys(dense_rule(method) for method in methods):
        lines.append(_rungs(f"d, by {rule}", lambda m: study.dense_ladder(m), rule))
    for method in methods:
        lines.append(_rungs(f"m of {method}", lambda m: study.rate_ladder(m), method))
    return "\n".join(lines)


def _rungs(name: str, ladder: Any, method: str) -> str:
    try:
        found = ladder(method)
    except Missing:
        return f"- {name}: under way"
    shown = (f"{rate:g} {loss:.3f}" for rate, loss in found.items())
    return f"- {name}: {', '.join(shown)}; best {best(found):g}"


def plot(equal_rank: Mapping[str, Row], equal_bytes: Mapping[str, Row], path: Path):
    """Loss against bytes of the matrices' state, with confidence intervals."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, 2, figsize=(13, 6), sharey=True, layout="constrained"
        )
        for axes, found, title in zip(
            panels,
            (equal_rank, equal_bytes),
            ("equal rank", "equal bytes"),
            strict=True,
        ):
            for index, row in enumerate(found.values()):
                middle, half = interval(list(row.losses.values()))
                axes.errorbar(
                    row.used_bytes / 2**10,
                    middle,
                    yerr=half if math.isfinite(half) else None,
                    fmt="osD^v"[index % 5],
                    color=f"C{index % 10}",
                    capsize=3,
                    label=row.method,
                )
            axes.set(xlabel="optimizer state of the matrices (KiB)", title=title)
            axes.set_xlim(left=0)
        panels[0].set(ylabel="validation loss (nats per token)")
        for axes in panels:
            handles, labels = axes.get_legend_handles_labels()
            if handles:
                axes.legend(handles, labels, fontsize=7, ncols=2)
        with aside(path) as draft:
            figure.savefig(draft, format="png")
        plt.close(figure)


def write(settings: Any, study: Study, results: Results, trainer: Trainer) -> None:
    """Writes comparison.md, comparison.json and the plot, of whatever is there."""
    out: Path = settings.out or RECORDS
    methods, protocol = settings.methods, study.protocol
    equal_rank, equal_bytes = (
        rows(study, results, methods, same_bytes) for same_bytes in (False, True)
    )
    references = {k: equal_rank[k] for k in REFERENCES if k in equal_rank}
    out.mkdir(parents=True, exist_ok=True)
    plot(equal_rank, references | equal_bytes, out / _PLOT)
    seconds = sum(x["seconds"] for x in results.values())
    data = trainer.job.facts["data"]
    seeds = ", ".join(map(str, protocol.seeds))
    parts = (
        missing(study, methods),
        f"{trainer.job.model_fact} on {data['source']} (Python {data['python']}, "
        f"SHA-256 {data['sha256'][:16]}): {trainer.setup}. {len(results)} trials, "
        f"{seconds / 3600:.1f} hours. d is the learning rate of embedding, head and "
        "norms, tuned once with the method at full rank (AdamW, and Lion for the two "
        "with its signs) and the same for all others; m that of the matrices, as the "
        "method's `learning_rate`: GaLore and its kind multiply it by their scale, "
        f"0.25. Each m is the best of a ladder on seed {protocol.tuning_seed}; the "
        f"losses are those of seeds {seeds} on {64 * settings.batch_size} sequences. "
        "± is half of the 95% confidence interval of the mean; differences are "
        "paired, seed by seed. State: of the matrices alone, without ranks that are "
        "not used, mean over the run.",
        "## Equal rank",
        table(equal_rank, references),
        "## Equal bytes",
        "The rank of each method is that with which its whole state is nearest to "
        f"GaLore's at rank {settings.rank}, the rates those of the table above.",
        table(equal_bytes, references),
        f"![Loss against bytes of the state]({_PLOT})",
        "## Ladders",
        f"Validation loss by rate, seed {protocol.tuning_seed}:",
        ladders(study, methods),
    )
    kept = {
        name: {
            method: {
                "rank": next(iter(row.trials)).rank,
                "losses": row.losses,
                "matrix_state_bytes": row.used_bytes,
            }
            for method, row in found.items()
        }
        for name, found in (("equal_rank", equal_rank), ("equal_bytes", equal_bytes))
    }
    write_record("comparison", settings, kept, "\n\n".join(parts), settings.out)


def missing(study: Study, methods: Sequence[str]) -> str:
    """Whether all of the protocol is there, and else what is not."""
    wanted = list(study.missing(methods))
    if not wanted:
        return "All trials of the protocol are there."
    names = dict.fromkeys(trial.method for trial in wanted)
    return (
        f"**Not complete**: at least {len(wanted)} trials are missing, of "
        f"{', '.join(names)}. `python -m benchmarks.comparison` goes on."
    )
