"""Says what a training step of a LLaMA needs on each device, without making anything.

    python -m examples.llama.plan --model llama_7b --method galore_adamw --rank 1024 \\
        --mesh fsdp=8

Weights, gradients and the optimizer's state are exact; activations are estimated by the
formulas of `activations.py`. These were compared with compiled programs, but for
per-layer updates on a mesh.
"""

import math
import sys
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import optax
import tyro
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import lowrank_optax as lro
from examples.common.adapters import adapt, is_frozen
from examples.common.command import refused
from examples.common.mesh import AXES, Placement, mesh_sizes
from examples.common.methods import METHODS, check_methods
from examples.common.precision import in_float32
from examples.common.report import markdown_table
from examples.llama.activations import Activations
from examples.llama.config import LlamaConfig, named_config
from examples.llama.model import Llama

_CLIP = 1.0


@dataclass(frozen=True)
class Plan:
    """Say what a training step of a LLaMA needs on each device; nothing is made."""

    model: str = "llama_7b"
    """Name of a file in examples/llama/configs, or path of a Hugging Face
    config.json."""
    method: str = "galore_adamw"
    """One of the names in examples/common/methods.py."""
    rank: int | None = None
    """Rank of a low-rank method. Default: the method's own."""
    mesh: str = "data=1"
    """Devices, such as data=2,fsdp=4,model=2: data splits the batch, fsdp batch and
    weights, model the matrices (tensor parallel). They need not be there."""
    batch_size: int = 8
    """Sequences in a batch, over all devices."""
    seq_len: int = 512
    """Tokens in a sequence."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What matrices are multiplied in."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """What weights are stored in. The optimizer's state is float32."""
    remat: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    layerwise: bool = False
    """Update each layer inside of the backward pass."""

    def check(self) -> None:
        """Raises ValueError for a value that means nothing, by name."""
        check_methods((self.method,), self.rank, self.layerwise)
        for name in ("batch_size", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, not {getattr(self, name)}"
                )

    @property
    def config(self) -> LlamaConfig:
        """The model.

        Raises:
          ValueError: there is no such model, or it does not take such sequences.
        """
        return named_config(
            self.model,
            self.seq_len,
            shapes_only=True,
            scan_layers=self.layerwise,
            remat=self.remat,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

    @property
    def placement(self) -> Placement:
        """Where everything lies on devices that need not be there.

        Raises:
          ValueError: it is no mesh, or the batch cannot be split over it.
        """
        sizes = tuple(mesh_sizes(self.mesh).values())
        placement = Placement(AbstractMesh(sizes, AXES))
        placement.check_rows(self.batch_size)
        return placement

    def model_shapes(self) -> Any:
        """Shapes and types of the parameters that the method trains."""

        def model() -> Llama:
            rngs = nnx.Rngs(0)
            made = Llama(self.config, rngs=rngs)
            kind = METHODS[self.method].linear
            if kind is not None:
                adapt(made.layers, kind, self.chosen_rank or 1, rngs=rngs)
            return made

        return nnx.to_pure_dict(nnx.state(nnx.eval_shape(model), nnx.Param))

    @property
    def chosen_rank(self) -> int | None:
        """The rank, the method's own where none was asked for; None if it has none."""
        return METHODS[self.method].rank_of(self.rank)

    def optimizer(self) -> optax.GradientTransformation:
        """The method as pre-training and fine-tuning build it."""
        config, own = self.config, METHODS[self.method]
        heads = (config.num_attention_heads, config.kv_heads)
        schedule = optax.constant_schedule(own.learning_rate)
        given = schedule, self.chosen_rank, 200, 0.0
        tx = own.build(*given, heads=heads, steps=1000)
        if not self.layerwise:
            tx = optax.chain(optax.clip_by_global_norm(_CLIP), tx)
        return tx if self.param_dtype == "float32" else in_float32(tx)


@dataclass(frozen=True)
class Need:
    """Bytes on a device.

    Attributes:
      weights: of the parameters.
      state: of the optimizer.
      gradients: that exist at a time.
      gathered: of other devices' weights, brought here to be multiplied with.
      activations: that are kept for the gradients, with the logits and theirs.
      total: of all that exists at a time, at most.
    """

    weights: int
    state: int
    gradients: int
    gathered: int
    activations: int
    total: int


def needs(plan: Plan) -> Need:
    """What a step needs.

    Raises:
      ValueError: a plan that means nothing.
    """
    plan.check()
    mesh, config = plan.placement.mesh, plan.config
    params = plan.placement.shapes(plan.model_shapes())
    weights, _, state = lro.memory_report(plan.optimizer(), params, mesh)
    grads = jax.tree.map(
        lambda x, frozen: 0 if frozen else _bytes(x, x.sharding.spec, mesh),
        params,
        is_frozen(params),
    )
    layers = sum(jax.tree.leaves(grads["layers"]))
    outer = {k: sum(jax.tree.leaves(v)) for k, v in grads.items() if k != "layers"}
    rows = plan.batch_size // plan.placement.parts
    step = Activations(config, rows, plan.seq_len, mesh.shape["model"])
    gathered = _gathered(plan, params)
    if plan.layerwise:
        # Of the head the clipped gradient exists too.
        gradients = 2 * max(*outer.values(), layers // config.num_hidden_layers)
        activations = step.layerwise
        together = gradients + activations
    else:
        gradients = layers + sum(outer.values())
        activations = step.remat if config.remat else step.kept
        # On one device the first gradients take the place of the last activations.
        together = max(activations, gradients + step.last)
        if gathered:
            together = activations + gradients
    mine = weights.bytes_per_device, state.bytes_per_device
    total = sum(mine) + gathered + together
    return Need(*mine, gradients, gathered, activations, total)


def _gathered(plan: Plan, params: Any) -> int:
    """What is brought from other devices along `fsdp`: all weights at a time, as XLA
    orders an ordinary step; with per-layer updates those of a layer, and a table."""
    mesh = plan.placement.mesh
    if mesh.shape["fsdp"] == 1:
        return 0

    def whole(x: Any) -> int:
        spec = [None if axis == "fsdp" else axis for axis in x.sharding.spec]
        return _bytes(x, PartitionSpec(*spec), mesh)

    sizes = jax.tree.map(whole, params)
    if not plan.layerwise:
        return sum(jax.tree.leaves(sizes))
    outer = [sum(jax.tree.leaves(v)) for k, v in sizes.items() if k != "layers"]
    layer = sum(jax.tree.leaves(sizes["layers"])) // plan.config.num_hidden_layers
    return max(*outer, layer)


def _bytes(x: Any, spec: PartitionSpec, mesh: AbstractMesh) -> int:
    shape = NamedSharding(mesh, spec).shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize


def report(plan: Plan) -> str:
    """The plan as a table, with what it rests on.

    Raises:
      ValueError: a plan that means nothing.
    """
    need, config = needs(plan), plan.config
    devices = math.prod(plan.placement.mesh.shape.values())
    rank = "" if plan.chosen_rank is None else f", rank {plan.chosen_rank}"
    layers = "updated layer by layer" if plan.layerwise else "updated as a whole"
    kept = "recomputed" if config.remat or plan.layerwise else "kept"
    lines = [
        f"{plan.model} ({config.parameters:,} parameters in {plan.param_dtype}),"
        f" {plan.method}{rank}, {layers}",
        f"{devices} device{'s' * (devices > 1)} ({plan.mesh}), {plan.batch_size} x"
        f" {plan.seq_len} tokens a step, activations {kept}",
        "",
    ]
    gradients = "gradients, the most at a time" if plan.layerwise else "gradients"
    parts = {
        "weights": need.weights,
        gradients: need.gradients,
        "optimizer state": need.state,
        "gathered weights (estimated)": need.gathered,
        "activations (estimated)": need.activations,
        "total at a time (estimated)": need.total,
    }
    rows = [[name, in_words(size)] for name, size in parts.items() if size]
    lines.append(markdown_table(["on each device", "size"], rows))
    if METHODS[plan.method].linear is None:
        other = needs(replace(plan, layerwise=not plan.layerwise)).total
        ordinary, small = sorted((need.total, other), reverse=True)
        saved = f"{in_words(ordinary - small)} of {in_words(ordinary)}"
        words = "save" if plan.layerwise else "would save"
        lines += ["", f"Per-layer updates {words} {saved} a device (--layerwise)."]
    return "\n".join(lines)


def in_words(size: int) -> str:
    """A size for people."""
    if size < 2**30:
        return f"{size / 2**20:,.2f} MiB"
    return f"{size / 2**30:,.2f} GiB"


def main(argv: list[str] | None = None) -> int:
    """Prints the plan; returns the exit status: 0, or 2 for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    plan = tyro.cli(Plan, args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        print(report(plan))
    except (ValueError, OSError) as error:
        return refused("plan", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
