"""What can be asked of the GLUE command."""

from dataclasses import dataclass, replace
from pathlib import Path

from examples.common.methods import METHODS, check_methods, check_rates
from examples.common.processes import Devices
from examples.roberta.masked import ENCODERS
from examples.roberta.stdlib import STDLIB
from examples.roberta.tasks import GLUE, Preset, Task

TASKS = {STDLIB.name: STDLIB, **GLUE}
# Full fine-tuning of random weights: what pre-training is worth.
SCRATCH = "scratch"


@dataclass(frozen=True)
class Glue(Devices):
    """Fine-tune RoBERTa or BERT on a GLUE task by several methods; compare them.

    Writes one directory: metrics and best checkpoint of each run, result.json,
    report.md and its plots. Ctrl-C saves a checkpoint and says how to go on. Without
    arguments nothing is downloaded: a small encoder is pre-trained on docstrings.
    """

    task: str = "stdlib"
    """cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, or stdlib (which package of
    Python's standard library is a snippet from)."""
    model: str = "small"
    """Hugging Face directory, or hub name such as FacebookAI/roberta-base; or small, an
    encoder that is pre-trained first, on docstrings of the standard library."""
    data: str = "auto"
    """Directory with the task's files, or one file (TSV, JSONL, CSV); hf:OWNER/NAME, a
    dataset of the Hugging Face hub; auto, GLUE from there."""
    methods: tuple[str, ...] = (
        "adamw",
        "mlorc_adamw",
        "galore_adamw",
        "lora",
        SCRATCH,
    )
    """Methods to compare, by the names in examples/common/methods.py (adamw is full
    fine-tuning), and scratch: adamw from random weights."""
    out: Path | None = None
    """Directory of the run, new or empty but with --resume. Default: runs/ and the
    date; with --resume, the latest there."""
    resume: bool = False
    """Continue the run in --out with the settings it was started with."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the fresh head, of the order of the batches and of dropout: a run
    each."""
    grid: tuple[float, ...] = ()
    """Multiples of each method's learning rate to try on the first seed; the best by
    validation is used. A dense learning rate that is given stays as it is."""
    learning_rate: float | None = None
    """Peak learning rate of every method's matrices. Default: the papers' for task and
    method."""
    dense_learning_rate: float | None = None
    """Peak learning rate of embeddings, head, biases and norms. Default: that of the
    matrices, as in the papers."""
    rank: int = 8
    """Rank of every low-rank method."""
    epochs: float | None = None
    """Passes over the training set. Default: the task's."""
    batch_size: int | None = None
    """Examples in a batch. Default: the task's."""
    max_length: int | None = None
    """Tokens kept of an example. Default: the task's."""
    update_every: int | None = None
    """Steps between two choices of the subspace, in methods that project gradients.
    Default: the task's."""
    train_examples: int | None = None
    """Train on so many examples at most. Default: the task's, all in GLUE."""
    validation_examples: int | None = None
    """Validate on so many examples at most. Default: the task's, all in GLUE."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup: float = 0.06
    """Share of the steps in which the learning rate rises; then it falls linearly."""
    pretrain_steps: int = 1000
    """Steps of masked language modelling, for the models that are made here."""
    log_every: int = 1
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 200
    """Steps between two checkpoints."""
    shrink_every: int = 100
    """Steps between two searches for ranks that are no longer used, in methods that
    adapt them; the memory of these is freed."""
    smoke: bool = False
    """Smaller defaults: all of it in less than a minute, to see that it works."""

    @property
    def chosen_task(self) -> Task:
        """The task, with the settings that take the place of its own."""
        task = TASKS[self.task]
        given = {
            name: value
            for name in (
                "epochs",
                "batch_size",
                "max_length",
                "update_every",
                "train_examples",
                "validation_examples",
            )
            if (value := getattr(self, name)) is not None
        }
        return replace(task, preset=replace(task.preset, **given))

    def rates(self, method: str) -> list[float]:
        """The learning rates that are tried."""
        base = self.learning_rate
        if base is None:
            base = TASKS[self.task].preset.learning_rate(method)
        # Rounded to what names and tables show, so that they name what was used.
        return [float(f"{base * factor:.6g}") for factor in self.grid or (1.0,)]

    def rank_of(self, method: str) -> int | None:
        """The rank of a method; None where it has none."""
        return None if method == SCRATCH else METHODS[method].rank_of(self.rank)

    def check(self) -> None:
        """Raises ValueError for a value that means nothing, by name."""
        if self.task not in TASKS:
            raise ValueError(
                f"Unknown task {self.task!r}: choose from {', '.join(TASKS)}."
            )
        if self.task == STDLIB.name and self.data != "auto":
            raise ValueError("The task stdlib has its own data: leave --data out.")
        known = tuple(name for name in self.methods if name != SCRATCH)
        if known or self.methods.count(SCRATCH) != 1:
            check_methods(known, self.rank)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("Give at least one seed, and each at most once.")
        if any(seed < 0 for seed in self.seeds):
            raise ValueError("seeds must be at least 0")
        if len(set(self.grid)) < len(self.grid) or any(not x > 0 for x in self.grid):
            raise ValueError("grid must have factors above 0, each at most once")
        preset: Preset = self.chosen_task.preset
        for name, value in {**vars(preset), **vars(self)}.items():
            counts = isinstance(value, int) and not isinstance(value, bool)
            counts &= name != "process_id"
            if counts and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not preset.epochs > 0:
            raise ValueError(f"epochs must be above 0, not {preset.epochs}")
        check_rates(self.learning_rate, self.dense_learning_rate)
        if not self.weight_decay >= 0:
            raise ValueError(
                f"weight_decay must be at least 0, not {self.weight_decay}"
            )
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be from 0 to 1, not {self.warmup}")

    @property
    def made_here(self) -> bool:
        """Whether the model is pre-trained by this command."""
        return self.model in ENCODERS


SMOKE = Glue(
    model="smoke",
    rank=4,
    epochs=1,
    batch_size=16,
    max_length=48,
    train_examples=160,
    validation_examples=96,
    update_every=5,
    pretrain_steps=20,
    checkpoint_every=5,
)
