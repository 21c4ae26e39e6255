"""Instructions with responses: read from files, split, and answers taken out of text.

A file is JSONL, or CSV with a header. What it holds is told by its columns:

    question, answer   GSM8K: the answer ends in "#### " and a number
    query, response    MetaMathQA
    query, answer      CodeFeedback
    mr, ref            E2E
"""

import csv
import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from examples.common.data import held_out
from examples.common.jsonl import Row, read_rows, read_text, text_of
from examples.llama.problems import arithmetic

ARITHMETIC = "arithmetic"

_COLUMNS = (
    ("question", "answer"),
    ("query", "response"),
    ("query", "answer"),
    ("mr", "ref"),
)
_GSM8K = _COLUMNS[0]
_TEMPLATE = "### Instruction:\n{}\n\n### Response:\n"
_PROBLEMS = 4000
# GSM8K's mark, and MetaMathQA's.
_MARK = re.compile(r"####|[Tt]he answer is:?")
_MARKUP = r"(?:\\[()\[\]]|\*\*|__|`|[$€£¥₹])+"
# How a number may be set, in TeX or Markdown; what stands for it is the second. Two
# numbers never become one.
_SETTING = (
    (re.compile(r"\{,\}|(?<=\d)\\,(?=\d)|,\\!"), ","),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"([+-]?)\\(?:boxed|fbox)\{([^{}]*)\}"), r" \1\2 "),
    (re.compile(r"\\[ ,;:~]"), " "),
    (re.compile(r"\\([%$])"), r"\1"),
    (re.compile(rf"(?<=[\d.,]){_MARKUP}(?=[.,]?\d)"), " "),
    (re.compile(_MARKUP), ""),
    (re.compile("\N{MINUS SIGN}"), "-"),
)
_NUMBER = re.compile(
    r"\s*([+-]?(?:(?:\d{1,3}(?:,\d{2,3})*,\d{3}|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][+-]?\d{1,3})?)(\s*%)?"
)
_SENTENCE_END = re.compile(r"[.?;](?=\s|$)")
_CLOSING = "\"')]* "
# Behind a number: nothing, or words, such as a unit. A letter at once is none.
_WORDS = re.compile(r"(?:[,:]?(?:\s+|$).*)?")
# What makes it a part of a larger term: a sign, a variable, or a word that counts.
_SIGNS = re.compile(r"[*/^\\{}_·]|\s[-–]")
_FACTOR = re.compile(
    r"[,:]?\s+(?:[ijknxyz]|[α-ω]+|pi|(?i:hundreds?|thousands?|[a-z]+illions?|dozens?"
    r"|half|halves|thirds?|and an? (?:half|third|quarter)|squared|cubed|factorial"
    r"|plus|minus))\b"
)


@dataclass(frozen=True)
class Instruction:
    """One example.

    Attributes:
      prompt: what the model is given, template included.
      response: what it is to say.
      where: file and row, for errors.
      number: the response's final number, if it has one.
    """

    prompt: str
    response: str
    where: str
    number: Decimal | None


@dataclass(frozen=True)
class Instructions:
    """Examples to train on, examples to test on, and where they come from."""

    source: str
    train: tuple[Instruction, ...]
    test: tuple[Instruction, ...]

    @property
    def sha256(self) -> str:
        """Hash of both parts, in hexadecimal."""
        parts = [[(x.prompt, x.response) for x in part] for part in self.parts]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def parts(self) -> tuple[tuple[Instruction, ...], tuple[Instruction, ...]]:
        """Training and test."""
        return self.train, self.test


def load_instructions(data: str, test: Path | None) -> Instructions:
    """Reads both parts.

    Args:
      data: a file, or "arithmetic" for problems that are made up.
      test: a file; None to hold out one example of twenty, chosen by what it says.

    Raises:
      ValueError: a file that is empty, malformed or not UTF-8, naming it and the row.
      OSError: a file that is missing or cannot be read.
    """
    if data == ARITHMETIC:
        found = [
            instruction(row, _GSM8K, f"{ARITHMETIC}, problem {number}")
            for number, row in enumerate(arithmetic(_PROBLEMS, seed=0), start=1)
        ]
    else:
        found = read_instructions(Path(data))
    if test is not None:
        source = f"{data}, tested on {test}"
        return Instructions(source, tuple(found), tuple(read_instructions(test)))
    # Equal examples fall on the same side.
    kept = held_out([x.prompt for x in found])
    train = tuple(x for x in found if x.prompt not in kept)
    if not train:
        raise ValueError(f"{data}: one prompt cannot be split. Give a --test file too.")
    return Instructions(data, train, tuple(x for x in found if x.prompt in kept))


def read_instructions(path: Path) -> list[Instruction]:
    """All examples of a file.

    Raises:
      ValueError: see `load_instructions`.
      OSError: the file cannot be read.
    """
    rows = _csv_rows if path.suffix == ".csv" else read_rows
    columns, examples = None, []
    for where, row in rows(path):
        columns = columns or _columns_of(row, where)
        examples.append(instruction(row, columns, where))
    if not examples:
        raise ValueError(f"{path}: no example in it.")
    return examples


def instruction(row: Row, columns: tuple[str, str], where: str) -> Instruction:
    """The example of a row.

    Raises:
      ValueError: a missing or empty text; in GSM8K's form, an answer without a number.
    """
    for name in columns:
        if not text_of(row, name, where).strip():
            raise ValueError(f"{where}: {name!r} is empty.")
    asked, response = (row[name].strip() for name in columns)
    number = final_number(response)
    if columns == _GSM8K and number is None:
        raise ValueError(f"{where}: 'answer' has no number after '####'.")
    return Instruction(_TEMPLATE.format(asked), response, where, number)


def final_number(text: str) -> Decimal | None:
    """The number after "####" or "The answer is"; None where there is none.

    An answer is one number in figures, as a decimal: with a sign, commas between
    thousands, an exponent, in TeX or in bold. Before it may stand a currency, behind it
    a percent sign, which changes nothing, or words up to the end of the sentence, such
    as a unit.

    A number that is part of a larger term is none: beside a sign (`5+3`, `7/12`, `5!`,
    `3:30`, `5 × y`), a variable (`3x`, `3 x + 1`), a fraction (`2 1/2`, `2 ½`), a word
    that counts (`5 million`, `5 and a half`), or another number (`5 or 6`, `1,23`).

    The first mark with an answer counts. Equal numbers are equal however they are
    written.

    >>> final_number("12 * 100 = 1200\\n#### $1,200.00") == final_number("#### 1200")
    True
    >>> final_number("The answer is: 3x + 1") is None
    True
    """
    for mark in _MARK.finditer(text):
        line = _plain(text[mark.end() :].lstrip().partition("\n")[0])
        found = _NUMBER.match(line)
        if found is None:
            continue
        behind = line[found.end() :].rstrip(_CLOSING)
        if _only_words(_SENTENCE_END.split(behind)[0].rstrip(_CLOSING)):
            return Decimal(found[1].replace(",", ""))
    return None


def _plain(line: str) -> str:
    """The line without TeX and Markdown around its numbers, from the inside out."""
    before = None
    while line != before:
        before = line
        for pattern, plain in _SETTING:
            line = pattern.sub(plain, line)
    return line


def _only_words(behind: str) -> bool:
    """Whether what stands behind a number leaves it a number by itself."""
    if not _WORDS.fullmatch(behind) or _SIGNS.search(behind) or _FACTOR.match(behind):
        return False
    # Exponents of units are no numbers.
    return not any(
        unicodedata.category(x) == "Sm" or x.isnumeric()
        for x in behind
        if x not in "²³"
    )


def _columns_of(row: Row, where: str) -> tuple[str, str]:
    """The pair of columns that the first row has, or comes nearest to."""
    best = max(_COLUMNS, key=lambda pair: sum(name in row for name in pair))
    if not any(name in row for name in best):
        known = "; ".join(", ".join(pair) for pair in _COLUMNS)
        raise ValueError(
            f"{where}: columns {', '.join(map(repr, row))}, expected one of {known}."
        )
    return best


def _csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                expected = len(reader.fieldnames or ())
                raise ValueError(f"{where}: not {expected} columns as in the header.")
            yield where, row
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num + 1}: not CSV ({error})."
        ) from error
