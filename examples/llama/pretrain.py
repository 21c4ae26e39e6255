"""Pre-trains a LLaMA with several optimizers on the same text and compares them.

    python -m examples.llama.pretrain
    python -m examples.llama.pretrain --methods adamw mlorc_lion --data path:books/
    python -m examples.llama.pretrain --resume

The text defaults to Python's own standard library, so nothing is downloaded.
"""

import dataclasses
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import flax
import jax
import optax
from flax import nnx

import lowrank_optax as lro
from examples.common.adapters import adapt, merge, trained_parameters
from examples.common.command import command
from examples.common.config import check_room
from examples.common.data import load_corpus
from examples.common.errors import BadFile
from examples.common.files import write_json
from examples.common.interrupt import StopRequest
from examples.common.loop import METRICS_FILE, Task, Timetable, train
from examples.common.mesh import Placement, machine
from examples.common.methods import METHODS, matrix_state_bytes
from examples.common.metrics import read_metrics
from examples.common.probe import Probe
from examples.common.processes import by_first
from examples.common.report import Run, table, write_report
from examples.common.schedule import warmup_cosine
from examples.common.settings import (
    RECORD,
    parse_settings,
    read_record,
    settings_record,
    write_record,
)
from examples.common.tokens import END_OF_TEXT, Packed, TokenizedCorpus, tokenize
from examples.common.typed import checked_fields
from examples.llama.config import CONFIGS as CONFIGS
from examples.llama.config import LlamaConfig, named_config
from examples.llama.layerwise import step_of
from examples.llama.loss import whole_rows
from examples.llama.model import Llama
from examples.llama.pretrain_settings import SMOKE, Pretrain
from examples.llama.weights import save_llama

RESULT = "result.json"
MODEL = "model"
TEXT = "data"

_CLIP = 1.0  # the largest norm of the gradient
_VALIDATION_BATCHES = 8
_PROBE_RANK = 8
# More than a token takes on average, so that what is read of a hub dataset lasts for
# the whole run.
_BYTES_PER_TOKEN = 6


@dataclass(frozen=True)
class Job:
    """Checked settings with all that training needs.

    Attributes:
      settings: what was asked for.
      out: the directory of the run.
      config: the model.
      tokens: the text.
      facts: what a reader of the result must know: settings, model, text, versions.
    """

    settings: Pretrain
    out: Path
    config: LlamaConfig
    tokens: TokenizedCorpus
    facts: dict[str, Any]

    def model(self, method: str | None = None) -> Llama:
        """The initial model, as the method trains it; the plain one if None."""
        rngs = nnx.Rngs(self.settings.seed)
        model = Llama(self.config, rngs=rngs)
        if method is not None:
            linear, rank = METHODS[method].linear, self.rank(method)
            if linear is not None and rank is not None:
                adapt(model.layers, linear, rank, rngs=rngs)
        return model

    @cached_property
    def task(self) -> Task:
        """The plain model's loss on the text, in the batch order of the seed."""
        s = self.settings
        train = Packed(self.tokens.train, s.seq_len)
        validation = Packed(self.tokens.validation, s.seq_len)
        init, loss = init_and_loss(self.model)
        return Task(
            init=init,
            loss=loss,
            batch=lambda step: train.batch(s.seed, step, s.batch_size),
            validation=validation.fixed_batches(_VALIDATION_BATCHES, s.batch_size),
            tokens_per_step=s.batch_size * s.seq_len,
            step_of=self.step_of if s.layerwise else None,
        )

    def task_of(self, method: str) -> Task:
        """The task as the method has it: of the model that it trains."""
        if METHODS[method].linear is None:
            return self.task
        init, loss = init_and_loss(partial(self.model, method))
        gradient = jax.grad(self.task.loss)

        def probed(params: Any, rows: jax.Array) -> Any:
            """That of the merged weights, to be compared with other methods'."""
            model = self.trained(method, params)
            return gradient(nnx.to_pure_dict(nnx.state(model, nnx.Param)), rows)

        return dataclasses.replace(self.task, init=init, loss=loss, probed=probed)

    def trained(self, method: str, params: Any) -> Llama:
        """The plain model that the method's parameters stand for."""
        graph = nnx.graphdef(nnx.eval_shape(partial(self.model, method)))
        model = nnx.merge(graph, params)
        merge(model.layers)
        return model

    @property
    def step_of(self) -> Callable[..., Any]:
        """What makes steps of per-layer updates."""
        return step_of(self.config, _CLIP, placement=self.placement)

    @cached_property
    def placement(self) -> Placement | None:
        """Where all of it lies, as `--mesh` says."""
        return Placement.of(self.settings.mesh)

    @cached_property
    def params(self) -> Any:
        """Shapes and types of the plain model's parameters."""
        return jax.eval_shape(self.task.init)

    @property
    def model_fact(self) -> str:
        """Which model, how large, and what it starts from."""
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.params))
        return f"{self.settings.model} ({count:,} parameters, from scratch)"

    def rank(self, method: str) -> int | None:
        """The rank, the method's own where none was asked for."""
        return METHODS[method].rank_of(self.settings.rank)

    def rates(self, method: str) -> tuple[float, float]:
        """Peak learning rates of matrices and of all else, the method's own where none
        was asked for."""
        s, own = self.settings, METHODS[method]
        return s.learning_rate or own.learning_rate, (
            s.dense_learning_rate or own.dense_learning_rate
        )

    def optimizer(self, method: str) -> optax.GradientTransformation:
        """The method under its schedule, behind a clip of the gradient's norm."""
        s = self.settings
        schedule, dense = (warmup_cosine(x, s.steps) for x in self.rates(method))
        tx = METHODS[method].build(
            schedule,
            self.rank(method),
            s.update_every,
            s.weight_decay,
            dense=dense,
            heads=(self.config.num_attention_heads, self.config.kv_heads),
            steps=s.steps,
        )
        if s.layerwise:
            return tx  # the step clips
        return optax.chain(optax.clip_by_global_norm(_CLIP), tx)

    def check(self) -> None:
        """Raises ValueError for what would fail later: too little text, a method
        that does not fit the model."""
        self.task.batch(0)
        if self.placement is not None:
            self.placement.check_rows(self.settings.batch_size)
        for method in self.settings.methods:
            task, tx = self.task_of(method), self.optimizer(method)
            params = jax.eval_shape(task.init)
            state = jax.eval_shape(tx.init, params)
            if task.step_of is not None:
                jax.eval_shape(task.step_of(tx), params, state, task.batch(0))

    def save(self) -> None:
        """Makes the directory, with what `--resume` needs."""
        self.facts["data"]["tokens_sha256"] = self.tokens.save(self.out / TEXT)
        # The record last: what it is missing from is no run.
        write_record(self.out, self.facts)

    def run(self, method: str, stop: StopRequest) -> Run:
        """Trains with one method, or goes on with it, and sums it up.

        Raises:
          Interrupted: on request of `stop`.
        """
        s = self.settings
        directory = self.out / method
        task, tx = self.task_of(method), self.optimizer(method)
        timetable = Timetable(
            s.steps, s.log_every, s.eval_every, s.checkpoint_every, s.shrink_every
        )
        # Which would need the whole gradient.
        probe = None if s.layerwise else Probe.of(self.params, _PROBE_RANK)
        where = self.placement
        state = train(
            task, tx, timetable, probe, directory, method, stop, placement=where
        )
        model = self.trained(method, state.params)
        by_first(lambda: save_llama(model, directory / MODEL, self.tokens.tokenizer))

        params = jax.eval_shape(task.init)
        rate, dense = self.rates(method)
        records = read_metrics(directory / METRICS_FILE)
        freed = sum(record.get("freed_bytes", 0) for record in records)
        return Run(
            method=method,
            rank=self.rank(method),
            learning_rate=rate,
            dense_learning_rate=dense,
            trained_parameters=trained_parameters(params),
            state_bytes=lro.state_bytes(tx, params) - freed,
            matrix_state_bytes=matrix_state_bytes(tx, params) - freed,
            tokens_per_step=self.task.tokens_per_step,
            records=records,
        )


def init_and_loss(model: Callable[[], Llama]) -> tuple[Callable, Callable]:
    """`Task.init` and `Task.loss` of the model that is made by a call."""
    graph = nnx.graphdef(nnx.eval_shape(model))

    @jax.jit
    def init() -> Any:
        return nnx.to_pure_dict(nnx.state(model(), nnx.Param))

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        text = whole_rows(rows)
        return text.mean_loss(nnx.merge(graph, params)(text.ids))

    return init, loss


def prepare(settings: Pretrain, out: Path) -> Job:
    """Everything that training needs, checked as far as it can be; writes nothing.

    Raises:
      ValueError, OSError: settings, model or text that cannot be used.
    """
    settings.check()
    if settings.resume:
        return resumed(settings, out)

    config = read_config(settings)
    tokens_needed = settings.steps * settings.batch_size * settings.seq_len
    corpus = load_corpus(settings.data, hub_bytes=_BYTES_PER_TOKEN * tokens_needed)
    tokens = tokenize(corpus, config.vocab_size)
    # For whoever goes on with the model.
    end = tokens.tokenizer.token_to_id(END_OF_TEXT)
    config = dataclasses.replace(config, bos_token_id=None, eos_token_id=end)
    facts = {
        **settings_record(settings),
        "model": dataclasses.asdict(config),
        "data": {
            "source": corpus.source,
            "sha256": corpus.sha256,
            "python": platform.python_version(),
            "train_documents": len(corpus.train),
            "train_tokens": len(tokens.train),
            "validation_documents": len(corpus.validation),
            "validation_tokens": len(tokens.validation),
        },
        "versions": {
            module.__name__: module.__version__ for module in (lro, jax, optax, flax)
        },
        "device": machine(settings.mesh),
    }
    job = Job(settings, out, config, tokens, facts)
    job.check()
    return job


def resumed(settings: Pretrain, out: Path) -> Job:
    """The job that is on record.

    Raises:
      ValueError, OSError: what is on record is damaged, or of another command.
    """
    facts = read_record(out)
    try:
        config = LlamaConfig(**checked_fields(LlamaConfig, facts.get("model")))
        expected = facts["data"]["tokens_sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise BadFile(f"{out / RECORD} is of another command: {error!r}.") from error
    tokens = TokenizedCorpus.load(out / TEXT, expected)
    return Job(settings, out, config, tokens, facts)


def read_config(settings: Pretrain) -> LlamaConfig:
    """The model that `--model` names, checked against sequence length and memory."""
    model = settings.model
    config = named_config(model, settings.seq_len, scan_layers=settings.layerwise)
    check_room(config.parameters, config.param_dtype, model)
    return config


def finish(job: Job, runs: list[Run]) -> list[Path]:
    """Writes result.json, report.md and the plots; returns their paths."""
    out, s, data = job.out, job.settings, job.facts["data"]
    facts = {
        "model": job.model_fact,
        "text": f"{data['source']} (Python {data['python']}, SHA-256"
        f" {data['sha256'][:16]}), {data['train_tokens']:,} tokens to train on,"
        f" {data['validation_tokens']:,} held out by document",
        "training": f"{s.steps} steps of {s.batch_size} x {s.seq_len} tokens, seed"
        f" {s.seed}, equal batches for every method; one seed does not rank methods",
        "learning rates": "each method's own two by default, of matrices and of"
        " embedding, head and norms, as tuned at rank 32 in"
        " benchmarks/records/comparison.md. GaLore and its kind multiply the former by"
        " their scale, 0.25",
        "machine": job.facts["device"],
        "versions": ", ".join(f"{k} {v}" for k, v in job.facts["versions"].items()),
    }
    paths = write_report(out, "LLaMA pre-training", facts, runs)
    result = {**job.facts, "runs": {run.method: run.summary() for run in runs}}
    # Last and whole: that it exists says that the run is complete.
    return [write_json(out / RESULT, result), *paths]


def begin(job: Job) -> None:
    """Says what is run, and puts it on record unless it is resumed."""
    print(f"{job.model_fact} on {job.facts['data']['source']}, run in {job.out}")
    if not job.settings.resume:
        job.save()


def work(job: Job, stop: StopRequest) -> tuple[str, list[Path]] | None:
    """Trains with every method; the table that is printed, and the files written."""
    runs = [job.run(method, stop) for method in job.settings.methods]
    return by_first(lambda: (table(runs), finish(job, runs)))


def main(argv: list[str] | None = None) -> int:
    """Runs the job; returns the exit status: 0, 2 for bad input, 130 if stopped."""
    argv = sys.argv[1:] if argv is None else argv
    return command(
        "examples.llama.pretrain",
        lambda: prepare(*parse_settings(argv, "pretrain", Pretrain(), SMOKE)),
        begin,
        work,
    )


if __name__ == "__main__":
    sys.exit(main())
