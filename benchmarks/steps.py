"""Step time, compile time and memory of the methods beside Optax's, in one run.

    python -m benchmarks.steps
    python -m benchmarks.steps --shapes 7b --layers 1

Update and application to the 56 matrices of LLaMA-60M, or to layers of LLaMA-7B, in
float32 with donated buffers. The methods take turns, one step each, so that what else
the machine does meets all of them; a ratio is that of two medians of the same rounds.
Where there are bases, none is renewed at these steps; but in "staggered", where one
leaf after the other is, along 50 steps. The refresh is a step at which all are, from
the old ones: the median of a few.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from tqdm import tqdm

import lowrank_optax as lro
from benchmarks.record import RECORDS, write_record
from examples.common.methods import METHODS as NAMED

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

_NEVER = 100_000_000  # steps between two refreshes
_LR = 1e-3
_STAGGERED = 50  # steps in which each leaf is refreshed once


@dataclass(frozen=True)
class Settings:
    """What an optimizer's step costs."""

    methods: tuple[str, ...] = ()
    """Some of the methods; default all of them."""
    rounds: int = 60
    """Steps of each method that are timed."""
    refreshes: int = 3
    """Refreshes of each method that are timed."""
    shapes: Literal["60m", "7b"] = "60m"
    """Whose layers."""
    layers: int = 8
    """Layers of seven matrices each."""
    out: Path | None = None
    """Directory of the record; default benchmarks/records."""


_WIDTHS = {"60m": (512, 1376), "7b": (4096, 11008)}
_HEADS = {"60m": 8, "7b": 32}


def matrices(model: str, layers: int) -> dict[str, Any]:
    """Shapes of the linear kernels of a LLaMA."""
    d, hidden = _WIDTHS[model]
    shapes = {f"{name}_proj": (d, d) for name in "qkvo"}
    shapes |= {"gate_proj": (d, hidden), "up_proj": (d, hidden)}
    shapes |= {"down_proj": (hidden, d)}
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


def _named(name: str, heads: int) -> optax.GradientTransformation:
    """A method of the examples, at the paper's rank for models of this width."""
    given = _LR, _rank(name), _NEVER, 0.0
    return NAMED[name].build(*given, heads=(heads, heads), steps=_NEVER)


def _rank(name: str) -> int | None:
    own = NAMED[name].rank
    return 128 if own == 32 else own


def _galore(**parts: Any) -> optax.GradientTransformation:
    method = lro.project_gradients(
        optax.scale_by_adam(),
        **{"rank": 128, "scale": 0.25, "refresh": lro.Every(_NEVER)} | parts,
    )
    return optax.chain(method, optax.scale_by_learning_rate(_LR))


def methods(shapes: str) -> dict[str, Callable[[], optax.GradientTransformation]]:
    """Whatever is compared, by the name in the record."""
    peers = {
        "optax.adamw": lambda: optax.adamw(_LR),
        "optax.lion": lambda: optax.lion(_LR),
        "optax.contrib.muon": lambda: optax.contrib.muon(_LR),
        "optax.contrib.galore r=128": lambda: optax.contrib.galore(
            _LR, rank=128, update_proj_gap=_NEVER
        ),
        "MLorc-AdamW r=4, naive": naive_mlorc,
    }
    own = {
        name + (f" r={_rank(name)}" if _rank(name) else ""): partial(
            _named, name, _HEADS[shapes]
        )
        for name, method in NAMED.items()
        if method.linear is None and name != "adamw"
    }
    refreshes = {
        f"GaLore r=128, {method}": partial(_galore, subspace=lro.TopSingular(method))
        for method in ("svd", "gram_eigh", "subspace_iteration", "warm")
    }
    staggered = partial(_galore, refresh=lro.Staggered(_STAGGERED))
    return peers | own | refreshes | {"GaLore r=128, staggered": staggered}


@dataclass
class Contender:
    """A compiled step with what it works on.

    Attributes:
      step: what is timed.
      params, state: what it is called with next, beside the gradients.
      first_counts: of steps and periods, in the first state, by number of the leaf.
      facts: what is known before the first step.
      times: of the steps.
    """

    step: Any
    params: Any
    state: Any
    first_counts: dict[int, Any]
    facts: dict[str, Any]
    times: list[float]

    def run(self, batch: Any) -> float:
        """One step; how many seconds it took."""
        start = time.perf_counter()
        self.params, self.state = self.step(self.params, self.state, batch)
        jax.block_until_ready(self.params)
        return time.perf_counter() - start

    def rewind(self) -> None:
        """Back to step 0, at which every basis is chosen anew, from the old one."""
        leaves, treedef = jax.tree.flatten(self.state)
        for i, count in self.first_counts.items():
            leaves[i] = jnp.asarray(count)
        self.state = treedef.unflatten(leaves)


def enter(
    tx: optax.GradientTransformation,
    params: Any,
    batch: Any,
    gradient: Callable[[Any, Any], Any] | None = None,
) -> Contender:
    """A method, ready for its first step.

    Args:
      tx: the method.
      params: copied.
      batch: what `gradient` is called with; the gradients themselves without it.
      gradient: of the parameters and a batch.
    """

    def step(params, state, batch):
        grads = batch if gradient is None else gradient(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    counts = {
        i: np.array(x)
        for i, x in enumerate(jax.tree.leaves(state))
        if x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer)
    }
    jitted = jax.jit(step, donate_argnums=(0, 1))
    began = time.perf_counter()
    compiled = jitted.lower(params, state, batch).compile()
    facts = {
        "compile_s": time.perf_counter() - began,
        "temporaries_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
    }
    return Contender(compiled, jax.tree.map(jnp.copy, params), state, counts, facts, [])


def main(settings: Settings) -> None:
    """Time all methods and write the record."""
    rng = np.random.default_rng(0)

    def normal(shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    def is_shape(x):
        return isinstance(x, tuple)

    shapes = matrices(settings.shapes, settings.layers)
    params = jax.tree.map(lambda s: normal(s, 0.02), shapes, is_leaf=is_shape)
    grads = [jax.tree.map(normal, shapes, is_leaf=is_shape) for _ in range(2)]

    known = methods(settings.shapes)
    names = settings.methods or tuple(known)
    contenders = {}
    for name in (bar := tqdm(names)):
        bar.set_description(name)
        contender = contenders[name] = enter(known[name](), params, grads[0])
        contender.facts["first_step_s"] = contender.run(grads[0])
        refreshes = []
        for i in range(settings.refreshes):
            contender.rewind()
            refreshes.append(contender.run(grads[(i + 1) % 2]))
        contender.facts["refresh_s"] = statistics.median(refreshes)
        contender.run(grads[0])
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
        "| method | step, ms | / adamw | p99, ms | refresh, ms | / step "
        "| compile, s | temporaries, MiB | state, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, x in figures.items():
        x["ratio"] = x["step_s"] / base
        rows.append(
            f"| {name} | {1e3 * x['step_s']:.1f} | {x['ratio']:.2f} "
            f"| {1e3 * x['p99_s']:.1f} | {1e3 * x['refresh_s']:.1f} "
            f"| {x['refresh_s'] / x['step_s']:.1f} "
            f"| {x['compile_s']:.1f} | {x['temporaries_bytes'] / 2**20:.1f} "
            f"| {x['state_bytes'] / 2**20:.1f} |"
        )
    name = "steps" if settings.shapes == "60m" else f"steps_{settings.shapes}"
    write_record(name, settings, figures, "\n".join(rows), settings.out)
    plot(figures, (settings.out or RECORDS) / f"{name}.png")


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
        axis.margins(x=0.2, y=0.01)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Settings))
