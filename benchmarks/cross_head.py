"""What a basis from one head leaves out of the gradients of queries and keys.

    python -m benchmarks.cross_head

GaLore+'s Figure 2b: along a run of AdamW, the share of each gradient's norm that is
outside of the leading subspace of the whole gradient, and outside of that of one head,
drawn at random, which serves all heads. (A minute of a core.)
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import optax
import tyro

import lowrank_optax as lro
from benchmarks.record import RECORDS, write_record
from examples.llama.pretrain import Pretrain, prepare

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

_PROJECTIONS = ("q_proj", "k_proj")


@dataclass(frozen=True)
class Settings:
    """Errors of both bases, by rank, along a run."""

    model: str = "tiny"
    """Name of a file in examples/llama/configs."""
    data: str = "stdlib"
    """Text, as of examples.llama.pretrain."""
    steps: int = 500
    """Steps of the run."""
    every: int = 20
    """Steps between two looks."""
    ranks: tuple[int, ...] = (4, 8, 16, 32)
    """Of the bases."""
    batch_size: int = 8
    """Sequences in a batch."""
    seq_len: int = 64
    """Tokens in a sequence."""
    seed: int = 1000
    """Of the initial weights, the order of the batches and the heads."""
    learning_rate: float = 2e-3
    """Peak rate of the matrices."""
    dense_learning_rate: float = 0.06
    """Peak rate of all else."""
    out: Path | None = None
    """Directory of the record; default benchmarks/records."""


def left_out(grad: jax.Array, basis: jax.Array) -> jax.Array:
    """The norm of what a basis leaves out of a gradient, over the gradient's."""
    return jnp.sqrt(1 - lro.diagnostics.captured_energy(grad, basis))


@partial(jax.jit, static_argnames=("heads", "rank"))
def errors(
    key: jax.Array, grad: jax.Array, *, heads: int, rank: int
) -> tuple[jax.Array, jax.Array]:
    """Of the basis of a whole gradient (d, heads * width), and of that of one head."""
    exact = lro.TopSingular("svd")
    given = key, grad, jnp.zeros((len(grad), rank)), jnp.int32(0)
    whole = exact.select(*given)
    shared = lro.CrossHead(heads, exact).select(*given)
    return left_out(grad, whole), left_out(grad, shared)


def looks(settings: Settings) -> list[dict[str, Any]]:
    """A row for each look, matrix and rank."""
    s = settings
    shared = (
        "model data steps batch_size seq_len seed learning_rate dense_learning_rate"
    )
    example = Pretrain(methods=("adamw",), **{x: getattr(s, x) for x in shared.split()})
    job = prepare(example, Path("runs/x"))
    tx, config = job.optimizer("adamw"), job.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.kv_heads}

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, Any]:
        grads = jax.grad(job.task.loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    params, rows = job.task.init(), []
    state = tx.init(params)
    for done in range(s.steps):
        params, state, grads = step(params, state, job.task.batch(done))
        if done % s.every:
            continue
        key = jax.random.fold_in(jax.random.key(s.seed), done)
        for layer, of in grads["layers"].items():
            for name in _PROJECTIONS:
                grad = of["self_attn"][name]["kernel"]
                for rank in s.ranks:
                    found = errors(key, grad, heads=heads[name], rank=rank)
                    whole, one = map(float, found)
                    rows.append(
                        {"step": done, "matrix": f"{layer}/{name}", "rank": rank}
                        | {"whole": whole, "one_head": one}
                    )
    return rows


def means(rows: list[dict[str, Any]], **only: Any) -> tuple[float, float]:
    """Both errors, over the rows with these entries."""
    found = [x for x in rows if all(x[k] == v for k, v in only.items())]
    return tuple(sum(x[k] for x in found) / len(found) for k in ("whole", "one_head"))  # type: ignore[return-value]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    steps = sorted({x["step"] for x in rows})
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for color, rank in enumerate(sorted({x["rank"] for x in rows})):
        found = [means(rows, step=step, rank=rank) for step in steps]
        for values, style, name in zip(
            zip(*found, strict=True),
            ("--", "-"),
            ("the whole", "one head"),
            strict=True,
        ):
            axes.plot(steps, values, style, color=f"C{color}", label=f"{rank}, {name}")
    axes.set(xlabel="step", ylabel="share of the norm left out", ylim=(0, 1))
    axes.legend(title="rank, basis of", ncols=4, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(settings: Settings) -> None:
    rows = looks(settings)
    directory = settings.out or RECORDS
    directory.mkdir(parents=True, exist_ok=True)
    plot(rows, directory / "cross_head.png")
    found = {}
    lines = [
        f"{settings.steps} steps of AdamW on {settings.model}, seed {settings.seed}:"
        " the share of the norm of the gradients of queries and keys that a basis"
        " leaves out, mean over matrices and looks.",
        "",
        "| rank | basis of the whole gradient | of one head |",
        "|---:|---:|---:|",
    ]
    for rank in settings.ranks:
        whole, one = means(rows, rank=rank)
        found[rank] = {"whole": whole, "one_head": one}
        lines.append(f"| {rank} | {whole:.3f} | {one:.3f} |")
    lines += ["", "![Along the run](cross_head.png)"]
    write_record("cross_head", settings, found, "\n".join(lines), settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings))
