"""The forms of a data set's rows, by their columns, and the instruction of a row."""

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from examples.common.jsonl import Row, text_of
from examples.llama.final_number import final_number
from examples.llama.programs import UnitTest

_TEMPLATE = "### Instruction:\n{}\n\n### Response:\n"


@dataclass(frozen=True)
class Instruction:
    """One example.

    Attributes:
      prompt: what the model is given, template included.
      response: what it is to say.
      where: file and row, for errors.
      number: the final number that an answer must have, if it is judged by that.
      unit_test: what the program in an answer must pass, if it is judged by that.
      is_text: whether an answer is judged by how near it is to the response.
    """

    prompt: str
    response: str
    where: str
    number: Decimal | None = None
    unit_test: UnitTest | None = None
    is_text: bool = False


@dataclass(frozen=True)
class Form:
    """Rows with certain columns.

    Attributes:
      columns: the names; a row may have others beside them.
      make: the instruction of a row that has them, and where it stands.
    """

    columns: tuple[str, ...]
    make: Callable[[Row, str], Instruction]

    def present(self, row: Row) -> int:
        """How many of the columns a row has."""
        return sum(name in row for name in self.columns)

    def instruction(self, row: Row, where: str) -> Instruction:
        """The instruction of a row.

        Raises:
          ValueError: a missing or empty text, or one without the number or program
            that its form has, naming file and row.
        """
        return self.make(row, where)


def _texts(row: Row, where: str, *names: str) -> list[str]:
    for name in names:
        if not text_of(row, name, where).strip():
            raise ValueError(f"{where}: {name!r} is empty.")
    return [row[name].strip() for name in names]


def _words(*columns: str) -> Form:
    """A question and an answer, judged by its final number if it has one."""

    def make(row: Row, where: str) -> Instruction:
        asked, response = _texts(row, where, *columns)
        number = final_number(response)
        return Instruction(_TEMPLATE.format(asked), response, where, number)

    return Form(columns, make)


def _text(*columns: str, ask: str = "{}") -> Form:
    """Something to be put into other words."""

    def make(row: Row, where: str) -> Instruction:
        given, response = _texts(row, where, *columns)
        prompt = _TEMPLATE.format(ask.format(given))
        return Instruction(prompt, response, where, is_text=True)

    return Form(columns, make)


def _gsm8k(row: Row, where: str) -> Instruction:
    found = _words(*GSM8K.columns).instruction(row, where)
    if found.number is None:
        raise ValueError(f"{where}: 'answer' has no number after '####'.")
    return found


def _mawps(row: Row, where: str) -> Instruction:
    (asked,) = _texts(row, where, "sQuestion")
    number = _only_number(row, "lSolutions", where)
    equations = row.get("lEquations")
    if not isinstance(equations, list) or not all(
        isinstance(x, str) for x in equations
    ):
        raise ValueError(f"{where}: 'lEquations' is no list of texts.")
    response = "\n".join([*equations, f"#### {number}"])
    return Instruction(_TEMPLATE.format(asked), response, where, number)


def _adapters(row: Row, where: str) -> Instruction:
    asked, response = _texts(row, where, "instruction", "output")
    # The output was made by a model, and may end in another number.
    number = _only_number(row, "answer", where)
    return Instruction(_TEMPLATE.format(asked), response, where, number)


def _only_number(row: Row, name: str, where: str) -> Decimal:
    """A number, as such, as text, or as a list of one of them."""
    value: Any = row.get(name)
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        number = Decimal("NaN")
    if isinstance(value, bool) or not number.is_finite():
        raise ValueError(f"{where}: {name!r} is not one number.")
    # As people write it: 8.0 is 8.
    whole = number.to_integral_value()
    return whole if number == whole else number


def _humaneval(row: Row, where: str) -> Instruction:
    names = ("prompt", "canonical_solution", "test", "entry_point")
    _texts(row, where, *names)
    begun, solution, test, entry_point = (row[name] for name in names)
    asked = f"Complete this Python function.\n\n```python\n{begun.strip()}\n```"
    response = f"```python\n{begun.strip()}\n{solution.rstrip()}\n```"
    unit_test = UnitTest(begun, test, entry_point)
    return Instruction(_TEMPLATE.format(asked), response, where, unit_test=unit_test)


GSM8K = Form(("question", "answer"), _gsm8k)
FORMS = (
    GSM8K,
    _words("query", "response"),  # MetaMathQA
    _words("query", "answer"),  # CodeFeedback
    Form(("sQuestion", "lEquations", "lSolutions"), _mawps),
    Form(("instruction", "output", "answer"), _adapters),  # MAWPS of LLM-Adapters
    _text("mr", "ref"),  # E2E
    _text("article", "highlights", ask="Summarize.\n\n{}"),  # CNN/DM
    _text("document", "summary", ask="Summarize in one sentence.\n\n{}"),  # XSum
    Form(("prompt", "canonical_solution", "test", "entry_point"), _humaneval),
)
