"""Losses of the methods on real text and on a task, from the records."""

from typing import Any

import matplotlib.pyplot as plt

from benchmarks.record import interval
from tables.plots import Plot
from tables.records import made_on, record, repository, rows

Methods = dict[str, dict[str, Any]]
"""Rank, losses by seed and bytes of the matrices' state of each method."""


def _groups() -> dict[str, Methods]:
    """The methods by kind of comparison; one that is not begun is left out."""
    found = record("comparison")["figures"]
    groups = {"Equal rank": "equal_rank", "Equal bytes": "equal_bytes"}
    return {title: found[key] for title, key in groups.items() if found[key]}


def _from_adamw(methods: Methods, name: str) -> tuple[float, float] | None:
    """A method's loss minus AdamW's, by seed: the mean and half of its interval."""
    reference = _groups()["Equal rank"]["adamw"]["losses"]
    losses = methods[name]["losses"]
    if name == "adamw" or len(losses) < 2:
        return None
    return interval([losses[seed] - reference[seed] for seed in losses])


def comparison() -> str:
    """Methods tuned and compared on real text."""
    found = record("comparison")
    settings = found["settings"]
    address = f"{repository()}/blob/main/benchmarks/records/comparison.md"
    parts = []
    for title, methods in _groups().items():
        lines = []
        for name, x in methods.items():
            mean, half = interval(list(x["losses"].values()))
            difference = _from_adamw(methods, name)
            lines.append(
                (
                    f"`{name}`",
                    str(x["rank"] or ""),
                    f"{mean:.3f} ± {half:.3f}",
                    f"{difference[0]:+.3f} ± {difference[1]:.3f}" if difference else "",
                    f"{x['matrix_state_bytes'] / 1024:,.0f}",
                )
            )
        head = (
            *("", "rank", "validation loss", "minus that of `adamw`"),
            "state of matrices, KiB",
        )
        parts += [f"**{title}.**\n", rows(head, lines, figures=True) + "\n"]
    parts.append(
        f"{made_on(found['machine'])} Model {settings['model']}, {settings['steps']} "
        f"steps of {settings['batch_size']} x {settings['seq_len']} tokens of the "
        f"Python standard library, subspaces every {settings['update_every']} steps; "
        "five seeds; ± is half of the 95% confidence interval, of differences that are "
        f"paired by seed. How the rates were chosen is in the [record]({address}). At "
        "equal bytes, the rank is that with which the state of the matrices is nearest "
        "to GaLore's, and the model's width at most; LDAdam's error alone is more, and "
        "of AdaRankGrad the largest rank is chosen.\n"
    )
    return "\n".join(parts)


def task() -> str:
    """Fine-tuning a pre-trained encoder."""
    found = record("mrpc")
    figures = found["figures"]
    lines = []
    for name, x in figures["methods"].items():
        f1 = {seed: 100 * y["f1"] for seed, y in x["scores"].items()}
        mean, half = interval(list(f1.values()))
        difference = ""
        if name != "adamw":
            middle, around = interval(f1_minus(figures, name, "adamw"))
            difference = f"{middle:+.2f} ± {around:.2f}"
        lines.append(
            (
                f"`{name}`",
                str(x["rank"] or ""),
                f"{x['rate']:g}",
                f"{mean:.2f} ± {half:.2f}",
                difference,
                f"{x['matrix_state_bytes'] / 2**10:,.0f}",
            )
        )
    head = (
        *("", "rank", "rate of matrices", "F1, %", "minus that of `adamw`"),
        "state of matrices, KiB",
    )
    full = figures["methods"]["adamw"]
    seeds, dense = len(full["scores"]), full["dense_rate"]
    about = (
        f"{made_on(found['machine'])} {figures['setup']}; {seeds} seeds. ± is half of "
        "the 95% confidence interval, of differences that are paired by seed. All else "
        f"is trained at {dense:g}, tuned with `adamw`; each rate of matrices is the "
        "best of a ladder on a seed of its own. Always the same answer has "
        f"{100 * figures['constant_answer']:.2f}.\n"
    )
    return "\n".join([rows(head, lines, figures=True), "", about])


def f1_minus(figures: Any, method: str, other: str) -> list[float]:
    """F1 of a method minus another's, in percent, seed by seed."""
    own, base = (figures["methods"][x]["scores"] for x in (method, other))
    return [100 * (own[s]["f1"] - base[s]["f1"]) for s in own if s in base]


# How the moments of a method are kept; those of all others are of full rank.
_PROJECTED = ("galore", "i3s", "fira", "golore", "apollo", "flora", "ldadam", "adarank")
_COMPRESSED = ("mlorc", "adamw_8bit")


def _color(name: str) -> str:
    if name.startswith(_COMPRESSED):
        return "#d9772b"
    is_projected = name.removeprefix("q_").startswith(_PROJECTED)
    return "#2f7fc1" if is_projected else "#8a929b"


def plot() -> Plot:
    """Loss minus AdamW's at equal rank, from the most bytes of state to the fewest."""
    methods = _groups().get("Equal rank", {})
    order = sorted(methods, key=lambda name: methods[name]["matrix_state_bytes"])

    def draw(axes: plt.Axes) -> None:
        labels = []
        for place, name in enumerate(order):
            mean, half = _from_adamw(methods, name) or (0.0, 0.0)
            color = _color(name)
            axes.errorbar(mean, place, xerr=half, fmt="o", ms=5, capsize=3, color=color)
            kib = methods[name]["matrix_state_bytes"] / 1024
            labels.append(f"{name}, {kib:,.0f}")
        axes.axvline(0, ls=":", lw=1, color="#8a929b", zorder=0)
        axes.set_yticks(range(len(order)), labels)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("validation loss minus AdamW's")

    return Plot("loss_by_bytes", draw, (4.6, 5.4))
