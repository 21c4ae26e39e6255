"""The report of a fine-tuning job: what each method reached, over the seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from examples.common.files import write_json
from examples.common.report import (
    RATES,
    Plot,
    Run,
    markdown_table,
    memory_bars,
    write_page,
)
from examples.common.seeds import curves, mean_and_spread, scores, written
from examples.llama.finetune_settings import PUBLISHED
from examples.llama.graders import Scores
from examples.llama.pretrain import RESULT


@dataclass(frozen=True)
class Finetuned:
    """One finished run.

    Attributes:
      run: its figures.
      seed: its seed.
      scores: of its answers, each once an evaluation; none where nothing is judged.
    """

    run: Run
    seed: int
    scores: Scores

    def summary(self) -> dict[str, Any]:
        """The run for the result file."""
        return {**self.run.summary(), "scores": self.scores}


Finished = Mapping[str, Sequence[Finetuned]]
"""The runs of each method, one a seed."""


# Which are no shares of a whole.
_NO_SHARES = ("nist", "cider")


def comparison(before: Scores, runs: Finished) -> str:
    """The methods as a Markdown table, a row each, behind one of the model before."""
    names = _score_names(runs)
    header = [
        "method",
        "rank",
        *RATES,
        "loss before",
        "loss after",
        *(name.replace("_", " ") for name in names),
        "trained parameters",
        "optimizer state",
        "step at most",
        "median step",
    ]
    rows = []
    if before:
        shown = [_written(name, before[name]) for name in names]
        rows.append(["before", *[""] * 5, *shown, *[""] * 4])
    for method, done in runs.items():
        all_runs = [x.run for x in done]
        run = all_runs[0]
        seconds = mean(x.step_seconds for x in all_runs)
        rows.append(
            [
                f"`{method}`",
                "" if run.rank is None else str(run.rank),
                *run.rates,
                written([x.initial_validation_loss for x in all_runs], 3),
                written([x.validation_loss for x in all_runs], 3),
                *(_written(name, _all(done, name)) for name in names),
                f"{run.trained_parameters:,}",
                f"{run.state_bytes:,} B",
                f"{run.peak_bytes / 2**20:,.1f} MiB",
                f"{seconds * 1e3:,.1f} ms",
            ]
        )
    return markdown_table(header, rows)


def write_files(
    out: Path,
    facts: dict[str, Any],
    steps: int,
    before: Scores,
    runs: Finished,
) -> list[Path]:
    """Writes report.md with its plots and, last, result.json; returns the paths."""
    names = _score_names(runs)
    lines = _setting(facts, steps, names)
    plots = _plots(runs, names, PUBLISHED.get(facts["settings"]["preset"], {}))
    table = comparison(before, runs)
    paths = write_page(out, "LLaMA fine-tuning", lines, [table, *plots])
    result = {
        **facts,
        "steps": steps,
        "before": before,
        "runs": {
            method: {str(x.seed): x.summary() for x in done}
            for method, done in runs.items()
        },
        "means": {
            method: {
                "validation_loss": mean_and_spread(
                    [x.run.validation_loss for x in done]
                ),
                **{name: mean_and_spread(_all(done, name)) for name in names},
            }
            for method, done in runs.items()
        },
    }
    # Last and whole: that it exists says that the run is complete.
    return [write_json(out / RESULT, result), *paths]


def _setting(facts: dict[str, Any], steps: int, names: Sequence[str]) -> dict[str, str]:
    """What was trained, how and where, as named facts."""
    s, data, model = facts["settings"], facts["data"], facts["model"]
    lines = {
        "model": f"{model['source']}, {facts['start']}",
        "data": f"{data['source']} (SHA-256 {data['sha256'][:16]}): "
        + "; ".join(
            f"to {part}, {found['examples']:,} examples in {found['rows']:,} rows, "
            f"{found['response_tokens']:,} tokens of responses, {found['left_out']:,}"
            " left out as too long"
            for part in ("train", "test")
            for found in [data[part]]
        ),
        "training": f"{steps} steps of {s['batch_size']} rows of {s['seq_len']} tokens,"
        f" weights in {s['param_dtype']}, seeds {', '.join(map(str, s['seeds']))}; the"
        " loss is that of the responses",
        "answers": f"to {data['questions']:,} questions, judged by {data['asked']},"
        f" {s['max_new_tokens']} tokens at most, temperature {s['temperature']:g},"
        f" {s['evaluations']} times each"
        if data["questions"]
        else "not judged: nothing says of a response to test on whether it is right",
        "machine": facts["device"],
        "versions": ", ".join(f"{k} {v}" for k, v in facts["versions"].items()),
    }
    if len(s["seeds"]) * s["evaluations"] > 1:
        lines["figures"] = (
            "mean ± standard deviation over the seeds, of answers over their"
            " evaluations too"
        )
    if "bleu" in names and "meteor" not in names:
        lines["METEOR"] = (
            "not computed, as NLTK has no WordNet here: python -m nltk.downloader"
            " wordnet"
        )
    return lines


def _plots(
    runs: Finished, names: Sequence[str], published: Mapping[str, Mapping[str, float]]
) -> list[Plot]:
    groups = {method: [x.run for x in done] for method, done in runs.items()}
    plots = [
        Plot(
            "loss",
            "Loss",
            partial(curves, groups, "validation_loss", "loss (nats per token)"),
        ),
        Plot(
            "memory",
            "Optimizer state",
            partial(memory_bars, [same[0] for same in groups.values()]),
        ),
    ]
    for name in names[:1]:
        values = {
            method: _percents(name, _all(done, name)) for method, done in runs.items()
        }
        title = name.replace("_", " ")
        draw = partial(scores, values, published, f"{title} (%)")
        plots.insert(1, Plot(name, title.capitalize(), draw))
    return plots


def _score_names(runs: Finished) -> list[str]:
    return [name for done in list(runs.values())[:1] for name in done[0].scores]


def _all(done: Sequence[Finetuned], name: str) -> list[float]:
    """A score of all seeds and evaluations."""
    return [value for x in done for value in x.scores[name]]


def _percents(name: str, values: Sequence[float]) -> list[float]:
    return [value if name in _NO_SHARES else 100 * value for value in values]


def _written(name: str, values: Sequence[float]) -> str:
    digits, sign = (2, "") if name in _NO_SHARES else (1, "%")
    return written(_percents(name, values), digits) + sign
