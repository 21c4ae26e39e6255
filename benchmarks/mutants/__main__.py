"""Tries what is missing of the mutants, and writes their record."""

import os
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from benchmarks.mutants import record
from benchmarks.mutants.mutate import Mutant, mutants, sample
from benchmarks.mutants.running import Copy
from benchmarks.mutants.tests import PACKAGE, tests_of
from benchmarks.record import RECORDS, write_record

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Settings:
    """Whether a test fails where an expression of the package is wrong.

    A mutant is a module with one wrong expression. A sample of them is tried, each with
    the tests that can reach its module, in a copy of the tree. What is in the record
    counts as tried as long as the expression stands.
    """

    minutes: float = 60.0
    """Ends after the mutant that crosses it; 0 writes the record of what is there."""
    count: int = 330
    """About how many are in the sample."""
    seed: int = 0
    """Of the sample."""
    only: tuple[str, ...] = ()
    """Ids of mutants to try, tried or not, and in the sample or not: with all tests of
    their modules, where others are tried with a sample of those that execute the line.
    """
    below: tuple[str, ...] = ("",)
    """Only of modules whose paths from lowrank_optax/_src begin so."""
    limit: float = 120.0
    """Seconds of the processor for one mutant, its quickest tests first."""
    out: Path = RECORDS
    """Directory of the record."""
    kept: Path = Path("runs/mutants")
    """What makes later runs quicker: compiled programs, and what each test takes."""


def all_mutants(root: Path = ROOT) -> list[Mutant]:
    """Of all modules of the package."""
    paths = sorted((root / PACKAGE).rglob("*.py"))
    return [
        mutant
        for path in paths
        for mutant in mutants(path.relative_to(root).as_posix(), path.read_text())
    ]


def chosen(
    settings: Settings,
    found: Sequence[Mutant],
    wanted: Sequence[Mutant],
    known: Mapping[str, record.Kept],
) -> list[Mutant]:
    """Those that the settings name, or else what is missing of the sample.

    Those for which there was too little time come last.
    """
    if settings.only:
        return [m for m in found if m.id in settings.only]
    below = tuple(f"{PACKAGE.as_posix()}/{start}" for start in settings.below)
    here = [m for m in wanted if m.module.startswith(below)]
    slow = {i for i, kept in known.items() if kept["outcome"] == "too slow"}
    return [m for m in here if m.id not in known] + [m for m in here if m.id in slow]


def main(settings: Settings) -> None:
    """Tries what is missing until the time is up, then writes the record."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        copy = Copy(ROOT, Path(folder), settings.kept.resolve(), settings.limit)
        found = all_mutants(copy.root)
        results = record.Results(settings.out / "mutants.jsonl")
        wanted, killers = sample(found, settings.count, settings.seed), []
        for mutant in tqdm(chosen(settings, found, wanted, results.all)):
            if time.monotonic() - began >= 60 * settings.minutes:
                break
            whole = bool(settings.only)
            result = copy.try_(mutant, tests_of(mutant.module), whole)
            results.add(mutant, result)
            killers += [result.by] if result.by else []
        copy.check(killers)
    left = sum(m.id not in results.all for m in wanted)
    text = record.page(found, results.all, left)
    figures = record.figures(found, results.all)
    write_record("mutants", settings, figures, text, settings.out)


def _stop(*_) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, _stop)
    main(tyro.cli(Settings))
