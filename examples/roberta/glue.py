"""Fine-tunes RoBERTa or BERT on a GLUE task by several methods and compares them.

    python -m examples.roberta.glue
    python -m examples.roberta.glue --task mrpc --data MRPC/ --model roberta-base/
    python -m examples.roberta.glue --resume

Without arguments nothing is downloaded: a small encoder is pre-trained on docstrings
and fine-tuned to tell which package of the standard library a snippet is from.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax
from tokenizers import Tokenizer

import lowrank_optax as lro
from examples.common.command import command
from examples.common.files import sha256
from examples.common.interrupt import StopRequest
from examples.common.mesh import machine
from examples.common.processes import by_first
from examples.common.settings import (
    parse_settings,
    settings_record,
    unchanged,
    write_record,
)
from examples.common.tokens import (
    TOKENIZER,
    read_tokenizer,
    save_tokenizer,
    tokenizer_sha256,
)
from examples.common.weights import local_directory
from examples.roberta.batches import encode
from examples.roberta.config import EncoderConfig
from examples.roberta.data import Dataset, Examples, load_dataset
from examples.roberta.job import Job
from examples.roberta.masked import ENCODERS
from examples.roberta.report import comparison, write_files
from examples.roberta.settings import SMOKE, Glue
from examples.roberta.stdlib import STDLIB, load_stdlib
from examples.roberta.tokenizer import load_tokenizer, train_tokenizer
from examples.roberta.weights import Weights, load_classifier


@dataclasses.dataclass(frozen=True)
class Model:
    """What is fine-tuned.

    Attributes:
      config: the classifier's.
      tokenizer: its own.
      weights: None where it is made first.
      source: where it is from.
      start: what training starts from.
      sha256: hash of its files; None where it is made here.
    """

    config: EncoderConfig
    tokenizer: Tokenizer
    weights: Weights | None
    source: str
    start: str
    sha256: str | None

    @property
    def facts(self) -> dict[str, Any]:
        """What a reader of the result must know of it."""
        return {
            "source": self.source,
            "start": self.start,
            "sha256": self.sha256,
            "tokenizer_sha256": tokenizer_sha256(self.tokenizer),
            **dataclasses.asdict(self.config),
        }


def prepare(settings: Glue, out: Path) -> Job:
    """Everything that training needs, checked as far as it can be; writes nothing.

    Raises:
      ValueError, OSError: settings, model or data that cannot be used, or that are no
        longer what the run that is resumed was started with.
    """
    settings.check()
    task = settings.chosen_task
    dataset, docstrings = _data(settings)
    labels = dataset.labels or ("score",)
    chosen = (
        _made(settings, out, labels, docstrings)
        if settings.made_here
        else _given(settings, labels)
    )
    config, tokenizer = chosen.config, chosen.tokenizer
    if task.preset.max_length > config.max_length:
        raise ValueError(
            f"Cannot train on {task.preset.max_length} tokens: the model takes"
            f" {config.max_length}. Lower --max-length."
        )
    parts = {"train": dataset.train, **dataset.validation}
    encoded = encode(tokenizer, parts, task.preset.max_length, config)
    train = encoded.pop("train")
    facts = {
        **settings_record(settings),
        "model": chosen.facts,
        "data": {
            "source": dataset.source,
            "sha256": dataset.sha256,
            "labels": list(dataset.labels),
            "train_examples": len(train),
            "validation_examples": sum(map(len, encoded.values())),
            "left_out": sum(part.left_out for part in parts.values()),
            "lengths": list(train.lengths),
        },
        "versions": {
            module.__name__: module.__version__ for module in (lro, jax, optax, flax)
        },
        "device": machine(settings.mesh),
    }
    facts = json.loads(json.dumps(facts))
    if settings.resume:
        # Where the run was begun is where it is from.
        facts |= unchanged(out, facts)
    job = Job(
        settings,
        out,
        config,
        tokenizer,
        train,
        encoded,
        docstrings,
        chosen.weights,
        facts,
    )
    job.check()
    return job


def _made(
    settings: Glue, out: Path, labels: tuple[str, ...], docstrings: Sequence[str]
) -> Model:
    """The model that is pre-trained first."""
    config = ENCODERS[settings.model]
    if settings.resume:
        tokenizer = read_tokenizer(out / TOKENIZER)
    else:
        tokenizer = train_tokenizer(docstrings, config.vocab_size)
    size = tokenizer.get_vocab_size()
    config = dataclasses.replace(config, vocab_size=size, labels=labels)
    start = (
        f"pretrained by masked language modelling of docstrings,"
        f" {settings.pretrain_steps} steps, with a fresh head"
    )
    source = f"{settings.model}, made here"
    return Model(config, tokenizer, None, source, start, None)


def _given(settings: Glue, labels: tuple[str, ...]) -> Model:
    """The model of a directory, or of the hub."""
    directory = local_directory(settings.model)
    weights = load_classifier(directory, labels)
    tokenizer = load_tokenizer(directory, weights.config)
    files = [
        *sorted(directory.glob("*.json")),
        *sorted(directory.glob("*.safetensors")),
    ]
    return Model(
        weights.config,
        tokenizer,
        weights,
        settings.model,
        weights.start,
        sha256(files),
    )


def _data(settings: Glue) -> tuple[Dataset, Sequence[str]]:
    """The data set at the size asked for, and docstrings where they are needed."""
    task, own = settings.chosen_task, None
    docstrings: Sequence[str] = ()
    if task.name == STDLIB.name or settings.made_here:
        own, docstrings = load_stdlib()
    if task.name == STDLIB.name and own is not None:
        dataset = own
    else:
        dataset = load_dataset(task, settings.data)
    preset = task.preset
    return dataclasses.replace(
        dataset,
        train=_sample(dataset.train, preset.train_examples),
        validation={
            name: _sample(part, preset.validation_examples)
            for name, part in dataset.validation.items()
        },
    ), docstrings


def _sample(examples: Examples, count: int | None) -> Examples:
    """So many of the examples, the same for every seed of training."""
    if count is None or count >= len(examples):
        return examples
    rows = np.random.default_rng(0).permutation(len(examples))[:count]
    return examples.take(np.sort(rows))


def begin(job: Job) -> None:
    """Says what is run, and puts it on record unless it is resumed."""
    model, data = job.facts["model"], job.facts["data"]
    print(f"{model['source']}, {model['start']}; on {job.settings.chosen_task.title},")
    print(f"{data['train_examples']:,} examples of {data['source']}; run in {job.out}")
    if not job.settings.resume:
        # The record last: what it is missing from is no run.
        save_tokenizer(job.tokenizer, job.out / TOKENIZER)
        write_record(job.out, job.facts)


def work(job: Job, stop: StopRequest) -> tuple[str, list[Path]] | None:
    """Trains with every method; the table that is printed, and the files written."""
    weights = job.load(stop)
    trained = {
        method: job.run(method, weights, stop) for method in job.settings.methods
    }

    def finish() -> tuple[str, list[Path]]:
        paths = write_files(job, trained)
        return comparison(job, trained), paths

    return by_first(finish)


def main(argv: list[str] | None = None) -> int:
    """Runs the job; returns the exit status: 0, 2 for bad input, 130 if stopped."""
    argv = sys.argv[1:] if argv is None else argv
    return command(
        "examples.roberta.glue",
        lambda: prepare(*parse_settings(argv, "glue", Glue(), SMOKE)),
        begin,
        work,
    )


if __name__ == "__main__":
    sys.exit(main())
