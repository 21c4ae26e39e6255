"""How far the subspaces of GaLore and of I3S move while a LLaMA is trained.

    python -m examples.llama.subspaces
    python -m examples.llama.subspaces --model llama_60m --data hf:allenai/c4

Each time that the bases are chosen anew it compares them with the ones before and with
the first ones (the paper's Figures 1, 2 and 4a), and in the end it takes the singular
values of what training added to each matrix, in the whole run or in its last steps
(Figure 4b). Writes overlap.csv, singular_values.csv and subspaces.png.
"""

import csv
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from examples.common.command import refused
from examples.common.files import aside
from examples.common.lock import is_free, sole_use
from examples.common.settings import RUNS
from examples.llama.pretrain import Job, Pretrain, prepare
from lowrank_optax import diagnostics

METHODS = ("galore_adamw", "i3s_adamw")

Row = dict[str, Any]


@dataclass(frozen=True)
class Subspaces:
    """Train with GaLore and with I3S at equal rank; compare how their subspaces move.

    Writes the figures as CSV and a plot.
    """

    model: str = "tiny"
    """Name of a file in examples/llama/configs, or path of a Hugging Face
    config.json."""
    data: str = "stdlib"
    """Text: stdlib, path:FILE_OR_DIR, hf:OWNER/NAME or auto."""
    out: Path | None = None
    """Directory to write to, new or empty. Default: runs/ and the date."""
    steps: int = 300
    """Optimizer steps of each method."""
    update_every: int = 10
    """Steps between two choices of the subspace."""
    rank: int = 32
    """Rank of both methods."""
    batch_size: int = 8
    """Sequences in a batch."""
    seq_len: int = 128
    """Tokens in a sequence."""
    seed: int = 0
    """Seed of the initial weights and of the order of the batches."""
    window: int | None = None
    """Steps, the last ones, of which the singular values are taken; the paper's are
    2000. Default: all."""


def layer_type(path: jax.tree_util.KeyPath) -> str:
    """The module that a kernel belongs to, such as `up_proj`.

    >>> from jax.tree_util import DictKey
    >>> layer_type((DictKey("self_attn"), DictKey("q_proj"), DictKey("kernel")))
    'q_proj'
    """
    return str(getattr(path[-2], "key", path[-2]))


def mean_by_type(values: Any) -> dict[str, np.ndarray]:
    """The mean over the leaves of each layer type."""
    found = defaultdict(list)
    for path, value in jax.tree_util.tree_leaves_with_path(values):
        found[layer_type(path)].append(np.asarray(value))
    return {name: np.mean(stack, axis=0) for name, stack in found.items()}


@jax.jit
def overlaps(bases: Any, others: Any) -> Any:
    """The overlap of each basis with its counterpart."""
    return jax.tree.map(diagnostics.subspace_overlap, bases, others)


def spectra(change: Any, bases: Any) -> Any:
    """Singular values over the largest, of the leaves that have a basis."""
    kept = dict(jax.tree_util.tree_leaves_with_path(change))

    def spectrum(path: jax.tree_util.KeyPath, _: jax.Array) -> jax.Array:
        s = jnp.linalg.svd(kept[path], compute_uv=False)
        return s / s[0]

    return jax.tree_util.tree_map_with_path(spectrum, bases)


def follow(
    job: Job, method: str, window: int | None = None
) -> tuple[list[Row], list[Row]]:
    """Trains with one method; the rows of overlap.csv and of singular_values.csv, these
    of what the last steps added, so many as the window has; all if None."""
    task, tx, s = job.task, job.optimizer(method), job.settings
    params = start = task.init()
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(task.loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    rows, first, last = [], None, None
    with tqdm(range(s.steps), desc=method, dynamic_ncols=True) as bar:
        for done in bar:
            if window is not None and done == s.steps - window:
                start = params
            params, state, loss = step(params, state, task.batch(done))
            if done % s.update_every:
                continue
            bar.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
            found = optax.tree.get_all_with_path(state, "basis")
            (bases,) = (x for _, x in found if jax.tree.leaves(x))  # of matrices
            if first is None or last is None:
                first = last = bases
                continue
            before = mean_by_type(overlaps(bases, last))
            begin = mean_by_type(overlaps(bases, first))
            rows += [
                {
                    "method": method,
                    "step": done,
                    "layer": name,
                    "adjacent": float(before[name]),
                    "first": float(begin[name]),
                }
                for name in before
            ]
            last = bases
    change = jax.tree.map(jnp.subtract, params, start)
    values = [
        {"method": method, "layer": name, "index": index, "value": float(value)}
        for name, spectrum in mean_by_type(spectra(change, last)).items()
        for index, value in enumerate(spectrum)
    ]
    return rows, values


def draw(rows: list[Row], values: list[Row], window: int | None = None) -> Figure:
    """Plots the tables: the mean over the layer types in bold, each type thin."""
    figure, panels = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    (before, layers), (begin, spectrum) = panels
    _compare(before, rows, "step", "adjacent")
    before.set(title="overlap with the subspace before")
    for layer, points in _lines(rows, METHODS[0], "step", "adjacent").items():
        layers.plot(*points, label=layer)
    layers.set(title=f"the same of {METHODS[0]}, by layer")
    _compare(begin, rows, "step", "first")
    begin.set(title="overlap with the first subspace")
    for axes in (before, layers, begin):
        axes.set(xlabel="step", ylim=(0, 1))
    _compare(spectrum, values, "index", "value")
    added = "the run" if window is None else f"its last {window} steps"
    spectrum.set(
        xlabel="index",
        ylabel="singular value / largest",
        yscale="log",
        ylim=(1e-4, 1.2),
        title=f"what {added} added to the weights",
    )
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=2)
    return figure


def _compare(axes: Axes, rows: list[Row], x: str, y: str) -> None:
    for color, method in zip(("C0", "C1"), METHODS, strict=True):
        everything = defaultdict(list)
        for points in _lines(rows, method, x, y).values():
            axes.plot(*points, color=color, alpha=0.25, lw=0.8)
            for at, value in zip(*points, strict=True):
                everything[at].append(value)
        mean = [np.mean(found) for found in everything.values()]
        axes.plot(list(everything), mean, color=color, lw=2, label=method)


def _lines(
    rows: list[Row], method: str, x: str, y: str
) -> dict[str, tuple[list[float], list[float]]]:
    """The points of one method, by layer type."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        if row["method"] == method:
            xs, ys = lines.setdefault(row["layer"], ([], []))
            xs.append(row[x])
            ys.append(row[y])
    return lines


def write_csv(path: Path, rows: list[Row]) -> None:
    with aside(path) as draft, draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def compare(job: Job, window: int | None = None) -> list[Path]:
    """Trains with both methods, prints what was found and writes the files."""
    rows, values = [], []
    for method in METHODS:
        for table, part in zip(
            (rows, values), follow(job, method, window), strict=True
        ):
            table += part
    names = ("overlap.csv", "singular_values.csv", "subspaces.png")
    paths = [job.out / name for name in names]
    write_csv(paths[0], rows)
    write_csv(paths[1], values)
    figure = draw(rows, values, window)
    with aside(paths[2]) as draft:
        figure.savefig(draft, format="png", dpi=150)
    plt.close(figure)
    last = max(row["step"] for row in rows)
    for method in METHODS:
        end = [r for r in rows if r["method"] == method and r["step"] > last / 2]
        adjacent = np.mean([row["adjacent"] for row in end])
        begin = np.mean([row["first"] for row in end])
        print(
            f"{method}: overlap in the second half {adjacent:.3f} with the subspace"
            f" before, {begin:.3f} with the first"
        )
    return paths


def prepared(given: Subspaces) -> Job:
    """The job of these settings; writes nothing.

    Raises:
      ValueError, OSError: settings, model or text that cannot be used.
    """
    out = given.out or RUNS / f"subspaces-{time.strftime('%Y%m%d-%H%M%S')}"
    if given.steps <= given.update_every:
        raise ValueError(
            f"Cannot compare subspaces over {given.steps} steps: only one is chosen"
            f" in {given.update_every}. Raise --steps."
        )
    if given.window is not None and not 1 <= given.window <= given.steps:
        raise ValueError(
            f"Cannot take a window of {given.window} steps out of {given.steps}."
        )
    if not is_free(out):
        raise ValueError(f"Cannot write to {out}: it is not empty.")
    settings = Pretrain(
        model=given.model,
        methods=METHODS,
        data=given.data,
        steps=given.steps,
        batch_size=given.batch_size,
        seq_len=given.seq_len,
        rank=given.rank,
        update_every=given.update_every,
        seed=given.seed,
    )
    return prepare(settings, out)


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison; returns the exit status: 0, or 2 for bad input."""
    given = tyro.cli(Subspaces, args=sys.argv[1:] if argv is None else argv)
    with ExitStack() as stack:
        try:
            job = prepared(given)
            stack.enter_context(sole_use(job.out, resumed=False))
        except (ValueError, OSError, MemoryError) as error:
            return refused("subspaces", error)
        try:
            paths = compare(job, given.window)
        except OSError as error:
            return refused("subspaces", error)
    for path in paths:
        print(f"  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
