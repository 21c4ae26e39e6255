"""Runs what is missing of the comparison, and writes its record."""

import dataclasses
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from benchmarks.comparison.protocol import METHODS, Study
from benchmarks.comparison.record import write
from benchmarks.comparison.trials import Results, Trainer
from benchmarks.record import RECORDS
from examples.llama.pretrain import Pretrain, prepare


@dataclass(frozen=True)
class Settings:
    """Loss and state of the methods on real text, each at its own rate."""

    methods: tuple[str, ...] = tuple(METHODS)
    """By the names in examples/common/methods.py."""
    model: str = "tiny"
    """Name of a file in examples/llama/configs."""
    data: str = "stdlib"
    """Text, as of examples.llama.pretrain."""
    steps: int = 500
    """Steps of a trial."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the initial weights and the order of the batches, in the trials that count."""
    rungs: tuple[int, int] = (4, 9)
    """Rates of a ladder, at least and at most."""
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
    quick: bool = False
    """All of it at toy size, in runs/comparison-quick: to see that it works."""
    out: Path = RECORDS
    """Directory of the record, and of the trials below it."""


QUICK = Settings(
    model="smoke",
    steps=8,
    seeds=(0, 1),
    rungs=(2, 2),
    rank=4,
    update_every=3,
    batch_size=2,
    seq_len=32,
    minutes=10.0,
    out=Path("runs/comparison-quick"),
)


def main(settings: Settings) -> None:
    """Runs what is missing until the time is up, then writes the record."""
    began = time.monotonic()
    example = Pretrain(
        methods=("adamw",),
        **{
            name: getattr(settings, name)
            for name in "model data steps update_every batch_size seq_len".split()
        },
    )
    trainer = Trainer(prepare(example, settings.out))
    results = Results(settings.out / "comparison", trainer.setup)
    least, most = settings.rungs
    protocol = trainer.protocol(
        settings.rank, seeds=settings.seeds, least=least, most=most
    )
    with tqdm(desc="trials", initial=len(results.all), unit=" trial") as bar:
        while time.monotonic() - began < 60 * settings.minutes:
            study = Study(protocol, results.losses)
            trial = next(study.missing(settings.methods), None)
            if trial is None:
                break
            results.add(trial, trainer.run(trial))
            bar.update()
    study = Study(protocol, results.losses)
    write(settings, study, results.all, trainer)


if __name__ == "__main__":
    # Before the first computation: one core, as several sessions share a machine.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    quick = QUICK if "--quick" in sys.argv else Settings()
    main(tyro.cli(Settings, default=dataclasses.replace(quick, quick=False)))
