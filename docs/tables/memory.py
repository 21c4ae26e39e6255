"""Bytes: of LLaMA-7B by method and rank, of a window of gradients, of a whole step."""

import math
from typing import Literal

import jax
import matplotlib.pyplot as plt
import optax
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from tables.llama import LLAMA_7B, MATRICES
from tables.methods import METHODS, Method, gigabytes, llama_bytes
from tables.plots import Plot
from tables.records import record, rows

_WEIGHTS = sum(math.prod(x.shape) for x in jax.tree.leaves(LLAMA_7B))


def _titled(title: str) -> Method:
    (found,) = (x for x in METHODS if x.title == title)
    return found


def everything() -> str:
    """State, weights and gradients together."""
    lines = []
    for method in METHODS:
        for rank in method.ranks or (None,):
            state = llama_bytes(method, rank)
            sums = (8 * _WEIGHTS, 4 * _WEIGHTS, 2 * _WEIGHTS)
            lines.append(
                (
                    method.title + (f", r = {rank}" if rank else ""),
                    gigabytes(state),
                    *(gigabytes(x + state) for x in sums),
                )
            )
    head = ("GB", "state", "all in float32", "weights in bfloat16", "and per layer")
    return rows(head, lines, figures=True)


# Title and rank; what per-layer updates refuse is not among them.
_BUDGETED = {
    "AdamW of Optax": None,
    "Adam in 8 bits": None,
    "GaLore": 1024,
    "GaLore in 8 bits": 1024,
    "APOLLO": 256,
    "MLorc-AdamW": 4,
}
_BUDGETS = (24, 40, 80)  # GB


def budgets() -> str:
    """Weights, gradients and state together, and the least device that holds them."""
    lines = []
    for title, rank in _BUDGETED.items():
        state = llama_bytes(_titled(title), rank)
        # A weight and its gradient, or the weight alone.
        sums = [state + size * _WEIGHTS for size in (8, 4, 4, 2)]
        lines.append((title + (f", r = {rank}" if rank else ""), *map(_held, sums)))
    head = ("GB", "float32", "float32, per layer", "bfloat16", "bfloat16, per layer")
    return rows(head, lines, figures=True)


def _held(size: float) -> str:
    device = next((str(x) for x in _BUDGETS if size < x * 1e9), "none")
    return f"{gigabytes(size)} ({device})"


def step(name: str) -> str:
    """The measured peak of a training step, with and without per-layer updates."""
    lines = [
        (
            f"`{x['method']}`",
            x["step"],
            *(f"{x[k] / 1e9:.1f}" for k in ("weights", "state", "temporaries", "peak")),
            f"{x['without state']:.2f}",
        )
        for x in record(name)["figures"]
    ]
    head = ("", "step", "weights", "state", "temporaries", "peak")
    return rows((*head, "(peak - state) / weights"), lines, figures=True)


# By the mesh axes that split the rows and the columns of a weight.
_MESHES = {
    "8, FSDP": (("fsdp",), (8,), P("fsdp", None)),
    "4 x 2, FSDP and tensor": (("fsdp", "model"), (4, 2), P("fsdp", "model")),
}


def devices() -> str:
    """The state on each device of two meshes, split by all axes and by own ones."""
    shown = {
        "AdamW of Optax": None,
        "GaLore": 1024,
        "GaLore in 8 bits": 1024,
        "MLorc-AdamW": 4,
    }
    lines = []
    for title, rank in shown.items():
        method = _titled(title)
        cells = [gigabytes(llama_bytes(method, rank))]
        for by in ("all", "own"):
            for mesh in _MESHES.values():
                cells.append(gigabytes(_on_a_device(method.make(rank or 0), *mesh, by)))
        lines.append((title + (f", r = {rank}" if rank else ""), *cells))
    own = [f'{name}, `"own"`' for name in _MESHES]
    return rows(("", "in all", *_MESHES, *own), lines, figures=True)


def _on_a_device(
    tx: optax.GradientTransformation,
    names: tuple[str, ...],
    sizes: tuple[int, ...],
    spec: P,
    by: Literal["all", "own"],
) -> int:
    mesh = AbstractMesh(sizes, names)

    def lay(path: jax.tree_util.KeyPath, x: jax.ShapeDtypeStruct):
        whole = "norm" in jax.tree_util.keystr(path)
        split = P() if whole else P(*[None] * (len(x.shape) - 2), *spec)
        lying = NamedSharding(mesh, split)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lying)

    params = jax.tree.map_with_path(lay, LLAMA_7B)
    with lro.split_states(by):
        report = lro.memory_report(tx, params, mesh)
    (state,) = (row for row in report if row.what == "optimizer state")
    return state.bytes_per_device


def exchange(rank: int = 128) -> str:
    """What devices exchange of LLaMA-7B's gradients, whole and projected."""
    found = lro.describe(lro.galore_adamw(1e-2, rank, matrices=MATRICES), LLAMA_7B)
    projected = [row for row in found if row.view is not None]
    whole = sum(math.prod(row.shape) for row in projected)
    thin = sum(rank * math.prod(row.view) // min(row.view[-2:]) for row in projected)
    rest = _WEIGHTS - whole
    return (
        f"At rank {rank}, the matrices of LLaMA-7B's 32 layers are {thin / 1e6:.0f} "
        f"million numbers in such a step, where whole gradients are {whole / 1e6:,.0f} "
        f"million, {whole / thin:.0f} times as many. Embedding, head and norms, which "
        f"are not projected, stay {rest / 1e6:.0f} million.\n"
    )


def accumulation() -> str:
    """What a window of gradients takes beside the optimizer's own state."""
    lines = []
    for rank in (128, 1024):
        tx = lro.galore_adamw(1e-2, rank=rank, matrices=MATRICES)
        own = lro.state_bytes(tx, LLAMA_7B)
        many = optax.MultiSteps(tx, 8).gradient_transformation()
        kept = [
            lro.state_bytes(x, LLAMA_7B) - own
            for x in (many, lro.accumulate_gradients(tx, every=8))
        ]
        lines.append((f"r = {rank}", gigabytes(own), *map(gigabytes, kept)))
    wrappers = ("`optax.MultiSteps`", "`accumulate_gradients`")
    return rows(("GaLore", "state", *wrappers), lines, figures=True)


# Title and rank of each bar; Fira, I3S and GoLore are as GaLore.
_BARS = {
    "AdamW of Optax": None,
    "Adam-mini": None,
    "Adam in 8 bits": None,
    "GaLore": 1024,
    "GaLore in 8 bits": 1024,
    "AdaRankGrad": 128,
    "APOLLO": 128,
    "MLorc-AdamW": 4,
    "MLorc-Lion": 4,
    "Flora with Adafactor": 128,
    "Q-GaLore": 128,
    "GaLore with Adafactor": 128,
}


def bars() -> Plot:
    """The state of LLaMA-7B by method."""
    found = []
    for title, rank in _BARS.items():
        size = llama_bytes(_titled(title), rank) / 1e9
        found.append((size, title + (f", r = {rank}" if rank else ""), not rank))
    found.sort(reverse=True)

    def draw(axes: plt.Axes) -> None:
        sizes, labels, full = zip(*found, strict=True)
        places = range(len(sizes))
        colors = ["#8a929b" if x else "#2f7fc1" for x in full]
        axes.barh(places, sizes, color=colors)
        axes.set_yticks(places, labels, fontsize=9)
        for place, size in enumerate(sizes):
            axes.text(size + 0.6, place, f"{size:.1f}", va="center", fontsize=9)
        axes.set_xlabel("optimizer state of LLaMA-7B, GB (grey: full rank)")
        axes.set_xlim(0, 1.12 * sizes[0])
        axes.set_ylim(-0.7, len(sizes) - 0.3)

    return Plot("bytes_by_method", draw, (5.8, 4.0))


def ranks() -> Plot:
    """How the state grows with the rank."""
    shown = ("MLorc-AdamW", "MLorc-Lion", "GaLore", "GaLore in 8 bits", "APOLLO")
    flat = ("AdamW of Optax", "Adam in 8 bits")
    at = (1, 4, 16, 64, 256, 1024)

    def draw(axes: plt.Axes) -> None:
        for title in shown:
            method = _titled(title)
            sizes = [llama_bytes(method, rank) / 1e9 for rank in at]
            axes.plot(at, sizes, "o-", ms=4, label=title)
        for title, dash in zip(flat, ("--", ":"), strict=True):
            size = llama_bytes(_titled(title), None) / 1e9
            axes.axhline(size, ls=dash, color="#8a929b", label=title)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(at, at)
        axes.set_yticks((1, 2, 5, 10, 20, 50), (1, 2, 5, 10, 20, 50))
        axes.minorticks_off()
        axes.set_xlabel("rank")
        axes.set_ylabel("optimizer state of LLaMA-7B, GB")
        axes.legend(fontsize=8, frameon=False)

    return Plot("bytes_by_rank", draw, (6.5, 4.2))
