"""What an update cannot do without: its parts alone, beside the whole, in one run.

    python -m benchmarks.floors

The 56 matrices of LLaMA-60M in float32. Each part is compiled alone and reads what it
would read in the update; all take turns. Their sum is what the update would take if
there were nothing else in it, and if no part could use what another one has in cache.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from tqdm import tqdm

from benchmarks.record import write_record
from benchmarks.steps import enter, matrices, methods
from lowrank_optax._src import linalg
from lowrank_optax._src.engines.order import Order
from lowrank_optax._src.linalg import random
from lowrank_optax._src.parts.best_codes import best_codes
from lowrank_optax._src.parts.factors import (
    LowRankCode,
    clamp_negative,
    low_rank_product,
    negative_mean,
)


@dataclass(frozen=True)
class Settings:
    """The floors of MLorc's updates and of GaLore's refresh."""

    rounds: int = 25
    """Times that each part is run."""
    layers: int = 8
    """Layers of seven matrices each."""
    out: Path | None = None
    """Directory of the record; default benchmarks/records."""


Run = Callable[[], Any]


def normal(seed: int, *shape: int) -> jax.Array:
    return random.normal(jax.random.key(seed), shape, jnp.float32)


def compiled(function: Callable[..., Any], *lists: Any) -> Run:
    """The function on the first of each list, the second of each, and so on."""
    step = jax.jit(lambda *lists: [function(*x) for x in zip(*lists, strict=True)])
    return lambda: step(*lists)


def parts_of_mlorc(shapes: list[tuple[int, int]]) -> dict[str, dict[str, Run]]:
    """By optimizer and name, what runs a part once; rank 4, sketches of width 8."""
    grads = [normal(i, m, n) for i, (m, n) in enumerate(shapes)]
    codes = [LowRankCode(normal(1, m, 4), normal(2, 4, n)) for m, n in shapes]
    rights = [normal(3, n, 8) for _, n in shapes]
    lefts = [normal(4, m, 8) for m, _ in shapes]
    weights = [[x + 1 for x in grads]]  # replaced at each update

    def second(g, code):
        kept = clamp_negative(low_rank_product(code), jnp.full([], 0.1))
        return 0.999 * kept + 0.001 * g**2

    def adam(p, g, code):
        m = 0.8 * low_rank_product(code) + 0.2 * g
        return p - 1e-3 * m / (jnp.sqrt(second(g, code)) + 1e-8)

    def lion(p, g, code):
        return p - 1e-3 * jnp.sign(0.9 * low_rank_product(code) + 0.1 * g)

    def in_place(function):
        step = jax.jit(
            lambda *lists: [function(*x) for x in zip(*lists, strict=True)],
            donate_argnums=0,
        )

        def run():
            weights[0] = step(weights[0], grads, codes)
            return weights[0]

        return run

    def products(make):
        """Of what is made of each gradient in turn, from the right and the left."""

        @jax.jit
        def step(*lists):
            order, out = Order(), []
            for g, code, w in zip(*lists, strict=True):
                # What is thin waits for the last one: a gradient would be copied.
                code, w = order.start((code, w))
                a = make(g, code)
                y = linalg.sketch(a, w)
                out.append((y, linalg.project(y, a)))
                order.end(out[-1][1])
            return out

        return partial(step, grads, codes, rights)

    # As the library has them: the shorter side first, one stack for each shape.
    def short_first(code):
        m, n = code.left.shape[0], code.right.shape[1]
        return code if m <= n else code.mT

    stacks: dict[Any, list[Any]] = {}
    for shape, code, y, w in zip(shapes, codes, lefts, rights, strict=True):
        pair = short_first(code), short_first(LowRankCode(y, w.T))
        stacks.setdefault(tuple(sorted(shape)), []).append(pair)
    together = [jax.tree.map(lambda *x: jnp.stack(x), *x) for x in stacks.values()]
    small = compiled(
        lambda pair: best_codes([tuple(pair[1])], [pair[0]], None, None),
        together,
    )
    of_grads = products(lambda g, _: g)
    return {
        "mlorc_adamw r=4": {
            "weights updated from factors and gradient": in_place(adam),
            "two products of width 8 with the gradient": of_grads,
            "second moment formed, two products with it": products(second),
            "zeta": compiled(lambda pair: negative_mean(*pair[0]), together),
            "small factorizations of both moments": lambda: [small(), small()],
        },
        "mlorc_lion r=4": {
            "weights updated from factors and gradient": in_place(lion),
            "two products of width 8 with the gradient": of_grads,
            "small factorizations": small,
        },
    }


def parts_of_a_refresh(shapes: list[tuple[int, int]]) -> dict[str, Run]:
    """Of GaLore's at rank 128, whose sketches have 8 columns more."""
    size = 128 + 8
    grads = [normal(i, m, n) for i, (m, n) in enumerate(shapes)]
    grads = [g if g.shape[0] <= g.shape[1] else g.T for g in grads]
    lefts, rights = ([normal(1, g.shape[i], size) for g in grads] for i in (0, 1))

    def rotated(q, b):
        vectors = linalg.eigh(linalg.matmul(b, b.mT))[1][:, :128]
        return linalg.matmul(q, vectors)

    twice = compiled(
        lambda a, q, w: (linalg.sketch(a, w), linalg.sketch(a.mT, q)),
        grads,
        lefts,
        rights,
    )
    return {
        "four products of width 136 with the gradient": lambda: [twice(), twice()],
        "two Cholesky passes, one orthonormalization": compiled(
            lambda q, w: (
                linalg.cholesky_pass_each([q]),
                linalg.cholesky_pass_each([w]),
                linalg.orthonormalize(q),
            ),
            lefts,
            rights,
        ),
        "rotation to the singular vectors": compiled(
            rotated, lefts, [w.T for w in rights]
        ),
        "random matrices": compiled(
            lambda key, w: random.normal(key, w.shape, w.dtype),
            list(jax.random.split(jax.random.key(0), len(rights))),  # or all are one
            rights,
        ),
    }


def main(settings: Settings) -> None:
    """Run everything in turns and write the record."""
    shapes = matrices("60m", settings.layers)
    flat = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
    params = {str(i): normal(i, *shape) for i, shape in enumerate(flat)}
    peers = {"mlorc_adamw r=4": "optax.adamw", "mlorc_lion r=4": "optax.lion"}
    galore = "galore_adamw r=128"
    known = methods("60m")
    wholes = {
        name: enter(known[name](), params, params)
        for name in (*peers, *peers.values(), galore)
    }
    parts = parts_of_mlorc(flat)
    refresh = parts_of_a_refresh(flat)

    def timed(run: Run) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    def refreshed() -> float:
        wholes[galore].rewind()
        return wholes[galore].run(params)

    tasks: dict[tuple[str, str], Callable[[], float]] = {}
    for name, whole in wholes.items():
        tasks[name, "step"] = partial(whole.run, params)
    tasks[galore, "refresh"] = refreshed
    for name, own in (parts | {galore: refresh}).items():
        tasks |= {(name, part): partial(timed, run) for part, run in own.items()}
    times: dict[tuple[str, str], list[float]] = {task: [] for task in tasks}
    for i in tqdm(range(settings.rounds + 2), desc="rounds"):
        for task, run in tasks.items():
            seconds = run()
            if i > 1:  # the first ones warm up
                times[task].append(seconds)

    median = {task: 1e3 * statistics.median(x) for task, x in times.items()}
    rows = ["| | ms | share of the peer's step |", "|---|---|---|"]

    def row(name, ms, base):
        rows.append(f"| {name} | {ms:.1f} | {ms / base:.2f} |")

    for name, peer in peers.items():
        base = median[peer, "step"]
        row(f"**{peer}**", base, base)
        row(f"**{name}**", median[name, "step"], base)
        for part in parts[name]:
            row(part, median[name, part], base)
        row("the parts together", sum(median[name, x] for x in parts[name]), base)
    base = median[galore, "step"]
    row(f"**{galore}**, a step", base, base)
    row("**with a refresh**", median[galore, "refresh"], base)
    for part in refresh:
        row(part, median[galore, part], base)
    total = base + sum(median[galore, x] for x in refresh)
    row("a step and the parts", total, base)
    figures = {" / ".join(task): ms / 1e3 for task, ms in median.items()}
    write_record("floors", settings, figures, "\n".join(rows), settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings))
