"""Which trials the comparison is made of, and which comes next.

The rate d of all leaves that are no matrices is tuned once, with the method at full
rank, and is the same for all others: AdamW's, and Lion's for the two that move by
signs. Then each method has a ladder of
rates m of its matrices, on a seed that counts for nothing else, and runs at the best of
them with the seeds that count: at one rank for all, and at the rank whose state is
nearest in bytes to GaLore's.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

# Each with the rate its ladder begins at. GaLore and its kind, for which 0.25 of it is
# the step, have four times the rate of the others.
METHODS = {
    "adamw": 2e-3,
    "galore_adamw": 1.6e-2,
    "mlorc_adamw": 2e-3,
    "i3s_adamw": 1.6e-2,
    "fira_adamw": 1.6e-2,
    "fira_i3s_adamw": 1.6e-2,
    "ldadamw": 2e-3,
    "lion": 5e-4,
    "mlorc_lion": 5e-4,
    "golore_adamw": 1.6e-2,
    "galore_plus_adamw": 1.6e-2,
    "apollo_adamw": 8e-3,
    "apollo_mini_adamw": 8e-3,
    "flora": 8e-3,
    "adam_mini": 2e-3,
    "adamw_8bit": 2e-3,
    "galore_adamw_8bit": 1.6e-2,
    "q_galore_adamw_8bit": 1.6e-2,
    "adarankgrad_adamw": 1.6e-2,
}
# Whose rank is not the common one: APOLLO-Mini is APOLLO at rank 1.
RANKS = {"apollo_mini_adamw": 1}
# Lion's steps are signs, so that its dense leaves need a rate of their own.
DENSE_RATE = {"adamw": 3e-2, "lion": 4e-3}
_FACTOR = 2.0


def dense_rule(method: str) -> str:
    """The method at full rank with which the dense leaves' rate is tuned."""
    return "lion" if "lion" in method else "adamw"


@dataclass(frozen=True)
class Trial:
    """What is run: everything that its loss depends on, beside the text and model."""

    method: str
    rank: int | None
    dense_rate: float
    rate: float
    seed: int


@dataclass(frozen=True)
class Protocol:
    """How many trials of which kind.

    Attributes:
      rank: the common one.
      equal_bytes: of a method, the rank whose state is nearest to GaLore's; None for
        those that have no rank to choose.
      tuning_seed: of the ladders.
      seeds: those that count.
      least, most: rungs of a ladder; it ends when the best is not at its edge.
      rates, dense_rates: by method, at which a ladder of the matrices begins; and, of
        the two at full rank, one of all else.
    """

    rank: int
    equal_bytes: Callable[[str], int | None]
    tuning_seed: int = 1000
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    least: int = 4
    most: int = 9
    rates: Mapping[str, float] = field(default_factory=lambda: METHODS)
    dense_rates: Mapping[str, float] = field(default_factory=lambda: DENSE_RATE)


Losses = Mapping[Trial, float]


class Missing(Exception):
    """Raised where a step of the protocol needs a trial that was not run yet."""

    def __init__(self, trial: Trial):
        super().__init__(trial)
        self.trial = trial


def ladder(
    base: float,
    loss_of: Callable[[float], float],
    protocol: Protocol,
) -> dict[float, float]:
    """The loss by rate, of enough rates that the best has a worse one on each side.

    Raises:
      Missing: from ``loss_of``.
    """
    losses: dict[int, float] = {}

    def take(rung: int) -> None:
        losses[rung] = loss_of(rate_of(base, rung))

    take(0)
    while True:
        low, high = min(losses), max(losses)
        best = min(losses, key=lambda k: losses[k])
        if len(losses) >= protocol.most:
            break
        if best == high:
            take(high + 1)
        elif best == low:
            take(low - 1)
        elif len(losses) < protocol.least:
            take(low - 1 if losses[low] < losses[high] else high + 1)
        else:
            break
    return {rate_of(base, rung): losses[rung] for rung in sorted(losses)}


def rate_of(base: float, rung: int) -> float:
    return float(f"{base * _FACTOR**rung:.4g}")


def best(losses: Mapping[float, float]) -> float:
    """The rate of the lowest loss."""
    return min(losses, key=lambda rate: losses[rate])


class Study:
    """The protocol over the trials that are known: what they say, and what is next."""

    def __init__(self, protocol: Protocol, losses: Losses):
        self.protocol, self._losses = protocol, losses

    def loss(self, trial: Trial) -> float:
        if trial not in self._losses:
            raise Missing(trial)
        value = self._losses[trial]
        return value if math.isfinite(value) else math.inf

    def rank(self, method: str) -> int | None:
        if self.protocol.equal_bytes(method) is None and method not in RANKS:
            return None
        return RANKS.get(method, self.protocol.rank)

    def dense_ladder(self, method: str) -> dict[float, float]:
        """By the dense leaves' rate, at the rate of the matrices that is then best.

        One is tuned after the other until neither moves.
        """
        rule = dense_rule(method)
        rate, seed = self.protocol.rates[rule], self.protocol.tuning_seed
        for _ in range(4):
            losses = ladder(
                self.protocol.dense_rates[rule],
                lambda d, m=rate: self.loss(Trial(rule, None, d, m, seed)),
                self.protocol,
            )
            found = best(self._ladder_at(rule, best(losses)))
            if found == rate:
                break
            rate = found
        return losses

    def _ladder_at(self, method: str, dense_rate: float) -> dict[float, float]:
        rank, seed = self.rank(method), self.protocol.tuning_seed
        return ladder(
            self.protocol.rates[method],
            lambda m: self.loss(Trial(method, rank, dense_rate, m, seed)),
            self.protocol,
        )

    def rate_ladder(self, method: str) -> dict[float, float]:
        """By the matrices' rate, at the dense leaves' best."""
        return self._ladder_at(method, best(self.dense_ladder(method)))

    def counted(self, method: str, same_bytes: bool = False) -> list[Trial]:
        """The trials of a method that count, one a seed; none if it has no such rank.

        Raises:
          Missing: its rates are not tuned yet.
        """
        rank = self.rank(method)
        if same_bytes:
            rank = self.protocol.equal_bytes(method)
            if rank is None:
                return []
        dense, rate = best(self.dense_ladder(method)), best(self.rate_ladder(method))
        return [Trial(method, rank, dense, rate, seed) for seed in self.protocol.seeds]

    def at_an_edge(self, methods: Sequence[str]) -> list[str]:
        """Those whose best rate is the first or the last of their ladders."""
        found = []
        for method in methods:
            try:
                rates = self.rate_ladder(method)
            except Missing:
                continue
            if best(rates) in (min(rates), max(rates)):
                found.append(method)
        return found

    def expected(self, methods: Sequence[str]) -> int:
        """About how many trials there are in all: ladders as short as they may be."""
        counts, seeds = self.protocol, len(self.protocol.seeds)
        others = [counts.equal_bytes(x) not in (None, self.rank(x)) for x in methods]
        dense = counts.least * len({dense_rule(method) for method in methods})
        return dense + len(methods) * (counts.least + seeds) + sum(others) * seeds

    def missing(self, methods: Sequence[str]) -> Iterator[Trial]:
        """The trials known to be missing, in the order in which they are run.

        Of a ladder only the next rung is known.
        """
        told = set(self._losses)
        for same_bytes in (False, True):
            for method in methods:
                try:
                    wanted = self.counted(method, same_bytes)
                except Missing as missing:
                    wanted = [missing.trial]
                for trial in wanted:
                    if trial not in told:
                        told.add(trial)
                        yield trial
