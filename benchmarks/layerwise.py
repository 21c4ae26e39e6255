"""Memory of a training step of LLaMA that updates each layer in the backward pass.

    python -m benchmarks.layerwise
    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_gpu_autotune_level=0 \\
        python -m benchmarks.layerwise --target h100

Steps of full size are compiled for this machine, or for a device that need not be there
(`benchmarks.accelerators.targets`), and not run: XLA tells what they would hold,
(arguments + results - those in the arguments' memory + temporaries). The ordinary step
recomputes its layers too (remat), and both are given their parameters and state.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx
from tqdm import tqdm

import lowrank_optax as lro
from benchmarks.accelerators.targets import sharding
from benchmarks.record import write_record
from examples.common.methods import matrices
from examples.llama.config import CONFIGS, LlamaConfig
from examples.llama.layerwise import step_of
from examples.llama.model import Llama

METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.adamw(1e-4),
    "mlorc_adamw r=4": lambda: lro.mlorc_adamw(1e-4, rank=4, matrices=matrices),
    "galore_adamw r=128": lambda: lro.galore_adamw(1e-4, rank=128, matrices=matrices),
    "mlorc_lion r=4": lambda: lro.mlorc_lion(1e-4, rank=4, matrices=matrices),
}


@dataclass(frozen=True)
class Settings:
    """Memory of ordinary and per-layer training steps, as compiled."""

    model: str = "llama_7b"
    """Name of a file in examples/llama/configs."""
    layers: int | None = None
    """Layers of the model, if not its own number."""
    batch_size: int = 4
    """Sequences in a batch."""
    seq_len: int = 512
    """Tokens in a sequence."""
    param_dtypes: tuple[str, ...] = ("float32",)
    """Types of the weights, and of the activations. On CPU, XLA multiplies bfloat16 in
    float32, and keeps a float32 copy of all weights for that."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Optimizers."""
    target: str | None = None
    """A device of `benchmarks.accelerators.targets`; else this machine."""
    out: Path | None = None
    """Directory of the record; default benchmarks/records."""


def ordinary(config: LlamaConfig) -> Callable[..., Any]:
    """What makes the ordinary training step of an optimizer."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: Llama(config)))

    def loss_of(params, rows):
        logits = nnx.merge(graph, params)(rows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, rows[:, 1:]
        ).mean()

    def make(tx):
        def step(params, opt_state, rows):
            loss, grads = jax.value_and_grad(loss_of)(params, rows)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        return step

    return make


def measure(
    config: LlamaConfig, tx: Any, make: Callable[..., Any], rows: Any, place: Any
) -> dict[str, Any]:
    """Bytes that a step would hold at a place, and seconds to compile it."""
    model = nnx.eval_shape(lambda: Llama(config))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = jax.eval_shape(tx.init, params)
    given = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (params, state, rows),
    )
    began = time.perf_counter()
    step = jax.jit(make(tx), donate_argnums=(0, 1))
    usage = step.lower(*given).compile().memory_analysis()
    sizes = {
        name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
        for name, tree in (("weights", params), ("state", state))
    }
    own = usage.output_size_in_bytes - usage.alias_size_in_bytes
    peak = usage.argument_size_in_bytes + own + usage.temp_size_in_bytes
    return {
        **sizes,
        "temporaries": usage.temp_size_in_bytes,
        "peak": peak,
        "peak over weights": peak / sizes["weights"],
        "without state": (peak - sizes["state"]) / sizes["weights"],
        "seconds to compile": time.perf_counter() - began,
    }


def main(settings: Settings) -> None:
    place = None if settings.target is None else sharding(settings.target)
    rows = jax.ShapeDtypeStruct((settings.batch_size, settings.seq_len + 1), jnp.int32)
    figures = []
    cases = [(d, m) for d in settings.param_dtypes for m in settings.methods]
    for dtype, method in tqdm(cases):
        config = LlamaConfig.from_json(
            CONFIGS / f"{settings.model}.json",
            scan_layers=True,
            remat=True,
            dtype=dtype,
            param_dtype=dtype,
        )
        if settings.layers is not None:
            config = dataclasses.replace(config, num_hidden_layers=settings.layers)
        for form, make in (
            ("ordinary", ordinary(config)),
            ("per layer", step_of(config, None)),
        ):
            found = measure(config, METHODS[method](), make, rows, place)
            figures.append({"dtype": dtype, "method": method, "step": form, **found})
    name = "layerwise" if settings.target is None else f"layerwise_{settings.target}"
    write_record(name, settings, figures, _table(figures), settings.out)


def _table(figures: list[dict[str, Any]]) -> str:
    lines = [
        "| weights | method | step | weights GB | state GB | temporaries GB | peak GB |"
        " peak / weights | (peak - state) / weights | compile s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for x in figures:
        sizes = [
            f"{x[k] / 1e9:.2f}" for k in ("weights", "state", "temporaries", "peak")
        ]
        ratios = [f"{x[k]:.3f}" for k in ("peak over weights", "without state")]
        cells = [x["dtype"], x["method"], x["step"], *sizes, *ratios]
        lines.append(f"| {' | '.join(cells)} | {x['seconds to compile']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Settings))
