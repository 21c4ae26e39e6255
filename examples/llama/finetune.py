"""Fine-tunes a LLaMA on instructions with several optimizers and compares them.

    python -m examples.llama.finetune
    python -m examples.llama.finetune --data train.jsonl --test test.jsonl --model DIR
    python -m examples.llama.finetune --preset mlorc-metamath --data MetaMathQA.jsonl
    python -m examples.llama.finetune --data trainset.csv --test testset_w_refs.csv
    python -m examples.llama.finetune --resume

With no file it makes up word problems in the form of GSM8K; with no weights it trains
from scratch, and says so.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import flax
import jax
import optax
import tokenizers

import lowrank_optax as lro
from examples.common.command import command
from examples.common.interrupt import StopRequest
from examples.common.mesh import machine
from examples.common.processes import by_first
from examples.common.settings import parse_settings, settings_record, unchanged
from examples.common.tokens import TOKENIZER, tokenizer_sha256
from examples.llama.base import load_base
from examples.llama.finetune_job import Job
from examples.llama.finetune_report import comparison, write_files
from examples.llama.finetune_settings import PRESETS, SMOKE, Finetune
from examples.llama.graders import grader_of, questions_of
from examples.llama.instructions import Instructions, load_instructions
from examples.llama.rows import Rows, encode, lay_out

X = TypeVar("X")


def prepare(settings: Finetune, out: Path) -> Job:
    """Everything that training needs, checked as far as it can be; writes nothing.

    Raises:
      ValueError, OSError: settings, model or data that cannot be used; in a run that
        is resumed, a model or data that are no longer as they were.
    """
    (s := settings).check()
    data = load_instructions(s.data, None if s.test is None else Path(s.test))
    chosen = Instructions(
        data.source,
        spread(data.train, s.train_examples),
        spread(data.test, s.test_examples),
    )
    grader = grader_of(data.test, s.run_programs)
    questions = spread(questions_of(grader, data.test), s.test_examples)
    base = load_base(
        s.model,
        [x.prompt + x.response for x in chosen.train],
        out / TOKENIZER,
        dtype=s.param_dtype,
        param_dtype=s.param_dtype,
        remat=s.remat,
    )
    train, test = (encode(base.tokenizer, part, base.stop[0]) for part in chosen.parts)
    asked = [x.instruction for x in questions]
    prompts = [x.prompt for x in encode(base.tokenizer, asked, base.stop[0])]
    base = base.with_positions(s.seq_len)
    if base.params is None and prompts:
        base = base.with_positions(max(map(len, prompts)) + s.max_new_tokens)
    rows = lay_out(train, chosen.train, s.seq_len, s.packing, s.drop_long)
    tested = lay_out(test, chosen.test, s.seq_len, s.packing, s.drop_long)
    facts = {
        **settings_record(s),
        "start": "from scratch" if base.params is None else "pre-trained weights",
        "model": {
            "source": base.source,
            "sha256": base.sha256,
            "tokenizer_sha256": tokenizer_sha256(base.tokenizer),
            **dataclasses.asdict(base.config),
        },
        "data": {
            "source": chosen.source,
            "sha256": chosen.sha256,
            "train": laid_out(rows, len(train)),
            "test": laid_out(tested, len(test)),
            "questions": len(questions),
            "asked": None if grader is None else grader.asked,
        },
        "versions": {
            module.__name__: module.__version__
            for module in (lro, jax, optax, flax, tokenizers)
        },
        "device": machine(s.mesh),
    }
    job = Job(s, out, base, rows, tested, grader, questions, prompts, facts)
    job.check()
    if s.resume:
        return dataclasses.replace(job, facts=unchanged(out, facts))
    return job


def laid_out(rows: Rows, examples: int) -> dict[str, int]:
    """Facts about the rows that these many examples made."""
    return {
        "examples": len(rows.examples),
        "left_out": examples - len(rows.examples),
        "rows": len(rows.layout),
        "response_tokens": sum(len(x.response) for x in rows.examples),
    }


def spread(examples: Sequence[X], count: int | None) -> tuple[X, ...]:
    """So many of the examples, evenly spread; all where there are no more."""
    if count is None or count >= len(examples):
        return tuple(examples)
    return tuple(examples[i * len(examples) // count] for i in range(count))


def begin(job: Job) -> None:
    """Says what is run, and puts it on record unless it is resumed."""
    s, start, data = job.settings, job.facts["start"], job.facts["data"]["source"]
    print(f"{s.model}, {start}, on {data}: {job.steps} steps, run in {job.out}")
    if not s.resume:
        job.save()


def work(job: Job, stop: StopRequest) -> tuple[str, list[Path]] | None:
    """Trains with every method; the table that is printed, and the files written."""
    before = job.before(stop)
    runs = {method: job.run(method, stop) for method in job.settings.methods}

    def finish() -> tuple[str, list[Path]]:
        paths = write_files(job.out, job.facts, job.steps, before, runs)
        return comparison(before, runs), paths

    return by_first(finish)


def main(argv: list[str] | None = None) -> int:
    """Runs the job; returns the exit status: 0, 2 for bad input, 130 if stopped."""
    argv = sys.argv[1:] if argv is None else argv
    return command(
        "examples.llama.finetune",
        lambda: prepare(*parse_settings(argv, "finetune", Finetune(), SMOKE, PRESETS)),
        begin,
        work,
    )


if __name__ == "__main__":
    sys.exit(main())
