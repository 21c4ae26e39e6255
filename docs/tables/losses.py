"""Losses of the methods on real text and on a task, from the records."""

import statistics
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt

from tables.plots import Plot
from tables.records import made_on, record, rows

SUPERSEDED = """\
:::{warning}
**These figures are superseded.** In these runs one learning rate was tuned for matrices
and all other leaves together. Methods with a `scale` so gave embedding and head four
times the rate of the matrices, and the others the same one: part of the difference may
be that of the embedding's rate, and not of the method. The comparison is being made
again with a rate of its own for each. Until its record is here, draw no ranking from
this table.
:::
"""


def _groups() -> tuple[dict[str, dict[str, dict]], bool]:
    """Rank, losses and bytes of each method by kind of comparison; whether it is old.

    Bytes are of the whole state in the old record, of the matrices' in the new one.
    """
    found = record("comparison")["figures"]
    if "methods" not in found:
        groups = {"Equal rank": "equal_rank", "Equal bytes": "equal_bytes"}
        return {title: found[key] for title, key in groups.items()}, False

    def one(method: dict[str, Any]) -> dict[str, Any]:
        trials = method["trials"]
        return {
            "rank": method["rank"],
            "losses": {x["seed"]: x["validation_loss"] for x in trials},
            "matrix_state_bytes": statistics.fmean(
                x["mean_state_bytes"] for x in trials
            ),
        }

    old = {name: one(method) for name, method in found["methods"].items()}
    return {"Equal rank": old}, True


def _spread(losses: dict[Any, float]) -> tuple[float, float]:
    values = list(losses.values())
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), deviation


def comparison() -> str:
    """Methods tuned and compared on real text."""
    groups, old = _groups()
    found = record("comparison")
    settings = found["settings"]
    parts = [SUPERSEDED] if old else []
    state = "state, KiB" if old else "state of matrices, KiB"
    for title, methods in groups.items():
        lines = []
        for name, x in methods.items():
            mean, deviation = _spread(x["losses"])
            lines.append(
                (
                    f"`{name}`",
                    str(x["rank"] or ""),
                    str(len(x["losses"])),
                    f"{mean:.3f} ± {deviation:.3f}",
                    f"{x['matrix_state_bytes'] / 1024:,.0f}",
                )
            )
        head = ("", "rank", "seeds", "validation loss", state)
        parts += [f"**{title}.**\n"] if len(groups) > 1 else []
        parts.append(rows(head, lines, figures=True) + "\n")
    parts.append(
        f"{made_on(found['machine'])} Model {settings['model']}, {settings['steps']} "
        f"steps of {settings['batch_size']} x {settings['seq_len']} tokens of the "
        f"Python standard library, subspaces every {settings['update_every']} steps; "
        "mean and standard deviation over the seeds. How the rates were chosen is in "
        "`benchmarks/records/comparison.md`.\n"
    )
    return "\n".join(parts)


def task() -> str:
    """Fine-tuning a pre-trained encoder."""
    found = record("mrpc")
    lines = []
    for name, run in found["runs"].items():
        f1 = run["scores"]["f1"]
        method, comma, note = name.partition(",")
        lines.append(
            (
                f"`{method}`{comma}{note}",
                str(run["rank"] or ""),
                f"{run['learning_rate']:g}",
                f"{100 * f1['mean']:.2f} ± {100 * f1['spread']:.2f}",
                f"{run['matrix_state_bytes'] / 2**20:.2f}",
            )
        )
    head = ("", "rank", "learning rate", "F1, %", "state of matrices, MiB")
    constant = 100 * found["constant_answer"]["f1"]
    about = (
        f"MRPC, {found['steps']} steps from {found['model']['source']}, three seeds; "
        f"always the same answer has {constant:.2f}.\n"
    )
    return "\n".join([rows(head, lines, figures=True), "", about])


def plot() -> Plot:
    """Loss against bytes of state, at equal rank."""
    groups, old = _groups()

    def draw(axes: plt.Axes) -> None:
        methods = groups["Equal rank"].items()
        for (name, x), mark in zip(methods, cycle("os^vD<>pXh*"), strict=False):
            mean, deviation = _spread(x["losses"])
            size = x["matrix_state_bytes"] / 2**20
            axes.errorbar(
                size, mean, 2 * deviation, fmt=mark, ms=6, capsize=3, label=name
            )
        of = "" if old else " of the matrices"
        axes.set_xlabel(f"optimizer state{of}, MiB")
        axes.set_ylabel("validation loss" + (", superseded" if old else ""))
        axes.legend(fontsize=8, frameon=False, bbox_to_anchor=(1, 1))

    return Plot("loss_by_bytes", draw, (7.5, 4.2))
