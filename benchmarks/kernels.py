"""The Pallas kernels on layers of LLaMA-7B: tiles, bytes moved, and time.

    python -m benchmarks.kernels

Each kernel is cut into tiles and each method's update lowered for CUDA and TPU, which
needs no device. Bytes are counted from the tiles: what the kernels, and what XLA makes
of the rest of a step, move for each weight, beside the seven words of AdamW (gradient;
weight and both moments read and written). On a GPU or TPU the steps are timed too, in
turns, beside `optax.adamw`.
"""

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import optax
import tyro
from tqdm import tqdm

import lowrank_optax as lro
from benchmarks.record import write_record
from lowrank_optax._src.kernels import int8, mlorc, plan
from lowrank_optax._src.linalg.products import OUTER_MAX_RANK

LAYERS = {"attention": (4096, 4096), "up": (4096, 11008), "down": (11008, 4096)}
PLATFORMS = ("cuda", "tpu")
CALLS = {"cuda": "@__gpu$xla.gpu.triton", "tpu": "@tpu_custom_call"}
WORD = 4
ADAMW = 7 * WORD
# Behind the kernels, XLA reads the gradient (MLorc), or the update that a kernel made
# (8 bits), and reads and writes the weight.
APPLY = 3 * WORD
# Products of factors of a larger rank, of both moments, are written and read there.
PRODUCTS = 4 * WORD
BLOCK = 256


@dataclass(frozen=True)
class Settings:
    """What the kernels are and cost, in float32."""

    ranks: tuple[int, ...] = (4, 128)
    """Ranks of MLorc."""
    rounds: int = 20
    """Steps that are timed, on a device."""
    out: Path | None = None
    """Directory of the record; default benchmarks/records."""


METHODS: dict[str, Callable[[int], optax.GradientTransformation]] = {
    "MLorc-AdamW": lambda r: lro.mlorc_adamw(1e-3, r),
    "8-bit AdamW": lambda r: lro.adamw_8bit(1e-3),
}


def moved(cut: plan.Plan, ins: Sequence[str], outs: Sequence[str], dtype: Any) -> int:
    """Bytes that the tiles of a matrix read and write.

    What is without the axis of the walk stays while that lasts; what is without the
    other one is read again in each walk, on GPU most of it from the cache.
    """
    total = 0
    for axes in [*ins, *outs]:
        size = math.prod(cut.sizes[a] for a in axes) * plan.itemsize(axes, dtype)
        again = cut.over in axes and cut.outer not in axes
        total += size * (cut.steps(cut.outer) if again else 1)
    return total


def cuts(name: str, rank: int, shape: tuple[int, int], platform: str) -> list[Any]:
    """The tiles of each pass of a method: ``(rows, columns, fast bytes, bytes moved)``.

    Of fast memory none are counted where all is in registers.
    """
    m, n = sorted(shape)
    if name == "MLorc-AdamW":
        sizes = {"m": m, "n": n, "r": rank, "l": rank + 4, "1": 1}
        found = []
        for one in (mlorc.SKETCHES, mlorc.PROJECTIONS):
            one = one if shape[0] <= shape[1] else one.turned
            cut = one.plan(platform, sizes, jnp.float32)
            if cut is not None:
                size = moved(cut, one.ins, one.outs, jnp.float32)
                found.append((cut.block["m"], cut.block["n"], cut.bytes, size))
        return found
    rows = int8.rows_at_once(platform, shape[1], BLOCK, jnp.float32)
    size = m * n * (2 * WORD + 4) + m * n // BLOCK * 4 * WORD
    if platform == "cuda":
        return [(rows, BLOCK, 0, size)]
    return [(rows, shape[1], int8.tpu_bytes(rows, shape[1], BLOCK, jnp.float32), size)]


def rest(name: str, rank: int) -> int:
    """Bytes that XLA moves for each weight in what is left of a step."""
    stored = name == "MLorc-AdamW" and rank > OUTER_MAX_RANK
    return APPLY + (PRODUCTS if stored else 0)


def lowered_calls(name: str, rank: int, shape: tuple[int, int], platform: str) -> int:
    """Kernels in the update of one layer, exported for a platform."""
    tx = METHODS[name](rank)
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    allowed = CALLS["cuda"][1:], "LayoutConstraint"
    unchecked = list(map(jax.export.DisabledSafetyCheck.custom_call, allowed))
    with lro.kernels.dispatch("pallas"):
        export = jax.export.export(
            jax.jit(tx.update), platforms=[platform], disabled_checks=unchecked
        )
        text = export(params, jax.eval_shape(tx.init, params), params).mlir_module()
    return text.count(CALLS[platform])


def ranks(name: str, settings: Settings) -> tuple[int, ...]:
    """Those of a method; 0 of one that has none."""
    return settings.ranks if name == "MLorc-AdamW" else (0,)


def count(settings: Settings) -> list[dict[str, Any]]:
    """Tiles and bytes of each method, rank, layer and platform."""
    cases = [
        (name, rank, layer, platform)
        for name in METHODS
        for rank in ranks(name, settings)
        for layer in LAYERS
        for platform in PLATFORMS
    ]
    found = []
    for name, rank, layer, platform in tqdm(cases, desc="lower"):
        shape = LAYERS[layer]
        tiles = cuts(name, rank, shape, platform)
        weights = shape[0] * shape[1]
        per_weight = sum(x[-1] for x in tiles) / weights
        found.append(
            {
                "method": name,
                "rank": rank,
                "layer": layer,
                "platform": platform,
                "kernels": lowered_calls(name, rank, shape, platform),
                "tiles": [x[:2] for x in tiles],
                "fast_memory_bytes": max(x[2] for x in tiles),
                "kernel_bytes_per_weight": per_weight,
                "step_bytes_per_weight": per_weight + rest(name, rank),
                "of_adamw": (per_weight + rest(name, rank)) / ADAMW,
            }
        )
    return found


def time_steps(settings: Settings) -> list[dict[str, Any]]:
    """Median seconds of update and application of one layer of each shape."""
    key = jax.random.key(0)
    params = {k: jax.random.normal(key, s) for k, s in LAYERS.items()}

    def entry(tx, tier):
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        with lro.kernels.dispatch(tier):
            state = jax.jit(tx.init)(params)
            jitted = jax.jit(step, donate_argnums=(0, 1))
            compiled = jitted.lower(params, state, params).compile()
        return [compiled, jax.tree.map(jnp.copy, params), state]

    runs = {("optax.adamw", 0, "xla"): entry(optax.adamw(1e-3), "xla")}
    for name, make in METHODS.items():
        for rank in ranks(name, settings):
            for tier in ("xla", "pallas"):
                runs[name, rank, tier] = entry(make(rank), tier)
    times: dict[Any, list[float]] = {k: [] for k in runs}
    for _ in tqdm(range(settings.rounds + 2), desc="rounds"):
        for k, run in runs.items():
            began = time.perf_counter()
            run[1:] = run[0](run[1], run[2], params)
            jax.block_until_ready(run[1:])
            times[k].append(time.perf_counter() - began)
    return [
        {"method": name, "rank": rank, "tier": tier, "step_s": statistics.median(x[2:])}
        for (name, rank, tier), x in times.items()
    ]


def differences(
    shapes: Mapping[str, tuple[int, int]],
    tiers: Sequence[Callable[[], contextlib.AbstractContextManager[None]]],
    steps: int = 3,
) -> dict[str, float]:
    """Of each method, how far the last updates of two tiers are from each other.

    Relative to their norm, the largest of all matrices, after ``steps`` steps.
    """
    key = iter(jax.random.split(jax.random.key(0), steps * len(shapes)))
    grads = [
        {name: jax.random.normal(next(key), shape) for name, shape in shapes.items()}
        for _ in range(steps)
    ]

    def last(tx, tier):
        with tier():
            update, state = jax.jit(tx.update), jax.jit(tx.init)(grads[0])
            for g in grads:
                found, state = update(g, state, g)
        return found

    def distance(x, y):
        return float(jnp.linalg.norm(x - y) / jnp.linalg.norm(x))

    found = {}
    lion = {"MLorc-Lion": lambda r: lro.mlorc_lion(1e-3, r)}  # its small matrices
    for name, make in {**METHODS, **lion}.items():
        expected, got = (last(make(4), tier) for tier in tiers)
        found[name] = max(distance(expected[k], got[k]) for k in shapes)
    return found


def text_of(
    counted: list[dict[str, Any]],
    timed: list[dict[str, Any]],
    apart: Mapping[str, float],
) -> str:
    lines = []
    if timed:
        base = timed[0]["step_s"]
        each = ", ".join(f"{name} {x:.1e}" for name, x in apart.items())
        lines += [f"Updates of both tiers, relative difference: {each}.", ""]
        lines += ["| step of one layer of each shape | tier | ms | / adamw |"]
        lines += ["|---|---|---|---|"]
        for x in timed:
            name = f"{x['method']} r={x['rank']}" if x["rank"] else x["method"]
            ratio = x["step_s"] / base
            lines += [
                f"| {name} | {x['tier']} | {1e3 * x['step_s']:.3f} | {ratio:.2f} |"
            ]
    else:
        lines += [
            "No GPU or TPU was at hand: the kernels were never run on one. They were "
            "lowered by `jax.export`, and their results compared with XLA's by "
            "interpreting them on a CPU (`tests/test_kernels.py`). That the compilers "
            "for H100 and TPU v5e take them, and what they move there, is in "
            "[accelerators.md](accelerators.md); how fast they are is not known.",
        ]
    lines += [
        "",
        "Counted in float32. Fast memory is shared memory of a block (at most "
        f"{plan.BUDGET['cuda'] // 1024} KiB) or VMEM (at most "
        f"{plan.BUDGET['tpu'] // 1024} KiB). Words are of 4 bytes for each weight, "
        "what is read again for each row or column of tiles included (on GPU most of "
        "that comes from the cache); the small factorizations between the passes, and "
        "zeta, which is made from the factors alone, are not. Of a step, XLA's part is "
        "counted too: 3 words, and for MLorc 4 more at a rank above "
        f"{OUTER_MAX_RANK}, where it stores the products of both moments' factors. The "
        "ratio is that of the step to the 7 words of AdamW. Of MLorc's kernels on GPU, "
        "three factor small matrices, those of all leaves at once; they have no tiles.",
        "",
        "| method | layer | for | kernels | tiles | fast memory, KiB "
        "| words of the kernels | of a step | / AdamW |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for x in counted:
        name = f"{x['method']} r={x['rank']}" if x["rank"] else x["method"]
        tiles = ", ".join(f"{a}x{b}" for a, b in x["tiles"])
        fast = x["fast_memory_bytes"] / 1024
        lines += [
            f"| {name} | {x['layer']} {'x'.join(map(str, LAYERS[x['layer']]))} "
            f"| {x['platform']} | {x['kernels']} | {tiles} "
            f"| {f'{fast:.0f}' if fast else 'registers'} "
            f"| {x['kernel_bytes_per_weight'] / WORD:.2f} "
            f"| {x['step_bytes_per_weight'] / WORD:.2f} | {x['of_adamw']:.2f} |"
        ]
    return "\n".join(lines)


def main(settings: Settings) -> None:
    """Count, time where there is a device, and write the record."""
    counted = count(settings)
    timed, apart = [], {}
    if jax.default_backend() in ("gpu", "tpu"):
        tiers = [functools.partial(lro.kernels.dispatch, x) for x in ("xla", "pallas")]
        apart, timed = differences(LAYERS, tiers), time_steps(settings)
    figures = {"counted": counted, "timed": timed, "differences": apart}
    text = text_of(counted, timed, apart)
    write_record("kernels", settings, figures, text, settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings))
