"""AdaRankGrad's threshold, and when its bases are to be renewed, on real text.

    python -m benchmarks.ranks

Trains the example's model with ranks by each threshold, at fixed intervals as in the
paper's Table 5; leaves that are not matrices at one rate for all. Then, along a run of
the largest rank whose bases are renewed at fixed steps, after how many steps each
criterion of `OnConvergence` would have renewed each matrix. (About 20 minutes of a
core.)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro

import lowrank_optax as lro
from benchmarks.record import RECORDS, write_record
from examples.common.methods import matrices
from examples.common.schedule import warmup_cosine
from examples.common.tokens import Packed
from examples.llama.pretrain import Pretrain, prepare
from lowrank_optax._src.parts.laws import Seen

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

_BATCH, _LENGTH, _VALIDATION_BATCHES = 8, 64, 64

Row = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """Loss, ranks and renewals of AdaRankGrad."""

    steps: int = 500
    """Steps of each run."""
    runs: tuple[tuple[float, int], ...] = (
        (0.48, 50),
        (0.23, 50),
        (0.1, 50),
        (0.23, 20),
        (0.23, 200),
    )
    """Of each run the energy that may be left out, and the steps between renewals."""
    interval: int = 100
    """Steps between renewals of the run on which the criteria are tried."""
    seed: int = 1000
    """Of the initial weights and the order of the batches."""
    rank: int = 32
    """The largest rank."""
    learning_rate: float = 0.03
    """Peak rate of the leaves that are not matrices."""
    scale: float = 0.25
    """Of that, the rate of the matrices."""
    out: Path | None = None
    """Directory of the record; default benchmarks/records."""


class Training:
    """The model and its text, and a step that shares its program among all runs."""

    def __init__(self, settings: Settings):
        self.settings = s = settings
        text = {"steps": s.steps, "batch_size": _BATCH, "seq_len": _LENGTH}
        example = Pretrain(methods=("adamw",), seed=s.seed, **text)
        job = prepare(example, Path("runs/ranks"))
        self.task = job.task
        self.validation = Packed(job.tokens.validation, _LENGTH).fixed_batches(
            _VALIDATION_BATCHES, _BATCH
        )
        self.step = jax.jit(self._step, donate_argnums=(0, 1))

    def optimizer(self, allowed: Any, every: Any) -> optax.GradientTransformation:
        s = self.settings
        method = lro.project_gradients(
            optax.scale_by_adam(),
            rank=s.rank,
            subspace=lro.EnergyRank(1, allowed),
            refresh=lro.Every(every),
            transfer=lro.Rotate(),
            scale=s.scale,
            side="long",
            matrices=matrices,
        )
        rate = optax.scale_by_learning_rate(warmup_cosine(s.learning_rate, s.steps))
        return optax.chain(optax.clip_by_global_norm(1.0), method, rate)

    def _step(self, params, state, batch, allowed, every):
        grads = jax.grad(self.task.loss)(params, batch)
        updates, state = self.optimizer(allowed, every).update(grads, state, params)
        found = jax.tree.map(
            lambda p, g: _seen(p, g), state[1].basis, grads, is_leaf=_is_missing
        )
        return optax.apply_updates(params, updates), state, found

    def run(self, allowed: float, every: int) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Parameters after each step, and what it shows of each matrix."""
        hyper = jnp.float32(allowed), jnp.int32(every)
        params = self.task.init()
        state = self.optimizer(*hyper).init(params)
        for i in range(self.settings.steps):
            batch = self.task.batch(i)
            params, state, found = self.step(params, state, batch, *hyper)
            flat = jax.tree_util.tree_leaves_with_path(found, is_leaf=_is_look)
            names = [
                jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in flat
            ]
            yield params, dict(zip(names, (x for _, x in flat), strict=True))


def _is_missing(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _is_look(x: Any) -> bool:
    return isinstance(x, tuple)


def _seen(basis: Any, grad: jax.Array) -> Any:
    """Used columns, sides, and norms of the projected gradient and the gradient."""
    if _is_missing(basis):
        return basis
    g = grad if len(grad) == len(basis) else grad.T
    used = jnp.sum(jnp.any(basis != 0, axis=0))
    return used, *g.shape, jnp.linalg.norm(basis.T @ g), jnp.linalg.norm(g)


def ranks(training: Training, allowed: float, every: int) -> Row:
    """One run's loss, its mean rank, and its state over GaLore's at the largest one."""
    used, params, found = [], None, {}
    for last in training.run(allowed, every):
        params, found = last
        used.append([float(x[0]) for x in found.values()])
    sides = np.array([sorted(map(int, x[1:3])) for x in found.values()])
    short, long = sides.T
    mean = np.mean(used, axis=0)
    largest = training.settings.rank * (short + 2 * long)
    loss = jax.jit(training.task.loss)
    losses = [float(loss(params, batch)) for batch in training.validation]
    return {
        "loss": float(np.mean(losses)),
        "rank": float(mean.mean()),
        "state": float(np.sum(mean * (long + 2 * short)) / np.sum(largest)),
    }


def ages(looks: list[np.ndarray], rule: lro.OnConvergence) -> list[int]:
    """After how many steps a rule renews each matrix, of looks since a renewal."""
    view = lro.MatrixView("", (len(looks[0]), 2, 2), jnp.float32, (1,), (2,), (0,))
    state, found = rule.init(view, 0.0), np.full(len(looks[0]), len(looks))
    for age, look in enumerate(looks):
        used, m, _, size, whole = map(jnp.asarray, look.T)
        due = rule.due(state, jnp.int32(age)) & (age > 0)
        found = np.where(np.asarray(due), np.minimum(found, age), found)
        seen = Seen(size, whole, used / m, jnp.ones_like(size))
        state = rule.after(state, jnp.full(due.shape, age == 0), seen)
    return [int(x) for x in found]


def looks_of(training: Training) -> list[np.ndarray]:
    """What each step shows of all matrices, along a run of the largest rank."""
    return [
        np.array([[float(x) for x in look] for look in found.values()])
        for _, found in training.run(0.0, training.settings.interval)
    ]


def renewals(looks: list[np.ndarray], every: int) -> dict[str, dict[int, list[int]]]:
    """By criterion and first step of an interval, see `ages`."""
    rules = {
        "share": lro.OnConvergence(0.5, every),
        "norm": lro.OnConvergence(0.77**0.5, every, measure="norm"),
    }
    starts = range(0, len(looks), every)
    return {
        name: {i: ages(looks[i : i + every], rule) for i in starts}
        for name, rule in rules.items()
    }


def plot(
    looks: list[np.ndarray], found: dict[str, Any], every: int, path: Path
) -> None:
    """Shares of the gradients along the run, and where each criterion is met."""
    size, whole = np.array(looks)[..., 3:].transpose(2, 0, 1)
    share = (size / whole) ** 2
    share[::every] = np.nan  # of the gradient that a basis is chosen for
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4), sharey=True)
    for axis, (name, intervals) in zip(axes, found.items(), strict=True):
        axis.plot(share, lw=0.5, alpha=0.5)
        for j in range(share.shape[1]):
            at = [i + x[j] for i, x in intervals.items() if x[j] < every]
            axis.plot(at, share[at, j], "ko", ms=4)
        axis.set_title(f"renewals by the {name}")
        axis.set_xlabel(f"step (bases are renewed every {every})")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of a gradient in the basis")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(settings: Settings) -> None:
    training = Training(settings)
    table = [
        f"{settings.steps} steps, rank at most {settings.rank}, seed {settings.seed}, "
        f"peak rate {settings.learning_rate} and of matrices "
        f"{settings.learning_rate * settings.scale:.4g}.",
        "",
        "| energy left out | renewed every | loss | mean rank | state / GaLore's |",
        "|---|---|---|---|---|",
    ]
    found: dict[str, Any] = {"runs": []}
    for allowed, every in settings.runs:
        row = ranks(training, allowed, every)
        found["runs"].append({"allowed": allowed, "every": every, **row})
        cells = f"{row['loss']:.3f} | {row['rank']:.1f} | {row['state']:.0%}"
        table.append(f"| {allowed} | {every} | {cells} |")
    looks = looks_of(training)
    found["renewals"] = renewals(looks, settings.interval)
    directory = settings.out or RECORDS
    directory.mkdir(parents=True, exist_ok=True)
    plot(looks, found["renewals"], settings.interval, directory / "ranks.png")
    table += ["", "| criterion | from step | renewed after, matrix by matrix |"]
    table += ["|---|---|---|"]
    for name, intervals in found["renewals"].items():
        for start, steps in intervals.items():
            table.append(f"| {name} | {start} | {', '.join(map(str, steps))} |")
    table += ["", "![Shares of the gradient, and renewals](ranks.png)"]
    write_record("ranks", settings, found, "\n".join(table), settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings))
