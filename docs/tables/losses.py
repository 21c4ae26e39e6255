"""Losses of the methods on real text and on a task, from the records."""

import statistics
from itertools import cycle

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


def _figures(trials: list[dict]) -> tuple[float, float, float]:
    """Mean and standard deviation of the loss, and the mean bytes of the state."""
    losses = [x["validation_loss"] for x in trials]
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    state = statistics.fmean(x["mean_state_bytes"] for x in trials)
    return statistics.fmean(losses), spread, state


def superseded(found: dict) -> bool:
    """Whether one rate served all leaves: records since then name that of the rest."""
    methods = found["figures"]["methods"].values()
    return not any("dense" in key for method in methods for key in method)


def comparison() -> str:
    """Methods tuned and compared on real text."""
    found = record("comparison")
    settings = found["settings"]
    lines = []
    for name, method in found["figures"]["methods"].items():
        mean, spread, state = _figures(method["trials"])
        rates = [method["rate"]] + [v for k, v in method.items() if "dense_rate" in k]
        lines.append(
            (
                f"`{name}`",
                str(method["rank"] or ""),
                ", ".join(f"{x:g}" for x in rates),
                f"{mean:.3f} ± {spread:.3f}",
                f"{state / 1024:,.0f}",
            )
        )
    head = ("", "rank", "learning rate", "validation loss", "state, KiB")
    about = (
        f"{made_on(found['machine'])} Model {settings['model']}, {settings['steps']} "
        f"steps of {settings['batch_size']} x {settings['seq_len']} tokens of the "
        f"Python standard library, subspaces every {settings['update_every']} steps, "
        f"seeds {settings['seeds']}: mean and standard deviation. The ladders of rates "
        "are in `benchmarks/records/comparison.md`.\n"
    )
    notice = [SUPERSEDED] if superseded(found) else []
    return "\n".join([*notice, rows(head, lines, figures=True), "", about])


def task() -> str:
    """Fine-tuning a pre-trained encoder."""
    found = record("mrpc")
    lines = []
    for name, run in found["runs"].items():
        f1 = run["scores"]["f1"]
        lines.append(
            (
                f"`{name.partition(',')[0]}`{''.join(name.partition(',')[1:])}",
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
    """Loss against bytes of state."""
    found = record("comparison")

    def draw(axes: plt.Axes) -> None:
        methods = found["figures"]["methods"].items()
        for (name, method), mark in zip(methods, cycle("os^vD<>pXh*")):
            mean, spread, state = _figures(method["trials"])
            axes.errorbar(
                state / 2**20, mean, 2 * spread, fmt=mark, ms=6, capsize=3, label=name
            )
        axes.set_xlabel("optimizer state, MiB")
        axes.set_ylabel("validation loss")
        axes.legend(fontsize=8, frameon=False, bbox_to_anchor=(1, 1))

    return Plot("loss_by_bytes", draw, (7.5, 4.2))
