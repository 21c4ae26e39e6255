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
from examples.llama.pretrain import RESULT


@dataclass(frozen=True)
class Finetuned:
    """One finished run.

    Attributes:
      run: its figures.
      seed: its seed.
      exact_match: the share of problems answered right; None without problems.
    """

    run: Run
    seed: int
    exact_match: float | None

    def summary(self) -> dict[str, Any]:
        """The run for the result file."""
        return {**self.run.summary(), "exact_match": self.exact_match}


Finished = Mapping[str, Sequence[Finetuned]]
"""The runs of each method, one a seed."""


def comparison(before: float | None, runs: Finished) -> str:
    """The methods as a Markdown table, a row each."""
    header = [
        "method",
        "rank",
        *RATES,
        "loss before",
        "loss after",
        "exact match before",
        "exact match after",
        "trained parameters",
        "optimizer state",
        "step at most",
        "median step",
    ]
    rows = []
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
                "" if before is None else f"{before:.1%}",
                _percent([x.exact_match for x in done]),
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
    before: float | None,
    runs: Finished,
) -> list[Path]:
    """Writes report.md with its plots and, last, result.json; returns the paths."""
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
        "exact match": f"of the final number in {data['problems']:,} problems,"
        f" {s['max_new_tokens']} tokens at most, temperature {s['temperature']:g}"
        if data["problems"]
        else "not measured: the responses to test on have no final number",
        "machine": facts["device"],
        "versions": ", ".join(f"{k} {v}" for k, v in facts["versions"].items()),
    }
    if len(s["seeds"]) > 1:
        lines["figures"] = "mean ± standard deviation over the seeds"
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
    matches = {
        method: [100 * x.exact_match for x in done if x.exact_match is not None]
        for method, done in runs.items()
    }
    if data["problems"]:
        published = PUBLISHED.get(s["preset"], {})
        draw = partial(scores, matches, published, "exact match (%)")
        plots.insert(1, Plot("exact_match", "Exact match", draw))
    table = comparison(before, runs)
    paths = write_page(out, "LLaMA fine-tuning", lines, [table, *plots])
    result = {
        **facts,
        "steps": steps,
        "exact_match_before": before,
        "runs": {
            method: {str(x.seed): x.summary() for x in done}
            for method, done in runs.items()
        },
        "means": {
            method: {
                "validation_loss": mean_and_spread(
                    [x.run.validation_loss for x in done]
                ),
                "exact_match": _mean_and_spread([x.exact_match for x in done]),
            }
            for method, done in runs.items()
        },
    }
    # Last and whole: that it exists says that the run is complete.
    return [write_json(out / RESULT, result), *paths]


def _percent(matches: Sequence[float | None]) -> str:
    known = [100 * x for x in matches if x is not None]
    return f"{written(known, 1)}%" if known else ""


def _mean_and_spread(values: Sequence[float | None]) -> dict[str, float | None] | None:
    known = [x for x in values if x is not None]
    return mean_and_spread(known) if known else None
