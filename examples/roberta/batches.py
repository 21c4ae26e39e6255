"""Token ids in batches of a few lengths: little padding, little to compile."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from tokenizers import Tokenizer

from examples.roberta.config import EncoderConfig
from examples.roberta.data import Examples

Batch = Mapping[str, np.ndarray]
"""Arrays of a batch: `input_ids`, `attention_mask`, `token_type_ids` (B, T), `labels`
(B,), `weights` (B,) that are zero where a row only fills the batch up, and `seed`, a
number that dropout is drawn from."""

_MULTIPLE = 8  # lengths are rounded up to it, which matrix units like
_WINDOW = 16  # batches that are sorted by length together
_CHUNK = 1000  # texts encoded at once, to bound the memory of the encodings


# Compared as what it is, so that plans can be kept for it.
@dataclass(frozen=True, eq=False)
class Encoded:
    """Examples as token ids.

    Attributes:
      ids: all token ids of all examples, one after the other.
      types: which text of a pair each token is of.
      starts: (examples + 1,): where each example begins.
      labels: (examples,).
      pad: the id that fills up.
      lengths: the lengths that batches may have, rising.
    """

    ids: np.ndarray
    types: np.ndarray
    starts: np.ndarray
    labels: np.ndarray
    pad: int
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def buckets(self) -> np.ndarray:
        """Of each example the number of the length that it fits in."""
        return np.searchsorted(self.lengths, np.diff(self.starts))

    def batch(self, rows: np.ndarray, size: int, seed: int = 0) -> Batch:
        """The examples of the given numbers, filled up to a batch of `size`."""
        length = self.lengths[self.buckets[rows].max()]
        weights = np.arange(size) < len(rows)
        rows = np.pad(rows, (0, size - len(rows)), mode="edge")
        ids = np.full((size, length), self.pad, np.int32)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for i, row in enumerate(rows):
            own = slice(self.starts[row], self.starts[row + 1])
            taken = own.stop - own.start
            ids[i, :taken], types[i, :taken] = self.ids[own], self.types[own]
            mask[i, :taken] = 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": types,
            "labels": self.labels[rows],
            "weights": weights.astype(np.float32),
            "seed": np.array(seed, np.uint32),
        }

    def steps(self, size: int) -> int:
        """Batches in an epoch."""
        return -(-len(self) // size)

    def training_batch(self, seed: int, step: int, size: int) -> Batch:
        """The batch of a step: a pure function of its arguments.

        An epoch visits every example once, in an order of its own. Examples of like
        length come together, batches in a random order.
        """
        epoch, index = divmod(step, self.steps(size))
        draw = np.random.SeedSequence((seed, step)).generate_state(1)[0]
        return self.batch(_plan(self, seed, epoch, size)[index], size, draw)

    def validation_rows(self, size: int) -> list[np.ndarray]:
        """The numbers of all examples in batches, those of a length together."""
        order = np.argsort(self.buckets, kind="stable")
        return np.split(order, range(size, len(order), size))

    def shapes(self, size: int) -> list[Batch]:
        """A batch of each length that occurs."""
        return [
            self.batch(np.flatnonzero(self.buckets == bucket)[:1], size)
            for bucket in np.unique(self.buckets)
        ]


@lru_cache(maxsize=2)
def _plan(data: Encoded, seed: int, epoch: int, size: int) -> list[np.ndarray]:
    """The numbers of the examples in each batch of an epoch."""
    rng = np.random.default_rng((seed, epoch))
    order, batches = rng.permutation(len(data)), []
    for window in np.split(order, range(_WINDOW * size, len(order), _WINDOW * size)):
        window = window[np.argsort(data.buckets[window], kind="stable")]
        batches += np.split(window, range(size, len(window), size))
    return [batches[i] for i in rng.permutation(len(batches))]


def encode(
    tokenizer: Tokenizer,
    parts: Mapping[str, Examples],
    max_length: int,
    config: EncoderConfig,
) -> dict[str, Encoded]:
    """Encodes sets of examples for batches of the same few lengths.

    Args:
      tokenizer: adds the marks of the model's own; what is longer than `max_length`
        loses tokens at the end, of a pair those of the longer text first.
      parts: the sets by name.
      max_length: tokens kept of an example, marks included.
      config: the model's.
    """
    tokenizer.enable_truncation(max_length)
    drafts = {}
    for name, part in parts.items():
        ids, types, lengths = [], [], []
        texts = [own if len(own) > 1 else own[0] for own in part.texts]
        for start in range(0, len(texts), _CHUNK):
            for x in tokenizer.encode_batch(texts[start : start + _CHUNK]):
                lengths.append(len(x.ids))
                ids.append(np.array(x.ids, np.int32))
                types.append(np.array(x.type_ids, np.uint8))
        starts = np.concatenate([[0], np.cumsum(lengths)])
        kinds = np.minimum(np.concatenate(types), config.type_vocab_size - 1)
        drafts[name] = (np.concatenate(ids), kinds, starts, part.labels)
    tokenizer.no_truncation()
    lengths = np.concatenate([np.diff(starts) for _, _, starts, _ in drafts.values()])
    chosen = bucket_lengths(lengths, max_length)
    return {
        name: Encoded(*draft, config.pad_token_id, chosen)
        for name, draft in drafts.items()
    }


def bucket_lengths(lengths: np.ndarray, max_length: int) -> tuple[int, ...]:
    """At most four lengths, each for a like number of examples."""
    quantiles = np.quantile(lengths, (0.25, 0.5, 0.75, 1.0), method="higher")
    rounded = -(-quantiles // _MULTIPLE) * _MULTIPLE
    return tuple(int(x) for x in np.unique(np.minimum(rounded, max_length)))
