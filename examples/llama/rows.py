"""Instructions as rows of token ids of one length, several to a row.

Each example stands in one row as a whole and is read as if it stood alone: attention
stays within it and positions restart (`Llama.__call__`, `segments`). So packing changes
no example's loss, and none is cut. Only the tokens of the response and the mark of its
end are predicted; the prompt is given.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from examples.common.tokens import shuffled
from examples.llama.instructions import Instruction
from examples.llama.loss import Text


class Batch(NamedTuple):
    """Some rows, each array (rows, size).

    Attributes:
      ids: the tokens, 0 where a row is filled up.
      segments: which example of its row a token belongs to, from 1; 0 is filling.
      weights: 1 where a token is to be predicted, else 0.
    """

    ids: np.ndarray
    segments: np.ndarray
    weights: np.ndarray

    def text(self) -> Text:
        """What is read, all but the last token, and predicted, all but the first."""
        ids, segments, weights = map(jnp.asarray, self)
        return Text(ids[:, :-1], ids[:, 1:], segments[:, :-1], weights[:, 1:])


class Example(NamedTuple):
    """Token ids of an instruction, the response with the mark of its end."""

    prompt: list[int]
    response: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


def encode(
    tokenizer: Tokenizer, instructions: Sequence[Instruction], end: int
) -> list[Example]:
    """Tokens of each instruction.

    The tokenizer adds its own marks to the prompt, such as LLaMA's begin of text.
    Prompt and response are encoded apart, as they are when the model answers.

    Raises:
      ValueError: a prompt without tokens, naming file and row.
    """
    prompts = tokenizer.encode_batch_fast([x.prompt for x in instructions])
    responses = tokenizer.encode_batch_fast(
        [x.response for x in instructions], add_special_tokens=False
    )
    for x, prompt in zip(instructions, prompts, strict=True):
        if not prompt.ids:
            raise ValueError(f"{x.where}: the tokenizer makes nothing of its prompt.")
    return [
        Example(prompt.ids, [*response.ids, end])
        for prompt, response in zip(prompts, responses, strict=True)
    ]


@dataclass(frozen=True)
class Rows:
    """Examples laid out in rows.

    Attributes:
      examples: the tokens.
      layout: which examples stand in each row, in this order.
      size: tokens in a row, none of the rows being longer.
    """

    examples: Sequence[Example]
    layout: Sequence[Sequence[int]]
    size: int

    def take(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The rows of the given numbers; a negative number is a row of filling."""
        batch = Batch(
            np.zeros((len(rows), self.size), np.int32),
            np.zeros((len(rows), self.size), np.int32),
            np.zeros((len(rows), self.size), np.float32),
        )
        for to, row in enumerate(rows):
            at = 0
            for number, i in enumerate(self.layout[row] if row >= 0 else (), start=1):
                example = self.examples[i]
                answer, end = at + len(example.prompt), at + example.length
                batch.ids[to, at:end] = example.prompt + example.response
                batch.segments[to, at:end] = number
                batch.weights[to, answer:end] = 1
                at = end
        return batch

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """The batch of a step, a pure function of its arguments.

        An epoch takes every row at most once, in an order of its own; rows that fill
        no batch are left out of it.
        """
        return self.take(shuffled(len(self.layout), seed, step, batch_size))

    def batches(self, batch_size: int) -> list[Batch]:
        """All rows in order, the last batch filled up."""
        rows = list(range(len(self.layout)))
        rows += [-1] * (-len(rows) % batch_size)
        return [
            self.take(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)
        ]


def lay_out(
    examples: Sequence[Example],
    instructions: Sequence[Instruction],
    size: int,
    packing: bool,
    drop_long: bool,
) -> Rows:
    """The examples in as few rows as a simple search finds, or in one each.

    Args:
      examples: the tokens.
      instructions: what each is made of, for errors.
      size: tokens in a row.
      packing: whether a row may hold several examples.
      drop_long: whether examples longer than a row are left out.

    Raises:
      ValueError: naming file and row, an example longer than a row that is not to be
        left out; no example that is not.
    """
    long = [i for i, example in enumerate(examples) if example.length > size]
    if long and not drop_long:
        first = long[0]
        raise ValueError(
            f"{instructions[first].where}: an example of {examples[first].length}"
            f" tokens is longer than a row of {size}; so are {len(long) - 1} others."
            " Raise --seq-len, or leave them out by --drop-long."
        )
    kept = [example for example in examples if example.length <= size]
    if not kept:
        raise ValueError(
            f"{instructions[0].where} and all others are longer than a row of {size}"
            " tokens. Raise --seq-len."
        )
    if packing:
        return Rows(kept, pack([example.length for example in kept], size), size)
    return Rows(kept, [[i] for i in range(len(kept))], size)


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Puts things of these lengths into rows: the longest first, each into the row
    with the least room that it fits in.

    >>> pack([3, 8, 5, 2], size=10)
    [[1, 3], [2, 0]]
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left of each row, the least first
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(room, (lengths[i], -1))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row = size, len(rows)
            rows.append([])
        rows[row].append(i)
        insort(room, (left - lengths[i], row))
    return rows
