"""How far subspaces move, and how many directions the last steps added: I3S's figures.

    python -m benchmarks.subspaces

Runs `examples.llama.subspaces` and keeps its means: the overlap of the bases of GaLore
and of I3S with the ones before and with the first ones (the paper's Figures 1, 2 and
4a), and of what the last steps added to the weights how many singular values exceed a
tenth of the largest (Figure 4b). (Two minutes of a core.)
"""

import os
from dataclasses import replace
from statistics import fmean
from typing import Any

import tyro

from benchmarks.record import RECORDS, write_record
from examples.common.files import aside
from examples.llama import subspaces

_SHARE = 0.1  # of the largest singular value


SETTINGS = subspaces.Subspaces(
    steps=500, update_every=20, seq_len=64, seed=1000, window=100
)


def figures(
    rows: list[subspaces.Row], values: list[subspaces.Row]
) -> dict[str, dict[str, float]]:
    """Of each method the means over layer types, of overlaps in the second half."""
    last = max(row["step"] for row in rows)
    found = {}
    for method in subspaces.METHODS:
        late = [r for r in rows if r["method"] == method and 2 * r["step"] > last]
        own = [r for r in values if r["method"] == method]
        types = {row["layer"] for row in own}
        found[method] = {
            "adjacent": fmean(row["adjacent"] for row in late),
            "first": fmean(row["first"] for row in late),
            "large": sum(row["value"] > _SHARE for row in own) / len(types),
        }
    return found


def main(settings: subspaces.Subspaces) -> None:
    directory = settings.out or RECORDS
    directory.mkdir(parents=True, exist_ok=True)
    job = subspaces.prepared(replace(settings, out=directory / "none"))
    rows: list[Any] = []
    values: list[Any] = []
    for method in subspaces.METHODS:
        for table, part in zip(
            (rows, values), subspaces.follow(job, method, settings.window), strict=True
        ):
            table += part
    figure = subspaces.draw(rows, values, settings.window)
    with aside(directory / "subspaces.png") as draft:
        figure.savefig(draft, format="png", dpi=100)
    found = figures(rows, values)
    lines = [
        f"{settings.steps} steps of {settings.model}, rank {settings.rank}, subspaces"
        f" every {settings.update_every}, seed {settings.seed}. Overlaps are means over"
        " layer types and the second half of the run; of the singular values of what"
        f" the last {settings.window} steps added, those above {_SHARE:g} of the"
        " largest are counted, mean over layer types.",
        "",
        "| method | overlap with the one before | with the first | large values |",
        "|---|---:|---:|---:|",
    ]
    for method, x in found.items():
        cells = f"{x['adjacent']:.3f} | {x['first']:.3f} | {x['large']:.1f}"
        lines.append(f"| {method} | {cells} |")
    lines += ["", "![Overlaps along the run, and singular values](subspaces.png)"]
    write_record("subspaces", settings, found, "\n".join(lines), settings.out)


if __name__ == "__main__":
    # Before the first computation: one core, as several sessions share a machine.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    main(tyro.cli(subspaces.Subspaces, default=SETTINGS))
