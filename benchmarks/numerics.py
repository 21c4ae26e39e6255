"""How far updates are from those in float64, by method, tier, dtype and condition.

    python -m benchmarks.numerics

Each optimizer runs twice on the same gradients, once in float64. These are products of
random orthonormal bases, with singular values from one down to one by the condition
number in a geometric sequence, of bases that turn a little from step to step. The error
is that of the way from the start, of all steps together, relative to its norm, in the
worst of the shapes. Gradients in bfloat16 are rounded first, so that both runs see the
same ones; what is counted is the arithmetic, and that updates are given back in
bfloat16. Optimizers are those of `benchmarks.faults`; kernels are interpreted, those of
GPU and of TPU, for the methods that have any. AdaRankGrad's moments are too small here
to be kept in bytes. What the record has is not done again.

Where a float32 run of MLorc-AdamW or of a Lion stands out, it is by a single entry of
one matrix. `Hybrid` draws others of singular vectors whose values are below rounding.
"""

import contextlib
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import faults
from benchmarks.record import RECORDS, about, known_figures, write_record
from examples.common.files import aside
from examples.common.report import STYLE, markdown_table
from lowrank_optax._src.kernels.dispatch import interpreted

# Wide enough for moments of rank 8 to be kept in bytes.
SHAPES = {"wide": (32, 512), "tall": (512, 32), "square": (64, 64), "q_proj": (48, 96)}
TIERS = {
    "XLA": contextlib.nullcontext,
    "GPU": lambda: interpreted("cuda"),
    "TPU": lambda: interpreted("tpu"),
}
# That have kernels.
_KERNELS = "^(mlorc_adamw|adamw_8bit)$"
_PLOT = "numerics.png"

Errors = dict[str, dict[str, float]]  # by dtype, and by condition number


@dataclass(frozen=True)
class Settings:
    """How far updates are from those in float64."""

    steps: int = 6
    """Of each run."""
    period: int = 3
    """Steps between refreshes."""
    rank: int = 8
    """Of all methods."""
    conditions: tuple[float, ...] = (1e1, 1e2, 1e4, 1e6)
    """Condition numbers of the gradients."""
    seed: int = 0
    """Of the gradients."""
    only: str = ""
    """A regular expression: optimizers of such names."""
    minutes: float = 600.0
    """Ends after the run that crosses it; 0 writes what is there."""
    out: Path = RECORDS
    """Directory of the record."""


def gradients(settings: Settings, condition: float, dtype: Any) -> Any:
    """Of all steps, in one array a leaf: float64, of numbers that the dtype has."""
    rng = np.random.default_rng(settings.seed)

    def of(shape):
        rank = min(shape)
        values = float(condition) ** -np.linspace(0, 1, rank)
        left, right = (rng.standard_normal((size, rank)) for size in shape)
        made = []
        for _ in range(settings.steps):
            left, right = (
                x + 0.05 * rng.standard_normal(x.shape) for x in (left, right)
            )
            u, v = np.linalg.qr(left)[0], np.linalg.qr(right)[0]
            made.append((u * values) @ v.T)
        return np.stack(made).astype(dtype).astype(np.float64)

    return {name: of(shape) for name, shape in SHAPES.items()}


def way(tx: optax.GradientTransformation, dtype: Any) -> Any:
    """A compiled run: the sum of the updates, from the gradients of all steps."""

    @jax.jit
    def run(grads):
        params = {name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}

        def step(carry, grad):
            state, moved = carry
            grad = jax.tree.map(lambda g: g.astype(dtype), grad)
            updates, state = tx.update(grad, state, params)
            moved = jax.tree.map(lambda m, u: m + u.astype(m.dtype), moved, updates)
            return (state, moved), None

        start = jax.tree.map(jnp.zeros_like, jax.tree.map(lambda g: g[0], grads))
        (_, moved), _ = jax.lax.scan(step, (tx.init(params), start), grads)
        return moved

    return run


def errors(name: str, tier: str, settings: Settings) -> Errors:
    """Of one optimizer in one tier."""
    common = faults.Settings(rank=settings.rank, period=settings.period)
    tx, found = faults.optimizers(common)[name], {}
    with jax.enable_x64(True):
        exact = way(tx, jnp.float64)
    for dtype in (jnp.float32, jnp.bfloat16):
        run, column = way(tx, dtype), {}
        for condition in settings.conditions:
            grads = gradients(settings, condition, dtype)
            with jax.enable_x64(True):
                wanted = jax.device_get(exact(grads))
            with TIERS[tier]():
                got = jax.device_get(run(jax.tree.map(np.float32, grads)))
            column[f"{condition:.0e}"] = max(
                float(np.linalg.norm(got[k] - wanted[k]) / np.linalg.norm(wanted[k]))
                for k in SHAPES
            )
        found[jnp.dtype(dtype).name] = column
    return found


def cases(settings: Settings) -> list[tuple[str, str]]:
    """Optimizers and tiers."""
    common = faults.Settings(rank=settings.rank, period=settings.period)
    return [
        (name, tier)
        for name in faults.optimizers(common)
        for tier in TIERS
        if tier == "XLA" or re.search(_KERNELS, name)
    ]


def page(found: dict[str, Errors]) -> str:
    """The record for people."""
    some = next(iter(found.values()), {})
    header = ["optimizer, tier"]
    header += [f"{dtype}, {c}" for dtype, column in some.items() for c in column]
    rows = [
        [name, *(f"{e:.1e}" for column in x.values() for e in column.values())]
        for name, x in found.items()
    ]
    return "\n\n".join(
        (
            about(__doc__),
            markdown_table(header, rows),
            f"![Errors by condition]({_PLOT})",
        )
    )


def plot(found: dict[str, Errors], path: Path) -> None:
    """Error by condition number, a line an optimizer in XLA, a panel a dtype."""
    dtypes = list(next(iter(found.values())))
    found = {k.removesuffix(", XLA"): x for k, x in found.items() if "XLA" in k}
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(dtypes), figsize=(13, 6), sharey=True, layout="constrained"
        )
        for axes, dtype in zip(panels, dtypes, strict=True):
            for k, (name, x) in enumerate(found.items()):
                conditions = [float(c) for c in x[dtype]]
                marker, color = "os^Dvx"[k // 10 % 6], f"C{k % 10}"
                axes.loglog(
                    conditions,
                    list(x[dtype].values()),
                    marker=marker,
                    color=color,
                    label=name,
                )
            axes.set(xlabel="condition number of the gradient", title=dtype)
        panels[0].set(ylabel="relative error of the way from the start")
        figure.legend(
            *panels[0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=5,
            fontsize=8,
        )
        with aside(path) as draft:
            figure.savefig(draft, format="png")
        plt.close(figure)


def main(settings: Settings) -> None:
    """Measures what is missing until the time is up, and writes the record."""
    began, wanted = time.monotonic(), cases(settings)
    labels = {f"{name}, {tier}" for name, tier in wanted}
    known = known_figures("numerics", settings.out)
    known = {label: x for label, x in known.items() if label in labels}
    for name, tier in wanted:
        label = f"{name}, {tier}"
        if label in known or not re.search(settings.only, name):
            continue
        if time.monotonic() - began >= 60 * settings.minutes:
            break
        known[label] = errors(name, tier, settings)
        write_record("numerics", settings, known, page(known), settings.out)
    write_record("numerics", settings, known, page(known), settings.out)
    plot(known, settings.out / _PLOT)


if __name__ == "__main__":
    main(tyro.cli(Settings))
