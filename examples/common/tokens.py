"""Byte-level BPE and packing: text to rows of token ids of one length."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.common.data import Corpus
from examples.common.errors import BadFile, one_line
from examples.common.files import aside, sha256

END_OF_TEXT = "<|endoftext|>"

TOKENIZER = "tokenizer.json"

_TOKENIZER_BYTES = 50_000_000  # more text changes the merges little
_CACHE = (TOKENIZER, "train.npy", "validation.npy")
_CHUNK = 1000  # documents encoded at once, to bound the memory of the encodings


@dataclass(frozen=True)
class Packed:
    """A stream of token ids, cut into rows of `length + 1`.

    Neighbouring rows share one token, so a model that reads `row[:-1]` and predicts
    `row[1:]` predicts every token of the stream but the first exactly once.
    """

    ids: np.ndarray
    length: int

    @property
    def rows(self) -> int:
        """How many whole rows there are."""
        return (len(self.ids) - 1) // self.length

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The rows of the given numbers, (len(rows), length + 1) int32."""
        positions = rows[:, None] * self.length + np.arange(self.length + 1)
        return self.ids[positions].astype(np.int32)

    def batch(self, seed: int, step: int, batch_size: int) -> np.ndarray:
        """The batch of step `step`, (batch_size, length + 1) int32.

        A pure function of its arguments: nothing has to be saved to resume, and two
        runs of one seed see the same rows in the same order. An epoch visits every
        row at most once, in an order of its own; rows that fill no batch are left
        out of it.

        Raises:
          ValueError: fewer rows than `batch_size`.
        """
        if self.rows < batch_size:
            raise ValueError(
                f"Cannot fill a batch of {batch_size} rows of {self.length} tokens:"
                f" the text has {self.rows} rows. Use more text or smaller batches."
            )
        return self.take(shuffled(self.rows, seed, step, batch_size))

    def fixed_batches(self, count: int, batch_size: int) -> list[np.ndarray]:
        """At most `count` batches of rows spread evenly over the stream.

        Raises:
          ValueError: fewer rows than `batch_size`.
        """
        count = min(count, self.rows // batch_size)
        if count == 0:
            raise ValueError(
                f"Cannot fill a batch of {batch_size} rows of {self.length} tokens:"
                f" the held-out text has {self.rows} rows. Use more text or smaller"
                " batches."
            )
        rows = np.linspace(0, self.rows - 1, count * batch_size).astype(np.int64)
        return [self.take(part) for part in np.split(rows, count)]


def shuffled(rows: int, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Which rows make the batch of a step: see `Packed.batch`."""
    epoch, index = divmod(step, rows // batch_size)
    order = _permutation(seed, epoch, rows)
    return order[index * batch_size : (index + 1) * batch_size]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(rows)


@dataclass(frozen=True)
class TokenizedCorpus:
    """A tokenizer and the token ids of both splits, each document ended by one mark."""

    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray

    def save(self, directory: Path) -> str:
        """Writes tokenizer.json, train.npy and validation.npy; returns their hash.

        Raises:
          OSError: naming the file that cannot be written.
        """
        directory.mkdir(parents=True, exist_ok=True)
        files = [directory / name for name in _CACHE]
        save_tokenizer(self.tokenizer, files[0])
        for path, ids in zip(files[1:], (self.train, self.validation), strict=True):
            with aside(path) as draft, draft.open("wb") as file:
                np.save(file, ids)
        return sha256(files)

    @classmethod
    def load(cls, directory: Path, expected: str) -> "TokenizedCorpus":
        """Reads what `save` wrote; the ids stay on disk until they are used.

        Raises:
          BadFile: they have not the expected hash.
          OSError: they cannot be read.
        """
        files = [directory / name for name in _CACHE]
        if missing := [path.name for path in files if not path.is_file()]:
            raise BadFile(
                f"{directory} has no {missing[0]}. Restore it, or start a new run."
            )
        if sha256(files) != expected:
            raise BadFile(
                f"{directory} is not as it was written: {', '.join(_CACHE)} have,"
                " together, another checksum. Restore them, or start a new run."
            )
        tokenizer = read_tokenizer(files[0])
        return cls(tokenizer, *(np.load(path, mmap_mode="r") for path in files[1:]))


def tokenize(corpus: Corpus, vocab_size: int) -> TokenizedCorpus:
    """Trains a byte-level BPE on the training split and encodes both splits with it.

    Args:
      corpus: the text; its validation split is not looked at for the vocabulary.
      vocab_size: entries of the vocabulary, the 256 bytes and the end mark included.
        Short text yields fewer.

    Raises:
      ValueError: `vocab_size` below 257.
    """
    tokenizer = train_tokenizer(corpus.train, vocab_size)
    return TokenizedCorpus(
        tokenizer,
        _encode(tokenizer, corpus.train),
        _encode(tokenizer, corpus.validation),
    )


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json.

    Raises:
      BadFile: there is none, or it is damaged, naming it.
    """
    if not path.is_file():
        raise BadFile(f"{path.parent} has no {path.name}.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except BaseException as error:
        raise _of_tokenizers(error, f"{path} is no tokenizer") from error
    # Lengths are chosen here, whatever the file was saved with.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def check_tokens(
    tokenizer: Tokenizer, vocab_size: int, path: Path, pair: bool = False
) -> None:
    """Encodes a text, or a pair: the file may name marks that the model has not.

    Raises:
      BadFile: it cannot be encoded, or by tokens that are none of the model's.
    """
    texts = ("a text", "another")[: 2 if pair else 1]
    try:
        ids = tokenizer.encode(texts[0], texts[1] if pair else None).ids
    except BaseException as error:
        raise _of_tokenizers(error, f"{path} cannot encode {texts}") from error
    if max(ids, default=0) >= vocab_size:
        raise BadFile(
            f"{path} does not fit the model: it encodes {texts} by a token {max(ids)},"
            f" and the vocabulary of the model ends at {vocab_size - 1}."
        )


def _of_tokenizers(error: BaseException, what: str) -> BaseException:
    """An error of the package as ours, and any other as it is.

    It raises no class of its own, and where Rust panics no `Exception` either.
    """
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return BadFile(f"{what}: {one_line(error)}")
    return error


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Writes a tokenizer.json, replacing an older file in one step.

    Raises:
      OSError: naming the file.
    """
    with aside(path) as draft:
        tokenizer.save(str(draft))


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Hash of all that a tokenizer.json of it says, in hexadecimal."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE trained on the texts.

    Raises:
      ValueError: `vocab_size` below 257.
    """
    if vocab_size < 257:
        raise ValueError(
            f"Cannot train a byte-level vocabulary of {vocab_size} entries: the bytes"
            " and the end mark alone take 257. Raise vocab_size."
        )
    return train_bpe(texts, vocab_size, [END_OF_TEXT])


def train_bpe(
    texts: Sequence[str], vocab_size: int, special_tokens: Sequence[str]
) -> Tokenizer:
    """Trains a byte-level BPE whose first ids are those of the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_head(texts), trainer)
    return tokenizer


def _head(texts: Sequence[str]) -> list[str]:
    ends = np.cumsum([len(text) for text in texts])
    return list(texts[: int(np.searchsorted(ends, _TOKENIZER_BYTES)) + 1])


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    end = [tokenizer.token_to_id(END_OF_TEXT)]
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.int32
    parts = []
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        for encoding in tokenizer.encode_batch_fast(chunk, add_special_tokens=False):
            parts.append(np.array(encoding.ids + end, dtype))
    return np.concatenate(parts)
