"""What the papers take their methods apart by, each beside what it is a variant of.

    python -m benchmarks.ablations

The text, model, length and seeds are those of `benchmarks.comparison`, and so are the
rates: those found there for the method that a variant is of, or for GaLore-AdamW where
that is not among its methods, so that a pair differs in one thing. Trials that the
comparison has are taken from there. What is missing is run, seed by seed, until the
time is up; each trial (half a minute of a core) is kept.
"""

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tyro
from tqdm import tqdm

from benchmarks.comparison.protocol import Trial
from benchmarks.comparison.settings import Training
from benchmarks.comparison.trials import Results
from benchmarks.record import write_record, written
from examples.common.report import markdown_table

# Each with the method that it is compared with.
VARIANTS = {
    "mlorc_m": "mlorc_adamw",
    "mlorc_v": "mlorc_adamw",
    "mlorc_as_published": "mlorc_adamw",
    "hybrid_adamw": "i3s_adamw",
    "uniform_adamw": "i3s_adamw",
    "random_adamw": "i3s_adamw",
    "i3s_adafactor": "galore_adafactor",
    "i3s_adam_mini": "galore_adam_mini",
    "i3s_adamw_8bit": "galore_adamw_8bit",
    "galore_plus_8bit_0.6": "galore_plus_8bit_0.0",
    "galore_plus_adamw_8bit": "galore_plus_8bit_0.0",
    "galore_plus_8bit_1.8": "galore_plus_8bit_0.0",
    "adarankgrad_0.23": "adarankgrad_adamw",
    "adarankgrad_fixed_interval": "adarankgrad_adamw",
    "adarankgrad_fixed_rank": "adarankgrad_adamw",
}


@dataclass(frozen=True)
class Settings(Training):
    """Loss of variants minus that of the methods that they are variants of."""

    variants: tuple[str, ...] = tuple(VARIANTS)
    """By the names in examples/common/methods.py."""
    dense_rate: float = 0.06
    """Of embedding, head and norms: as benchmarks/records/comparison.md found it."""
    rate: float = 0.016
    """Of the matrices, for what projects gradients."""
    mlorc_rate: float = 0.002
    """Of the matrices, for MLorc."""

    def trial(self, method: str, seed: int) -> Trial:
        rate = self.mlorc_rate if method.startswith("mlorc") else self.rate
        return Trial(method, self.rank, self.dense_rate, rate, seed)

    @property
    def trials(self) -> Iterator[Trial]:
        """All that there are to be, those of the first seed first."""
        methods = [x for v in self.variants for x in (VARIANTS[v], v)]
        for seed in self.seeds:
            for method in dict.fromkeys(methods):
                yield self.trial(method, seed)


def figures(settings: Settings, losses: dict[Trial, float]) -> dict[str, Any]:
    """Of each variant the losses by seed, and those of what it is a variant of."""

    def of(method: str) -> dict[int, float]:
        trials = {seed: settings.trial(method, seed) for seed in settings.seeds}
        return {seed: losses[x] for seed, x in trials.items() if x in losses}

    return {
        name: {"losses": of(name), "of": VARIANTS[name], "base": of(VARIANTS[name])}
        for name in settings.variants
        if of(name).keys() & of(VARIANTS[name]).keys()
    }


def differences(found: dict[str, Any]) -> list[float]:
    """Loss minus the other's, seed by seed."""
    losses, base = found["losses"], found["base"]
    return [losses[seed] - base[seed] for seed in losses if seed in base]


def table(found: dict[str, Any]) -> str:
    header = ["variant", "of", "seeds", "validation loss", "minus that of the method"]
    lines = []
    for name, x in found.items():
        mean = statistics.fmean(x["losses"].values())
        paired = differences(x)
        shown = written(paired, 3, "+")
        lines.append([name, x["of"], str(len(paired)), f"{mean:.3f}", shown])
    return markdown_table(header, lines) if lines else "None is there yet."


def main(settings: Settings) -> None:
    """Runs what is missing until the time is up, then writes the record."""
    s, began = settings, time.monotonic()
    trainer = s.trainer()
    own = Results(s.out / "ablations", trainer.setup)
    losses = Results(s.out / "comparison", trainer.setup).losses | own.losses
    missing = [x for x in s.trials if x not in losses]
    for trial in tqdm(missing, unit=" trial"):
        if time.monotonic() - began > 60 * s.minutes:
            break
        own.add(trial, trainer.run(trial))
    found = figures(s, losses | own.losses)
    missing = [x for x in s.trials if x not in losses | own.losses]
    text = f"{_about(s, trainer.setup, len(missing))}\n\n{table(found)}"
    write_record("ablations", s, found, text, s.out)


def _about(s: Settings, setup: str, missing: int) -> str:
    about = (
        f"{setup}. Rank {s.rank}, rate {s.dense_rate:g} of embedding, head and norms,"
        f" {s.rate:g} of the matrices, {s.mlorc_rate:g} with MLorc: those that"
        " comparison.md has for GaLore and MLorc, not tuned for a variant. Differences"
        " are paired, seed by seed; ± is half of the 95% confidence interval."
    )
    if not missing:
        return about
    return (
        f"**Not complete**: {missing} of {len(list(s.trials))} trials are missing;"
        f" `python -m benchmarks.ablations` goes on.\n\n{about}"
    )


if __name__ == "__main__":
    # Before the first computation: one core, as several sessions share a machine.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    main(tyro.cli(Settings))
