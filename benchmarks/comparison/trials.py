"""Trials: how one is run, and the files in which finished ones are kept."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import lowrank_optax as lro
from benchmarks.comparison.protocol import RANKS, Protocol, Study, Trial
from examples.common.methods import METHODS, matrix_state_bytes
from examples.common.schedule import warmup_cosine
from examples.common.tokens import Packed
from examples.llama.model import Llama
from examples.llama.pretrain import Job, init_and_loss

VALIDATION_BATCHES = 64
_SIZES = 4  # how many times along a run unused ranks are looked for
_LARGEST_RANK = 128

Result = dict[str, Any]


class Results:
    """Finished trials, a line each, in one file a method."""

    def __init__(self, directory: Path, setup: str):
        self._directory, self._setup = directory, setup
        self.all: dict[Trial, Result] = {}
        for path in sorted(directory.glob("*.jsonl")):
            for line in path.read_text().splitlines():
                self._take(json.loads(line))

    def _take(self, kept: Result) -> None:
        """A line of another text, model or length counts for nothing here."""
        if kept["setup"] == self._setup:
            fields = [field.name for field in dataclasses.fields(Trial)]
            self.all[Trial(**{name: kept[name] for name in fields})] = kept

    def add(self, trial: Trial, result: Result) -> None:
        kept = {**dataclasses.asdict(trial), **result, "setup": self._setup}
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / f"{trial.method}.jsonl").open("a") as file:
            file.write(json.dumps(kept) + "\n")
        self._take(kept)

    @property
    def losses(self) -> dict[Trial, float]:
        return {trial: kept["validation_loss"] for trial, kept in self.all.items()}


def complete(
    results: Results,
    protocol: Protocol,
    methods: Sequence[str],
    run: Callable[[Trial], Result],
    minutes: float,
) -> Study:
    """Runs and keeps what is missing of the protocol, until the time is up."""
    began = time.monotonic()
    with tqdm(desc="trials", initial=len(results.all), unit=" trial") as bar:
        while time.monotonic() - began < 60 * minutes:
            study = Study(protocol, results.losses)
            trial = next(study.missing(methods), None)
            if trial is None:
                break
            results.add(trial, run(trial))
            bar.update()
    return Study(protocol, results.losses)


class Trainer:
    """Runs trials of one text, model and length; what can be shared is compiled once.

    Rates and seeds are arguments of what is compiled: a method is compiled once a rank.
    """

    def __init__(self, job: Job):
        self.job = job
        self._loss = init_and_loss(job.model)[1]
        self._validation_loss = jax.jit(self._loss)
        self._compiled = lru_cache(maxsize=2)(self._compile)

    @property
    def setup(self) -> str:
        """What all trials have in common, in a line."""
        s, data = self.job.settings, self.job.facts["data"]
        return (
            f"{s.model} on {s.data} {data['sha256'][:16]}, {s.steps} steps of "
            f"{s.batch_size} x {s.seq_len} tokens, subspaces every {s.update_every}"
        )

    @cached_property
    def _init(self) -> Any:
        def init(key):
            model = Llama(self.job.config, rngs=nnx.Rngs(key))
            return nnx.to_pure_dict(nnx.state(model, nnx.Param))

        return jax.jit(init)

    def optimizer(
        self, method: str, rank: int | None, rate: Any, dense_rate: Any
    ) -> optax.GradientTransformation:
        s, own, config = self.job.settings, METHODS[method], self.job.config
        unit = warmup_cosine(1.0, s.steps)
        tx = own.build(
            lambda step: rate * unit(step),
            rank,
            s.update_every,
            0.0,
            dense=lambda step: dense_rate * unit(step),
            heads=(config.num_attention_heads, config.kv_heads),
            steps=s.steps,
        )
        return optax.chain(optax.clip_by_global_norm(1.0), tx)

    def _compile(self, method: str, rank: int | None) -> Any:
        def step(params, state, batch, rate, dense_rate):
            tx = self.optimizer(method, rank, rate, dense_rate)
            grads = jax.grad(self._loss)(params, batch)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        def init(params):
            return self.optimizer(method, rank, 0.0, 0.0).init(params)

        return jax.jit(init), jax.jit(step, donate_argnums=(0, 1))

    def run(self, trial: Trial) -> Result:
        """Loss, bytes of the state, and time of one trial on the processor."""
        s, began = self.job.settings, time.process_time()
        init, step = self._compiled(trial.method, trial.rank)
        train = Packed(self.job.tokens.train, s.seq_len)
        params = self._init(jax.random.key(trial.seed))
        state, sizes = init(params), []
        tx = self.optimizer(trial.method, trial.rank, trial.rate, trial.dense_rate)
        for done in range(s.steps):
            batch = train.batch(trial.seed, done, s.batch_size)
            params, state = step(params, state, batch, trial.rate, trial.dense_rate)
            if (done + 1) % max(1, s.steps // _SIZES) == 0:
                sizes.append(_used_bytes(tx, state, params))
        validation = Packed(self.job.tokens.validation, s.seq_len).fixed_batches(
            VALIDATION_BATCHES, s.batch_size
        )
        losses = [float(self._validation_loss(params, batch)) for batch in validation]
        whole = lro.state_bytes(tx, params)
        return {
            "validation_loss": float(np.mean(losses)),
            "state_bytes": whole,
            "dense_state_bytes": whole - matrix_state_bytes(tx, params),
            "used_state_bytes": sizes,
            "cpu_seconds": round(time.process_time() - began, 1),
        }

    def state_bytes(self, method: str, rank: int | None) -> int:
        """Of the matrices: embedding, head and norms have no rank."""
        tx = self.optimizer(method, rank, 0.0, 0.0)
        return matrix_state_bytes(tx, self.job.params)

    def equal_bytes(self, rank: int) -> Any:
        """`Protocol.equal_bytes`: the ranks nearest to GaLore's state at this one."""

        @lru_cache
        def found(method: str) -> int | None:
            if METHODS[method].rank is None or method in RANKS:
                return None
            if method == "galore_adamw":
                return rank
            aim = self.state_bytes("galore_adamw", rank)
            low, high = 1, _LARGEST_RANK
            while low < high:  # the least rank with as many bytes
                middle = (low + high) // 2
                if self.state_bytes(method, middle) < aim:
                    low = middle + 1
                else:
                    high = middle
            near = (max(1, low - 1), low)
            return min(near, key=lambda r: abs(self.state_bytes(method, r) - aim))

        return found

    def protocol(self, rank: int, **counts: Any) -> Protocol:
        return Protocol(rank, self.equal_bytes(rank), **counts)


def _used_bytes(tx: Any, state: Any, params: Any) -> int:
    """What the state would take if the ranks that are not used were freed."""
    _, smaller = lro.rank.shrink(tx, state, params)
    return sum(x.nbytes for x in jax.tree.leaves(smaller))
