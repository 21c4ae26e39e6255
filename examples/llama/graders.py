"""How answers are judged: by a final number, by likeness to a text, by unit tests."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from examples.llama.final_number import final_number
from examples.llama.forms import Instruction
from examples.llama.programs import PASSED, outcome, pass_at_k

Row = dict[str, Any]
Scores = dict[str, list[float]]
"""Of each score its values, one an evaluation."""


@dataclass(frozen=True)
class Question:
    """What a model is asked.

    Attributes:
      instruction: the example, or the first of those with its prompt.
      references: the responses of all of these.
    """

    instruction: Instruction
    references: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return self.instruction.prompt


class Grader(Protocol):
    """Judges answers.

    Attributes:
      asked: what is judged, for a report.
    """

    asked: str

    def judges(self, instruction: Instruction) -> bool:
        """Whether answers to it can be judged."""

    def grade(self, question: Question, response: str) -> Row:
        """What is put on record of an answer, beside prompt and response."""

    def agrees(self, question: Question, response: str, grade: Row) -> bool:
        """Whether `grade` may have been made of this answer."""

    def scores(self, evaluations: Sequence[Sequence[Row]]) -> Scores:
        """The scores of all answers, `evaluations` times to each question."""


class FinalNumber:
    """The share of answers with the right final number."""

    asked = "the final number"

    def judges(self, instruction: Instruction) -> bool:
        return instruction.number is not None

    def grade(self, question: Question, response: str) -> Row:
        found, expected = final_number(response), question.instruction.number
        return {
            "expected": str(expected),
            "found": None if found is None else str(found),
            "correct": found == expected,
        }

    def agrees(self, question: Question, response: str, grade: Row) -> bool:
        return grade == self.grade(question, response)

    def scores(self, evaluations: Sequence[Sequence[Row]]) -> Scores:
        return {"exact_match": [_share(rows, "correct") for rows in evaluations]}


class Likeness:
    """How near answers are to all responses to their prompt.

    Raises:
      ValueError: what computes the scores is not installed.
    """

    asked = "likeness to the responses"

    def __init__(self):
        try:
            from examples.llama.overlap import likeness
        except ImportError as error:
            raise ValueError(
                f"Cannot score texts without {error.name}: pip install -e '.[scores]'."
            ) from error
        self._likeness = likeness

    def judges(self, instruction: Instruction) -> bool:
        return instruction.is_text

    def grade(self, question: Question, response: str) -> Row:
        return {"references": list(question.references)}

    def agrees(self, question: Question, response: str, grade: Row) -> bool:
        return grade == self.grade(question, response)

    def scores(self, evaluations: Sequence[Sequence[Row]]) -> Scores:
        found = [
            self._likeness(
                [row["response"] for row in rows], [row["references"] for row in rows]
            )
            for rows in evaluations
        ]
        return {name: [x[name] for x in found] for name in found[0]}


class UnitTests:
    """The share of programs that pass their tests, and of k tries that one does."""

    asked = "programs that pass their tests"

    def judges(self, instruction: Instruction) -> bool:
        return instruction.unit_test is not None

    def grade(self, question: Question, response: str) -> Row:
        test = question.instruction.unit_test
        if test is None:
            raise ValueError(f"{question.instruction.where}: it has no unit tests.")
        said = outcome(test.program(response))
        return {"outcome": said, "passed": said == PASSED}

    def agrees(self, question: Question, response: str, grade: Row) -> bool:
        # Not run again: how long a program takes is no function of its text.
        return grade.keys() == {"outcome", "passed"} and (
            grade["passed"] is (grade["outcome"] == PASSED)
        )

    def scores(self, evaluations: Sequence[Sequence[Row]]) -> Scores:
        n = len(evaluations)
        tries = zip(*evaluations, strict=True)
        passed = [sum(row["passed"] for row in same) for same in tries]
        found = {"pass@1": [_share(rows, "passed") for rows in evaluations]}
        for k in (10, 100):
            if k <= n:
                each = [pass_at_k(n, c, k) for c in passed]
                found[f"pass@{k}"] = [sum(each) / len(each)]
        return found


def grader_of(test: Sequence[Instruction], run_programs: bool) -> Grader | None:
    """What judges answers to these examples; None where nothing does.

    Raises:
      ValueError: they are to be judged by running programs, and that is not allowed;
        what computes their scores is not installed.
    """
    if any(x.unit_test is not None for x in test):
        if not run_programs:
            raise ValueError(
                f"{test[0].where}: answers are judged by running the programs in them,"
                " with this user's rights. Allow it by --run-programs, best in a"
                " container."
            )
        return UnitTests()
    if any(x.number is not None for x in test):
        return FinalNumber()
    return Likeness() if any(x.is_text for x in test) else None


def questions_of(grader: Grader | None, test: Sequence[Instruction]) -> list[Question]:
    """Each prompt once that answers are judged to, with all responses to it."""
    found: dict[str, list[Instruction]] = {}
    for x in test:
        if grader is not None and grader.judges(x):
            found.setdefault(x.prompt, []).append(x)
    return [
        Question(same[0], tuple(x.response for x in same)) for same in found.values()
    ]


def _share(rows: Sequence[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
