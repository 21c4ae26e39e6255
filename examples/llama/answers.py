"""Answers of a model to questions, and what they are worth."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from examples.common.interrupt import Interrupted, StopRequest
from examples.common.processes import any_of, is_first
from examples.llama.generate import generate
from examples.llama.graders import Grader, Question, Row
from examples.llama.model import Llama


def answer(
    model: Llama,
    tokenizer: Tokenizer,
    grader: Grader,
    questions: Sequence[Question],
    prompts: Sequence[Sequence[int]],
    *,
    label: str,
    stop_request: StopRequest,
    **options: Any,
) -> list[Row]:
    """The model's response to each question, and how it is judged.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      grader: judges the responses.
      questions: what is asked.
      prompts: the token ids of their prompts.
      label: what the progress bars call this.
      stop_request: asked after every batch, and every judgement.
      **options: of `generate`.

    Returns:
      For each question a dict of `prompt` and `response`, and what the grader adds.

    Raises:
      Interrupted: on request of `stop_request`.
    """

    def watched(items: Iterable[Any], what: str) -> Iterator[Any]:
        name = f"{label}, {what}"
        bar = tqdm(items, desc=name, dynamic_ncols=True, disable=not is_first())
        for item in bar:
            if any_of(stop_request.requested):
                raise Interrupted(f"{name} stopped")
            yield item

    def over(batches: Iterable[int]) -> Iterator[int]:
        return watched(batches, "answers")

    responses = generate(model, prompts, over=over, **options)
    pairs = list(zip(questions, map(tokenizer.decode, responses), strict=True))
    return [
        {"prompt": question.prompt, "response": text, **grader.grade(question, text)}
        for question, text in watched(pairs, "grades")
    ]


def checked_answers(
    grader: Grader, questions: Sequence[Question], rows: Any
) -> list[Row]:
    """The rows, if `answer` may have made them.

    Raises:
      ValueError: they are of other questions, or do not agree with themselves.
    """
    if not isinstance(rows, list) or len(rows) != len(questions):
        raise ValueError(f"it has not {len(questions)} answers.")
    for number, (question, row) in enumerate(zip(questions, rows, strict=True), 1):
        grade = dict(row) if isinstance(row, dict) else {}
        prompt, text = grade.pop("prompt", None), grade.pop("response", None)
        same = prompt == question.prompt and isinstance(text, str)
        if not same or not grader.agrees(question, text, grade):
            raise ValueError(f"its answer {number} is of another question, or changed.")
    return rows
