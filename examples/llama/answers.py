"""Answers to word problems, and how many of their final numbers are right."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from examples.common.interrupt import Interrupted, StopRequest
from examples.common.processes import any_of, is_first
from examples.llama.generate import generate
from examples.llama.instructions import Instruction, final_number
from examples.llama.model import Llama


def answer(
    model: Llama,
    tokenizer: Tokenizer,
    problems: Sequence[Instruction],
    prompts: Sequence[Sequence[int]],
    *,
    label: str,
    stop_request: StopRequest,
    **options: Any,
) -> list[dict[str, Any]]:
    """The model's response to each problem, and whether its final number is right.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      problems: each with a final number.
      prompts: their token ids.
      label: what the progress bar calls this.
      stop_request: asked after every batch.
      **options: of `generate`.

    Returns:
      For each problem a dict of `prompt`, `response`, `expected` and `found` (the
      numbers as text, None where there is none) and `correct`.

    Raises:
      Interrupted: on request of `stop_request`.
    """

    def watched(batches: Iterable[int]) -> Iterator[int]:
        bar = tqdm(batches, desc=label, dynamic_ncols=True, disable=not is_first())
        for batch in bar:
            if any_of(stop_request.requested):
                raise Interrupted(f"{label} stopped")
            yield batch

    responses = generate(model, prompts, over=watched, **options)
    rows = []
    for problem, ids in zip(problems, responses, strict=True):
        rows.append(_row(problem, tokenizer.decode(ids)))
    return rows


def checked_answers(problems: Sequence[Instruction], rows: Any) -> list[dict[str, Any]]:
    """The rows, if `answer` may have made them.

    Raises:
      ValueError: they are of other problems, or do not agree with themselves.
    """
    if not isinstance(rows, list) or len(rows) != len(problems):
        raise ValueError(f"it has not {len(problems)} answers.")
    for number, (problem, row) in enumerate(zip(problems, rows, strict=True), start=1):
        text = row.get("response") if isinstance(row, dict) else None
        if not isinstance(text, str) or row != _row(problem, text):
            raise ValueError(f"its answer {number} is of another problem, or changed.")
    return rows


def exact_match(rows: Sequence[dict[str, Any]]) -> float:
    """The share of right final numbers."""
    return sum(row["correct"] for row in rows) / len(rows)


def _row(problem: Instruction, text: str) -> dict[str, Any]:
    found = final_number(text)
    return {
        "prompt": problem.prompt,
        "response": text,
        "expected": str(problem.number),
        "found": None if found is None else str(found),
        "correct": found == problem.number,
    }
