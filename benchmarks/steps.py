"""Step time, compile time and memory of the methods beside Optax's, in one run.

    python -m benchmarks.steps

Update and application to the 56 matrices of LLaMA-60M, float32, with donated buffers.
The methods take turns, one step each, so that what else the machine does meets all of
them; a ratio is that of two medians of the same rounds. Where there are bases, all of
them are found at the first step (reported on its own as the refresh, the median of a
few from the same state) and at none of the others.
"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from tqdm import tqdm

import lowrank_optax as lro
from benchmarks.record import RECORDS, write_record

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

_NEVER = 1_000_000_000  # between two refreshes
_LR = 1e-3


@dataclass(frozen=True)
class Settings:
    """What an optimizer's step costs."""

    methods: tuple[str, ...] = ()
    """Some of the methods; default all of them."""
    rounds: int = 24
    """Steps of each method that are timed."""
    refreshes: int = 3
    """Refreshes of each method that are timed."""
    layers: int = 8
    """Layers of seven matrices each."""
    out: Path | None = None
    """Directory of the record; default benchmarks/records."""


def matrices(layers: int) -> dict[str, Any]:
    """Shapes of the linear kernels of LLaMA-60M."""
    shapes = {name: (512, 512) for name in ("q", "k", "v", "o")}
    shapes |= {"gate": (512, 1376), "up": (512, 1376), "down": (1376, 512)}
    return {f"layer{i}": shapes for i in range(layers)}


class NaiveState(NamedTuple):
    """Factors as torch originals keep them."""

    count: jax.Array
    mu: Any
    nu: Any


def naive_mlorc(rank: int = 4) -> optax.GradientTransformation:
    """MLorc-AdamW as written down: dense moments, QR and SVD of each matrix."""

    def init(params):
        def factors(p):
            return jnp.zeros((p.shape[0], rank)), jnp.zeros((rank, p.shape[1]))

        mu, nu = (jax.tree.map(factors, params) for _ in range(2))
        return NaiveState(jnp.zeros([], jnp.int32), mu, nu)

    def compress(key, a):
        q, _ = jnp.linalg.qr(a @ jax.random.normal(key, (a.shape[1], rank)))
        u, s, vt = jnp.linalg.svd(q.T @ a, full_matrices=False)
        return q @ u * s, vt

    def update(updates, state, params=None):
        leaves, treedef = jax.tree.flatten(updates)
        count = state.count + 1
        keys = jax.random.split(jax.random.key(0), len(leaves))
        out, mus, nus = [], [], []
        states = zip(*(treedef.flatten_up_to(x) for x in state[1:]), strict=True)
        for key, g, (mu, nu) in zip(keys, leaves, states, strict=True):
            v = nu[0] @ nu[1]
            zeta = -jnp.sum(jnp.minimum(v, 0)) / jnp.maximum(jnp.sum(v < 0), 1)
            m = 0.8 * (mu[0] @ mu[1]) + 0.2 * g
            v = 0.999 * jnp.where(v < 0, zeta, v) + 0.001 * g**2
            m_hat, v_hat = m / (1 - 0.8**count), v / (1 - 0.999**count)
            out.append(m_hat / (jnp.sqrt(v_hat) + 1e-8))
            mus.append(compress(key, m))
            nus.append(compress(key, v))
        new = NaiveState(count, treedef.unflatten(mus), treedef.unflatten(nus))
        return treedef.unflatten(out), new

    scale = optax.scale_by_learning_rate(_LR)
    return optax.chain(optax.GradientTransformation(init, update), scale)


def _galore(method: str) -> optax.GradientTransformation:
    return lro.galore_adamw(
        _LR, rank=128, update_every=_NEVER, subspace=lro.TopSingular(method)
    )


METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "optax.adamw": lambda: optax.adamw(_LR),
    "optax.lion": lambda: optax.lion(_LR),
    "optax.contrib.muon": lambda: optax.contrib.muon(_LR),
    "optax.contrib.galore r=128": lambda: optax.contrib.galore(
        _LR, rank=128, update_proj_gap=_NEVER
    ),
    "MLorc-AdamW r=4, naive": naive_mlorc,
    "mlorc_adamw r=4": lambda: lro.mlorc_adamw(_LR, rank=4),
    "mlorc_lion r=4": lambda: lro.mlorc_lion(_LR, rank=4),
    "galore_adamw r=128, svd": functools.partial(_galore, "svd"),
    "galore_adamw r=128, gram_eigh": functools.partial(_galore, "gram_eigh"),
    "galore_adamw r=128, subspace_iteration": functools.partial(
        _galore, "subspace_iteration"
    ),
}


@dataclass
class Contender:
    """A compiled step with what it works on."""

    step: Any
    start: Any
    params: Any
    state: Any
    facts: dict[str, Any]
    times: list[float]

    def run(self, grads: Any) -> float:
        start = time.perf_counter()
        self.params, self.state = self.step(self.params, self.state, grads)
        jax.block_until_ready(self.params)
        return time.perf_counter() - start


def enter(name: str, params: Any, grads: Any) -> Contender:
    tx = METHODS[name]()

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    began = time.perf_counter()
    compiled = jitted.lower(params, state, grads).compile()
    facts = {
        "compile_s": time.perf_counter() - began,
        "temporaries_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
    }
    mine = jax.tree.map(jnp.copy, params)
    return Contender(compiled, state, mine, _copy(state), facts, [])


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def main(settings: Settings) -> None:
    """Time all methods and write the record."""
    rng = np.random.default_rng(0)

    def normal(shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    def is_shape(x):
        return isinstance(x, tuple)

    shapes = matrices(settings.layers)
    params = jax.tree.map(lambda s: normal(s, 0.02), shapes, is_leaf=is_shape)
    grads = [jax.tree.map(normal, shapes, is_leaf=is_shape) for _ in range(2)]

    names = settings.methods or tuple(METHODS)
    contenders = {}
    for name in tqdm(names, desc="compile"):
        contenders[name] = enter(name, params, grads[0])
    for contender in tqdm(contenders.values(), desc="first steps"):
        firsts = []
        for _ in range(settings.refreshes):
            contender.state = _copy(contender.start)
            firsts.append(contender.run(grads[0]))
        contender.facts["first_step_s"] = statistics.median(firsts)
        contender.run(grads[1])
    for i in tqdm(range(settings.rounds), desc="rounds"):
        for contender in contenders.values():
            contender.times.append(contender.run(grads[i % 2]))

    figures = {}
    for name, contender in contenders.items():
        times = np.array(contender.times)
        figures[name] = contender.facts | {
            "step_s": float(np.median(times)),
            "p99_s": float(np.quantile(times, 0.99)),
        }
    base = figures.get("optax.adamw", next(iter(figures.values())))["step_s"]
    rows = [
        "| method | step, ms | / adamw | p99, ms | first step, ms | compile, s "
        "| temporaries, MiB | state, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, x in figures.items():
        x["ratio"] = x["step_s"] / base
        rows.append(
            f"| {name} | {1e3 * x['step_s']:.1f} | {x['ratio']:.2f} "
            f"| {1e3 * x['p99_s']:.1f} | {1e3 * x['first_step_s']:.1f} "
            f"| {x['compile_s']:.1f} | {x['temporaries_bytes'] / 2**20:.1f} "
            f"| {x['state_bytes'] / 2**20:.1f} |"
        )
    write_record("steps", settings, figures, "\n".join(rows), settings.out)
    plot(figures, (settings.out or RECORDS) / "steps.png")


def plot(figures: dict[str, Any], path: Path) -> None:
    """Bars of step time, compile time and temporaries."""
    names = list(figures)[::-1]
    panels = {
        "step / optax.adamw": [figures[n]["ratio"] for n in names],
        "compile time, s": [figures[n]["compile_s"] for n in names],
        "temporaries, MiB": [figures[n]["temporaries_bytes"] / 2**20 for n in names],
    }
    height = 1.2 + 0.35 * len(names)
    figure, axes = pyplot.subplots(1, 3, figsize=(12, height), sharey=True)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        bars = axis.barh(names, values, color="tab:blue")
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.set_xlabel(title)
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Settings))
