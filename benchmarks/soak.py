"""What a hundred thousand steps of every optimizer come to, and what they leave.

    python -m benchmarks.soak

Parameters go towards a target; the loss is their squared distance from it, relative to
that of the start, and its gradients have noise. The learning rate is constant for half
of the steps and then falls in a line to nothing, so that the noise averages out and the
loss goes to its floor, zero. All steps of an optimizer are one program, in float32. The
optimizers are those of `benchmarks.faults`; matrices of those that keep bytes are large
enough for that. What the record has of as many steps is not done again.
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import lowrank_optax as lro
from benchmarks import faults
from benchmarks.record import RECORDS, about, known_figures, write_record
from examples.common.report import markdown_table

Shapes = dict[str, tuple[int, ...]]
Figures = dict[str, Any]

SMALL = {"q_proj": (8, 12), "up_proj": (12, 8), "bias": (12,)}
# Moments and bases of fewer than 4,096 numbers are not stored in bytes.
LARGE = {"q_proj": (128, 136), "bias": (12,)}
_LOOKS = 100  # at the state, evenly over the steps
FLOOR = 1e-3


@dataclass(frozen=True)
class Settings:
    """Many steps of every optimizer, and what they leave."""

    steps: int = 100_000
    """Of each optimizer; a multiple of 100."""
    rate: float = 0.01
    """The learning rate of the first half."""
    noise: float = 0.5
    """Standard deviation of the gradients' noise; that of the target is 1."""
    period: int = 50
    """Steps between refreshes."""
    seed: int = 0
    """Of target and noise."""
    only: str = ""
    """A regular expression: optimizers of such names."""
    minutes: float = 600.0
    """Ends after the optimizer that crosses it; 0 writes what is there."""
    out: Path = RECORDS
    """Directory of the record."""


def cases(settings: Settings) -> dict[str, tuple[Any, Shapes]]:
    """By name: each optimizer, and the shapes of its parameters."""
    middle = settings.steps // 2
    rate = optax.linear_schedule(settings.rate, 0.0, settings.steps - middle, middle)

    def made(rank):
        common = faults.Settings(rank=rank, period=settings.period)
        return faults.optimizers(common, rate)

    small, large = made(3), made(32)
    return {
        name: (large[name], LARGE) if "8bit" in name else (tx, SMALL)
        for name, tx in small.items()
    }


def soak(tx: Any, shapes: Shapes, settings: Settings) -> dict[str, np.ndarray]:
    """What is seen at each look, and the counters at the end."""
    target, noise = jax.random.split(jax.random.key(settings.seed))

    def normal(key):
        keys = jax.random.split(key, len(shapes))
        pairs = zip(shapes.items(), keys, strict=True)
        return {name: jax.random.normal(k, shape) for (name, shape), k in pairs}

    aim = normal(target)

    def step(carry, count):
        params, state = carry
        spread = normal(jax.random.fold_in(noise, count))
        grads = jax.tree.map(
            lambda p, a, e: p - a + settings.noise * e, params, aim, spread
        )
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def look(carry, counts):
        carry, _ = jax.lax.scan(step, carry, counts)
        return carry, seen(*carry, aim)

    @jax.jit
    def run(counts):
        params = jax.tree.map(jnp.zeros_like, aim)
        (_, state), rows = jax.lax.scan(look, (params, tx.init(params)), counts)
        return rows, state

    rows, state = run(jnp.arange(settings.steps).reshape(_LOOKS, -1))
    return jax.device_get(rows) | {"counters": counters(state)}


def seen(params: Any, state: Any, aim: Any) -> dict[str, jax.Array]:
    """Of parameters and state at one moment."""
    away = jax.tree.map(jnp.subtract, params, aim)
    floats = [
        x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    everything = [*floats, *jax.tree.leaves(params)]
    return {
        "loss": optax.tree.norm(away, squared=True)
        / optax.tree.norm(aim, squared=True),
        "finite": jnp.stack([jnp.isfinite(x).all() for x in everything]).all(),
        "skew": faults.skew(state),
        "sizes": jnp.stack(
            [jnp.sqrt(jnp.mean(x**2)) for x in floats if x.ndim > 1] or [jnp.ones([])]
        ),
    }


def counters(state: Any) -> np.ndarray:
    """All counts of steps. That of an accumulation starts anew, and is not one."""

    def is_window(x):
        return isinstance(x, lro.AccumulateState)

    state = jax.tree.map(
        lambda x: x.inner_state if is_window(x) else x, state, is_leaf=is_window
    )
    found = [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(state)
        if jax.tree_util.keystr(path[-1:], simple=True) in ("count", "step")
    ]
    return np.array(found)


def figures(rows: dict[str, np.ndarray], settings: Settings, seconds: float) -> Figures:
    """What the record says of one optimizer."""
    tenth = _LOOKS // 10
    before, after = (
        np.sqrt(np.mean(np.square(rows["sizes"][part], dtype=np.float64), axis=0))
        for part in (slice(4 * tenth, 5 * tenth), slice(-tenth, None))
    )
    still = np.where(after > 0, np.inf, 1.0)  # what was zero and stays so
    ratio = np.divide(after, before, out=still, where=before > 0)
    return {
        "steps": settings.steps,
        "middle": float(np.mean(rows["loss"][4 * tenth : 5 * tenth])),
        "loss": float(rows["loss"][-1]),
        "skew": float(np.max(rows["skew"])),
        "smallest": float(np.min(ratio)),
        "largest": float(np.max(ratio)),
        "finite": bool(np.all(rows["finite"])),
        "counted": bool(np.all(rows["counters"] == settings.steps)),
        "seconds": round(seconds),
    }


def troubles(found: Figures) -> list[str]:
    """What is not as it should be of one optimizer."""
    checks = {
        "not finite": not found["finite"],
        "counters are wrong": not found["counted"],
        "bases are not orthonormal": found["skew"] > 1e-4,
        "the loss is above its floor": not found["loss"] < FLOOR,
        "the state drifts": not (0.5 < found["smallest"] <= found["largest"] < 2),
    }
    return [what for what, is_so in checks.items() if is_so]


def page(found: dict[str, Figures]) -> str:
    """The record for people."""
    rows = [
        [
            name,
            f"{x['steps']:,}",
            f"{x['middle']:.1e}",
            f"{x['loss']:.1e}",
            f"{x['skew']:.0e}",
            f"{x['smallest']:.2f} to {x['largest']:.2f}",
            "; ".join(troubles(x)),
        ]
        for name, x in found.items()
    ]
    header = ["optimizer", "steps", "loss, middle", "loss, end", "skew", "state"]
    total = sum(x["steps"] for x in found.values())
    bad = sum(bool(troubles(x)) for x in found.values())
    return "\n\n".join(
        (
            about(__doc__),
            f"{len(found)} optimizers, {total:,} steps; {bad} with trouble. The loss "
            "at the middle is the mean over the fifth tenth of the steps. Skew is the "
            f"largest difference of any basis' Gram matrix, at {_LOOKS} looks, from "
            "that of orthonormal or zero columns; state, the root mean square of any "
            "moment or basis over the last tenth of the looks, by that over the fifth, "
            "at least and at most. All numbers were finite and all counters right "
            "where nothing is said.",
            markdown_table([*header, "trouble"], rows),
        )
    )


def main(settings: Settings) -> None:
    """Runs what is missing until the time is up, and writes the record as it goes."""
    began, known = time.monotonic(), known_figures("soak", settings.out)
    for name, (tx, shapes) in cases(settings).items():
        if known.get(name, {}).get("steps") == settings.steps:
            continue
        if not re.search(settings.only, name):
            continue
        if time.monotonic() - began >= 60 * settings.minutes:
            break
        start = time.monotonic()
        rows = soak(tx, shapes, settings)
        known[name] = figures(rows, settings, time.monotonic() - start)
        print(name, known[name], flush=True)
        write_record("soak", settings, known, page(known), settings.out)
    write_record("soak", settings, known, page(known), settings.out)
    if bad := {name: troubles(x) for name, x in known.items() if troubles(x)}:
        raise SystemExit(f"Trouble with {bad}.")


if __name__ == "__main__":
    main(tyro.cli(Settings))
