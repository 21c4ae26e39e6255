"""What one bad gradient does: every optimizer, kinds of faults, moments of a run.

    python -m benchmarks.faults

One leaf's gradient is spoiled once; ordinary ones follow. A cell is the largest norm
of that leaf's updates from then on, in multiples of what it is in the run without the
fault: over a matrix of queries, one of an MLP, a bias and an embedding, and over four
moments of the run. The spoiled step itself does not count where the gradient is not
finite: what it gives is the caller's to refuse (`optax.apply_if_finite`). A mark says
what is wrong, if anything is. Written to ``benchmarks/records/faults.md``.
"""

import argparse
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from benchmarks.record import write_record

Grads = dict[str, jax.Array]
Norms = list[dict[str, float]]

SHAPES = {"q_proj": (48, 96), "up_proj": (96, 48), "bias": (96,), "embed": (64, 48)}


def _entry(x: jax.Array) -> Any:
    return x.at[(3,) * x.ndim]


FAULTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "NaN": lambda x: _entry(x).set(jnp.nan),
    "Inf": lambda x: _entry(x).set(jnp.inf),
    "1e19": lambda x: _entry(x).set(1e19),
    "an entry by 1e6": lambda x: _entry(x).multiply(1e6),
    "a row by 1e4": lambda x: x.at[3].multiply(1e4),
    "a row by 1e6": lambda x: x.at[3].multiply(1e6),
    "all by 1e4": lambda x: 1e4 * x,
    "zero": jnp.zeros_like,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long the runs are.

    Attributes:
      rank: of all methods.
      period: steps between refreshes.
      after: steps that follow the last fault.
      seed: of the gradients.
    """

    rank: int = 8
    period: int = 10
    after: int = 30
    seed: int = 0

    @property
    def moments(self) -> dict[str, int]:
        """The steps of the faults."""
        t = self.period
        return {"first": 0, "between": t + 4, "last": 2 * t - 1, "refresh": 2 * t}


def optimizers(settings: Settings) -> dict[str, optax.GradientTransformation]:
    """Every whole optimizer of the library, and Optax's to compare with."""
    wanted = {"rank": settings.rank, "max_rank": settings.rank, "num_heads": 4}
    wanted |= {"update_every": settings.period, "switch_step": 25}
    found: dict[str, optax.GradientTransformation] = {
        "optax.adamw": optax.adamw(1e-3),
        "optax.lion": optax.lion(1e-3),
    }
    for name in sorted(lro.__all__):
        factory = getattr(lro, name)
        known = inspect.signature(factory).parameters if callable(factory) else {}
        if next(iter(known), None) == "learning_rate":
            given = {k: v for k, v in wanted.items() if k in known}
            found[name] = factory(1e-3, **given)
    return found


def gradients(settings: Settings) -> list[Grads]:
    """A signal of few directions that turns slowly, in noise."""
    rng = np.random.default_rng(settings.seed)
    starts, ends = ({k: _signal(rng, s) for k, s in SHAPES.items()} for _ in range(2))

    def at(step):
        turn = step / 40
        return {
            k: jnp.asarray(
                np.cos(turn) * starts[k]
                + np.sin(turn) * ends[k]
                + 0.5 * rng.standard_normal(shape),
                jnp.float32,
            )
            for k, shape in SHAPES.items()
        }

    return [at(t) for t in range(2 * settings.period + settings.after + 1)]


def _signal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return rng.standard_normal(shape)
    sides = (rng.standard_normal((size, 6)) for size in shape)
    left, right = sides
    return left * 2.0 ** -np.arange(6) @ right.T


def run(
    tx: optax.GradientTransformation,
    grads: list[Grads],
    when: int = -1,
    leaf: str = "",
    fault: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> tuple[Norms, Any]:
    """The norms of all updates, and the last state."""
    params = {k: jnp.full(s, 0.1) for k, s in SHAPES.items()}
    state, norms = tx.init(params), []
    for step, g in enumerate(grads):
        given = g | {leaf: fault(g[leaf])} if step == when else g
        size, state = _step(tx)(given, state, params)
        norms.append(size)
    return jax.device_get(norms), state


@functools.cache
def _step(tx: optax.GradientTransformation) -> Callable[..., Any]:
    @jax.jit
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(jnp.linalg.norm, updates), state

    return step


def worst(usual: Norms, norms: Norms, when: int, leaf: str, finite: bool) -> float:
    """The largest update of the leaf since the fault, in multiples of the usual."""
    since = when if finite else when + 1
    pairs = zip(norms[since:], usual[since:], strict=True)
    ratios = [float(x[leaf] / y[leaf]) for x, y in pairs]
    return max(ratios) if np.isfinite(ratios).all() else np.inf


def is_finite(tree: Any) -> bool:
    """Whether all numbers of a tree are finite."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return all(bool(jnp.isfinite(x).all()) for x in floats)


def figures(settings: Settings, only: str) -> dict[str, dict[str, dict[str, float]]]:
    """By optimizer and fault: the worst ratio, and how many states were spoiled."""
    grads, found = gradients(settings), {}
    for name, tx in optimizers(settings).items():
        if not re.search(only, name):
            continue
        usual, _ = run(tx, grads)
        found[name] = {}
        for label, fault in FAULTS.items():
            ratios, bad = [], 0
            for leaf in SHAPES:
                finite = is_finite(fault(grads[0][leaf]))
                for when in settings.moments.values():
                    norms, state = run(tx, grads, when, leaf, fault)
                    ratios.append(worst(usual, norms, when, leaf, finite))
                    bad += not is_finite(state)
            found[name][label] = {"worst": max(ratios), "spoiled": bad}
        print(
            name, {k: round(x["worst"], 2) for k, x in found[name].items()}, flush=True
        )
    return found


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The record in Markdown."""

    def cell(x):
        text = f"{x['worst']:.1f}" if x["worst"] < 1e3 else f"{x['worst']:.0e}"
        return text + (f" ({x['spoiled']} states)" if x["spoiled"] else "")

    assert __doc__
    lines = [
        "# One bad gradient",
        "",
        __doc__.partition("\n\n")[2].partition("\n\n")[2].strip(),
        "",
        "| | " + " | ".join(FAULTS) + " |",
        "|---" * (1 + len(FAULTS)) + "|",
    ]
    lines += [
        f"| {name} | " + " | ".join(cell(x) for x in row.values()) + " |"
        for name, row in found.items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a regular expression of names")
    only = parser.parse_args().only
    settings = Settings()
    found = figures(settings, only)
    if not only:
        write_record("faults", settings, found, table(found))


if __name__ == "__main__":
    main()
