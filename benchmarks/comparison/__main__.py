"""Runs what is missing of the comparison, and writes its record."""

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.comparison.protocol import METHODS
from benchmarks.comparison.record import write
from benchmarks.comparison.settings import Training
from benchmarks.comparison.trials import Results, complete


@dataclass(frozen=True)
class Settings(Training):
    """Loss and state of the methods on real text, each at its own rate."""

    methods: tuple[str, ...] = tuple(METHODS)
    """By the names in examples/common/methods.py."""
    rungs: tuple[int, int] = (4, 9)
    """Rates of a ladder, at least and at most."""
    quick: bool = False
    """All of it at toy size, in runs/comparison-quick: to see that it works."""


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
    trainer = settings.trainer()
    results = Results(settings.out / "comparison", trainer.setup)
    least, most = settings.rungs
    protocol = trainer.protocol(
        settings.rank, seeds=settings.seeds, least=least, most=most
    )
    methods, minutes = settings.methods, settings.minutes
    study = complete(results, protocol, methods, trainer.run, minutes)
    write(settings, study, results.all, trainer)


if __name__ == "__main__":
    # Before the first computation: one core, as several sessions share a machine.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    quick = QUICK if "--quick" in sys.argv else Settings()
    main(tyro.cli(Settings, default=dataclasses.replace(quick, quick=False)))
