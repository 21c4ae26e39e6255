"""What the trials of the comparison have in common with those of the ablations."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.comparison.trials import Trainer
from benchmarks.record import RECORDS
from examples.llama.pretrain import Pretrain, prepare


@dataclass(frozen=True)
class Training:
    """Text, model and length, and where results are kept."""

    model: str = "tiny"
    """Name of a file in examples/llama/configs."""
    data: str = "stdlib"
    """Text, as of examples.llama.pretrain."""
    steps: int = 500
    """Steps of a trial."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the initial weights and the order of the batches, in the trials that count."""
    rank: int = 32
    """Of every low-rank method."""
    update_every: int = 50
    """Steps between two choices of the subspace."""
    batch_size: int = 8
    """Sequences in a batch."""
    seq_len: int = 64
    """Tokens in a sequence."""
    minutes: float = 60.0
    """Ends after the trial that crosses it; what is there is kept and gone on from."""
    out: Path = RECORDS
    """Directory of the record, and of the trials below it."""

    def trainer(self) -> Trainer:
        shared = "model data steps update_every batch_size seq_len".split()
        given = {name: getattr(self, name) for name in shared}
        return Trainer(prepare(Pretrain(methods=("adamw",), **given), self.out))
