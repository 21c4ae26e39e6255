"""Arithmetic word problems in the form of GSM8K, made up from a seed.

A model of a few hundred thousand weights cannot answer GSM8K. It can learn these, so
that the whole chain, exact match included, is seen to work without any file.
"""

import random

_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
_THINGS = ("apples", "books", "coins", "eggs", "keys", "pens", "shells", "stamps")

_TEMPLATES = (
    (
        "{name} has {a} {things} and gets {b} more. How many {things} does {name} have"
        " now?",
        "{a} + {b} = <<{a}+{b}={sum}>>{sum}\n#### {sum}",
    ),
    (
        "{name} has {sum} {things} and gives {b} of them away. How many {things} are"
        " left?",
        "{sum} - {b} = <<{sum}-{b}={a}>>{a}\n#### {a}",
    ),
    (
        "{name} has {a} boxes with {b} {things} in each. How many {things} are there"
        " in all?",
        "{a} * {b} = <<{a}*{b}={product}>>{product}\n#### {product}",
    ),
)


def arithmetic(count: int, seed: int) -> list[dict[str, str]]:
    """Different problems with their solutions, as rows of GSM8K's file.

    Numbers that are added, subtracted or multiplied are of one digit.

    Args:
      count: how many; there are 12,288.
      seed: of the draws.
    """
    draw = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        a, b = draw.randint(2, 9), draw.randint(2, 9)
        question, answer = draw.choice(_TEMPLATES)
        words = {
            "name": draw.choice(_NAMES),
            "things": draw.choice(_THINGS),
            "a": a,
            "b": b,
            "sum": a + b,
            "product": a * b,
        }
        rows[question.format(**words)] = answer.format(**words)
    return [{"question": question, "answer": rows[question]} for question in rows]
