"""Tokens per second of whole training steps, by method, in one run.

    python -m benchmarks.training

Forward, backward, update and application on LLaMA-60M or another configuration of the
examples, float32 with donated buffers, random tokens. The methods take turns, one step
each; all bases are found at the first step and at none of the timed ones.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from tqdm import tqdm

from benchmarks.record import write_record
from benchmarks.steps import enter, methods
from examples.llama.config import LlamaConfig, config_path
from examples.llama.model import Llama
from examples.llama.pretrain import init_and_loss


@dataclass(frozen=True)
class Settings:
    """What an optimizer costs a training step."""

    methods: tuple[str, ...] = (
        "optax.adamw",
        "galore_adamw r=128",
        "mlorc_adamw r=4",
        "mlorc_lion r=4",
        "adarankgrad_adamw r=128",
        "apollo_adamw r=128",
    )
    """By their names in the record of benchmarks/steps.py; the first is the measure."""
    model: str = "llama_60m"
    """A configuration of examples/llama/configs."""
    batch_size: int = 2
    """Sequences of a step."""
    seq_len: int = 256
    """Tokens of a sequence."""
    rounds: int = 20
    """Steps of each method that are timed."""
    out: Path | None = None
    """Directory of the record; default benchmarks/records."""


def main(settings: Settings) -> None:
    """Time the training steps and write the record."""
    path = config_path(settings.model)
    if path is None:
        raise SystemExit(f"Unknown model {settings.model!r}.")
    config = LlamaConfig.from_json(path)
    init, loss = init_and_loss(lambda: Llama(config, rngs=nnx.Rngs(0)))
    params = init()
    rng = np.random.default_rng(0)
    shape = (settings.batch_size, settings.seq_len + 1)
    batches = [jnp.asarray(rng.integers(0, config.vocab_size, shape)) for _ in range(2)]
    tokens = settings.batch_size * settings.seq_len

    known = methods("60m")
    contenders = {}
    for name in (bar := tqdm(settings.methods)):
        bar.set_description(name)
        contender = enter(known[name](), params, batches[0], jax.grad(loss))
        for batch in batches:
            contender.run(batch)
        contenders[name] = contender
    for i in tqdm(range(settings.rounds), desc="rounds"):
        for contender in contenders.values():
            contender.times.append(contender.run(batches[i % 2]))

    rows = [
        "| method | tokens / s | / first | compile, s "
        "| temporaries, MiB | state, MiB |",
        "|---|---|---|---|---|---|",
    ]
    figures = {}
    for name, contender in contenders.items():
        seconds = float(np.median(contender.times))
        x = figures[name] = contender.facts | {"tokens_per_s": tokens / seconds}
        x["ratio"] = x["tokens_per_s"] / figures[settings.methods[0]]["tokens_per_s"]
        rows.append(
            f"| {name} | {x['tokens_per_s']:.0f} | {x['ratio']:.3f} "
            f"| {x['compile_s']:.1f} | {x['temporaries_bytes'] / 2**20:.0f} "
            f"| {x['state_bytes'] / 2**20:.0f} |"
        )
    count = sum(x.size for x in jax.tree.leaves(params))
    about = (
        f"{settings.model}, {count:,} parameters, {settings.batch_size} x "
        f"{settings.seq_len} tokens a step"
    )
    write_record(
        "training", settings, figures, "\n".join([about, "", *rows]), settings.out
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
