"""Settings of pre-training a LLaMA: what can be asked for."""

from dataclasses import dataclass
from pathlib import Path

from examples.common.methods import check_methods, check_rates
from examples.common.processes import Devices


@dataclass(frozen=True)
class Pretrain(Devices):
    """Pre-train a LLaMA with several optimizers on the same text; compare them.

    Writes one directory: metrics, checkpoints and final model of each method,
    result.json, report.md and its plots. Ctrl-C saves a checkpoint and says how to go
    on.
    """

    model: str = "tiny"
    """Name of a file in examples/llama/configs, or path of a Hugging Face
    config.json."""
    methods: tuple[str, ...] = ("adamw", "galore_adamw", "mlorc_adamw")
    """Methods to compare, by the names in examples/common/methods.py: optimizers, and
    the training modes lora, dora, relora and factorized."""
    data: str = "stdlib"
    """Text: stdlib (Python's own sources), path:FILE_OR_DIR, hf:OWNER/NAME (streamed
    from the Hugging Face hub), or auto (C4 if the hub answers, else stdlib)."""
    out: Path | None = None
    """Directory of the run, new or empty but with --resume. Default: runs/ and the
    date; with --resume, the latest there."""
    resume: bool = False
    """Continue the run in --out with the settings it was started with."""
    steps: int = 240
    """Optimizer steps of each method."""
    batch_size: int = 8
    """Sequences in a batch."""
    seq_len: int = 128
    """Tokens in a sequence."""
    learning_rate: float | None = None
    """Peak learning rate of every method's matrices. Default: each method's own."""
    dense_learning_rate: float | None = None
    """Peak learning rate of embedding, head and norms. Default: each method's own."""
    rank: int | None = None
    """Rank of every low-rank method. Default: each method's own."""
    update_every: int = 50
    """Steps between two choices of the subspace, in methods that project gradients;
    between two merges of ReLoRA."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    seed: int = 0
    """Seed of the initial weights and of the order of the batches."""
    log_every: int = 1
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 30
    """Steps between two validations."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    shrink_every: int = 100
    """Steps between two searches for ranks that are no longer used, in methods that
    adapt them; the memory of these is freed."""
    layerwise: bool = False
    """Update each layer inside of the backward pass, so that no gradient of the whole
    model exists. Layers are held as one; the gradient is not probed."""
    smoke: bool = False
    """Smaller defaults: all of it in less than a minute, to see that it works."""

    def check(self) -> None:
        """Raises ValueError for a value that means nothing, by name."""
        check_methods(self.methods, self.rank, self.layerwise)
        for name in (
            "steps",
            "batch_size",
            "seq_len",
            "update_every",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "shrink_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, not {getattr(self, name)}"
                )
        check_rates(self.learning_rate, self.dense_learning_rate)
        if not self.weight_decay >= 0:
            raise ValueError(
                f"weight_decay must be at least 0, not {self.weight_decay}"
            )


SMOKE = Pretrain(
    model="smoke",
    steps=20,
    batch_size=4,
    seq_len=32,
    rank=4,
    update_every=5,
    eval_every=5,
    checkpoint_every=10,
)
