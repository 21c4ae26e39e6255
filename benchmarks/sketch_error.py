"""How well MLorc's sketches approximate the moments, on real and on hard gradients.

    python -m benchmarks.sketch_error

For each variant of the `LowRank` codec, both moments are carried through a run as MLorc
does, ``A_t = b decode(code_(t-1)) + (1 - b) X_t``, and the error of the new code is
divided by that of the best rank-r approximation of the same ``A_t``. The ratio's mean
over matrices and steps chose the default of `mlorc_scale_by_adam`. Gradients are those
of the example model on the standard library's text, and synthetic ones whose subspace
turns by as much as its own size at every step.

Beside it, what the arithmetic costs: the error of second moments compressed once, from
a cold start, over that of Algorithm 3 in float64 with the same Omega.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tqdm import tqdm

import lowrank_optax as lro
from benchmarks.record import write_record
from examples.common.data import load_corpus
from examples.common.tokens import tokenize
from examples.llama.config import LlamaConfig
from examples.llama.pretrain import CONFIGS, Job, Pretrain

_B1, _B2 = 0.8, 0.999

VARIANTS = {
    "Gaussian (paper, Algorithm 3)": dict(oversample=0, warm_start=False),
    "Gaussian, 1 power iteration (paper's code)": dict(
        oversample=0, power_iters=1, warm_start=False
    ),
    "warm": dict(oversample=0),
    "warm + 4 columns": dict(oversample=4),
    "warm + 8 columns": dict(oversample=8),
}


@dataclass(frozen=True)
class Settings:
    """Error of MLorc's sketches over the best error of their rank."""

    rank: int = 4
    """Rank of the codes."""
    steps: int = 40
    """Steps of each run."""
    out: Path | None = None
    """Directory of the record; default benchmarks/records."""


def real_gradients(steps: int) -> Iterator[dict[str, jax.Array]]:
    """Gradients of every fifth matrix of the example model along a run of AdamW."""
    settings = Pretrain(batch_size=8)
    config = json.loads((CONFIGS / "tiny.json").read_text())
    corpus = load_corpus("stdlib", hub_bytes=0)
    tokens = tokenize(corpus, config["vocab_size"])
    model = LlamaConfig.from_json(CONFIGS / "tiny.json")
    task = Job(settings, Path(), model, tokens, {}).task
    params = task.init()
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = tx.init(params)

    @jax.jit
    def step(params, state, rows):
        grads = jax.grad(task.loss)(params, rows)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    for i in range(steps):
        params, state, grads = step(params, state, task.batch(i))
        specs = lro.default_matrices(grads)
        chosen = jax.tree.map(lambda g, s: g if s else None, grads, specs)
        flat, _ = jax.tree_util.tree_flatten_with_path(chosen)
        yield {jax.tree_util.keystr(k): g for k, g in flat[::5]}


def turning_gradients(steps: int, noise: float, decay: float) -> Iterator[Any]:
    """Rank-16 gradients whose factors move by `noise` times themselves a step."""
    rng = np.random.default_rng(0)
    shapes = {"256x688": (256, 688), "192x512": (192, 512)}
    factors = {
        k: (rng.normal(size=(m, 16)), rng.normal(size=(16, n)))
        for k, (m, n) in shapes.items()
    }
    for _ in range(steps):
        grads = {}
        for name, (u, v) in factors.items():
            moved = (x + noise * rng.normal(size=x.shape) for x in (u, v))
            u, v = (x / np.sqrt(1 + noise**2) for x in moved)
            factors[name] = u, v
            noise_floor = 0.01 * rng.normal(size=shapes[name])
            grads[name] = jnp.asarray(
                u * decay ** np.arange(16) @ v + noise_floor, jnp.float32
            )
        yield grads


def errors(gradients: Iterator[Any], rank: int, steps: int) -> dict[str, Any]:
    """Mean ratio of each variant's error to the best one, for both moments."""
    codecs = {
        (name, moment): lro.LowRank(rank, nonnegative=moment == "V", **kwargs)
        for name, kwargs in VARIANTS.items()
        for moment in "MV"
    }

    def one(codec, decay, key, x, code):
        a = decay * codec.decode(code) + (1 - decay) * x
        code = codec.encode(key, a, code)
        s = jnp.linalg.svd(a, compute_uv=False)
        best = jnp.sqrt(jnp.sum(s[rank:] ** 2))
        kept = jnp.linalg.norm(a - code.left @ code.right)
        return code, jnp.stack([kept / best, best / jnp.linalg.norm(a)])

    @jax.jit
    def all_variants(key, grad, codes):
        results = {}
        for name, moment in codecs:
            x, decay = (grad, _B1) if moment == "M" else (grad**2, _B2)
            results[name, moment] = one(
                codecs[name, moment], decay, key, x, codes[name, moment]
            )
        return {k: c for k, (c, _) in results.items()}, {
            k: e for k, (_, e) in results.items()
        }

    codes: dict[str, Any] = {}
    ratios = {key: [] for key in codecs}
    for step, grads in enumerate(tqdm(gradients, total=steps)):
        for path, grad in grads.items():
            if grad.shape[0] > grad.shape[1]:
                grad = grad.T
            if path not in codes:
                view = lro.MatrixView(path, grad.shape, grad.dtype, (0,), (1,), ())
                codes[path] = {k: codec.init(view) for k, codec in codecs.items()}
            key = jax.random.key(step)
            codes[path], found = all_variants(key, grad, codes[path])
            for k, e in found.items():
                ratios[k].append(np.asarray(e))
    summary = {}
    for (name, moment), rows in ratios.items():
        ratio, best = np.array(rows).T
        usable = best > 1e-5  # below, the moment is of rank r but for rounding
        summary.setdefault(name, {})[moment] = {
            "mean": float(ratio[usable].mean()),
            "p95": float(np.quantile(ratio[usable], 0.95)),
            "best_relative_error": float(best.mean()),
        }
    return summary


COLD = {
    "sign rows + 4 columns (a cold start)": dict(oversample=4),
    "Gaussian, 8 columns": dict(oversample=4, warm_start=False),
}


def second_moments(steps: int) -> Iterator[np.ndarray]:
    """V of the real gradients after some steps, and ever nearer to a constant."""
    moments: dict[str, Any] = {}
    for grads in real_gradients(steps):
        for path, g in grads.items():
            v = np.asarray(g, np.float64) ** 2
            v = v if v.shape[0] <= v.shape[1] else v.T
            moments[path] = _B2 * moments.get(path, 0) + (1 - _B2) * v
    yield from moments.values()
    noise = np.random.default_rng(0).normal(size=(128, 344))
    yield from (1 + spread * noise for spread in (0.1, 0.01, 0.003, 0.001))


def cold_errors(rank: int, steps: int) -> dict[str, list[dict[str, float]]]:
    """By codec and moment: error over that of exact arithmetic, and the condition."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in COLD}
    codecs = {name: lro.LowRank(rank, True, **kwargs) for name, kwargs in COLD.items()}

    @partial(jax.jit, static_argnums=0)
    def encode(codec, key, x, old):
        code = codec.encode(key, x, old)
        return codec.draw([key], [old], None)[0].mT, code.left, code.right

    for v in second_moments(steps):
        x = jnp.asarray(v, jnp.float32)
        view = lro.MatrixView("", x.shape, x.dtype, (0,), (1,), ())
        for name, codec in codecs.items():
            made = encode(codec, jax.random.key(0), x, codec.init(view))
            a, omega, left, right = (np.asarray(y, np.float64) for y in (x, *made))
            sketch = a @ omega
            q = np.linalg.qr(sketch)[0]
            u, s, vt = np.linalg.svd(q.T @ a, full_matrices=False)
            exact = np.linalg.norm(a - (q @ u[:, :rank] * s[:rank]) @ vt[:rank])
            error = np.linalg.norm(a - left @ right)
            row = {"ratio": error / exact, "condition": np.linalg.cond(sketch)}
            found[name].append({key: float(x) for key, x in row.items()})
    return found


def cold_table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """Figures of the real moments together, of the others one by one."""
    lines = ["", "### V compressed once: error / that of Algorithm 3 in float64", ""]
    lines += ["| sketch | V | condition of the sketch | error / exact |"]
    lines += ["|---|---|---|---|"]
    spreads = ("1 + 0.1 N", "1 + 0.01 N", "1 + 0.003 N", "1 + 0.001 N")
    for name, rows in found.items():
        real, rest = rows[: -len(spreads)], rows[-len(spreads) :]
        most = {key: max(row[key] for row in real) for key in real[0]}
        for what, row in zip(("real, worst", *spreads), (most, *rest), strict=True):
            cells = f"{row['condition']:,.0f} | {row['ratio']:.4f}"
            lines.append(f"| {name} | {what} | {cells} |")
    return lines


def main(settings: Settings) -> None:
    runs = {
        "real: LLaMA tiny on the standard library": real_gradients(settings.steps),
        "synthetic, turning by 1.0 a step, 0.9^k": turning_gradients(
            settings.steps, 1.0, 0.9
        ),
        "synthetic, turning by 3.0 a step, 0.7^k": turning_gradients(
            settings.steps, 3.0, 0.7
        ),
    }
    found: dict[str, Any] = {}
    lines = [
        f"Rank {settings.rank}, {settings.steps} steps: error / best rank-r error."
    ]
    found["cold start"] = cold_errors(settings.rank, settings.steps)
    lines += cold_table(found["cold start"])
    for run, gradients in runs.items():
        found[run] = errors(gradients, settings.rank, settings.steps)
        lines += ["", f"### {run}", "", "| sketch | M mean (p95) | V mean (p95) |"]
        lines += ["|---|---|---|"]
        for name, moments in found[run].items():
            cells = (f"{x['mean']:.3f} ({x['p95']:.3f})" for x in moments.values())
            lines.append(f"| {name} | {' | '.join(cells)} |")
        write_record("sketch_error", settings, found, "\n".join(lines), settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings))
