"""The number that the answer to a word problem ends in, as it may be written."""

import re
import unicodedata
from decimal import Decimal

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
