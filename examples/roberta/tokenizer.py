"""The tokenizer of an encoder's directory, checked against the model."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, processors
from tokenizers.implementations import BertWordPieceTokenizer, ByteLevelBPETokenizer

from examples.common.errors import one_line
from examples.common.files import read_object
from examples.common.tokens import TOKENIZER, check_tokens, read_tokenizer, train_bpe
from examples.roberta.config import EncoderConfig

# RoBERTa's special tokens, in the order of their ids.
START, PAD, END, UNKNOWN, MASK = SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

_PADS = (PAD, "[PAD]")
# Tables of embeddings are made larger than the vocabulary, to be a multiple of a power
# of two; more than this and the tokenizer is of another model.
_SPARE = 128


def load_tokenizer(directory: Path, config: EncoderConfig) -> Tokenizer:
    """Reads `tokenizer.json`, or `vocab.txt`, or `vocab.json` with `merges.txt`.

    Args:
      directory: where the model is.
      config: the model's.

    Raises:
      ValueError: there is none, it cannot be read, or it does not fit the model.
    """
    path = directory / TOKENIZER
    try:
        if path.is_file():
            tokenizer = read_tokenizer(path)
        elif (path := directory / "vocab.txt").is_file():
            tokenizer = _word_piece(directory, path)
        elif (path := directory / "merges.txt").is_file():
            tokenizer = _byte_level(directory, path)
        else:
            raise ValueError(
                f"{directory} has no tokenizer: neither tokenizer.json nor vocab.txt"
                " nor vocab.json with merges.txt."
            )
    except ValueError:
        raise
    except Exception as error:  # tokenizers raises no class of its own
        raise ValueError(
            f"Cannot read the tokenizer {path}: {one_line(error)}"
        ) from error
    _check(tokenizer, config, path)
    # Files carry those of sentence embeddings; lengths are chosen by the caller here.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with RoBERTa's special tokens around every text."""
    tokenizer = train_bpe(texts, vocab_size, SPECIAL)
    _surround(tokenizer)
    return tokenizer


def token_id(tokenizer: Tokenizer, mark: str) -> int:
    """The number of a special token.

    Raises:
      ValueError: the tokenizer has no such token.
    """
    number = tokenizer.token_to_id(mark)
    if number is None:
        raise ValueError(f"The tokenizer has no token {mark!r}.")
    return number


def _surround(tokenizer: Tokenizer) -> None:
    """`<s> A </s>`, and of a pair `<s> A </s></s> B </s>`."""
    start, end = ((mark, token_id(tokenizer, mark)) for mark in (START, END))
    tokenizer.post_processor = processors.RobertaProcessing(end, start)


def _word_piece(directory: Path, path: Path) -> Tokenizer:
    settings = directory / "tokenizer_config.json"
    lower = True
    if settings.is_file():
        lower = read_object(settings).get("do_lower_case", True)
        if not isinstance(lower, bool):
            raise ValueError(
                f"{settings}: do_lower_case must be true or false, got {lower!r}."
            )
    return BertWordPieceTokenizer(str(path), lowercase=lower)._tokenizer


def _byte_level(directory: Path, path: Path) -> Tokenizer:
    tokenizer = ByteLevelBPETokenizer(
        str(directory / "vocab.json"), str(path)
    )._tokenizer
    tokenizer.add_special_tokens(list(SPECIAL))
    _surround(tokenizer)
    return tokenizer


def _check(tokenizer: Tokenizer, config: EncoderConfig, path: Path) -> None:
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if not config.vocab_size - _SPARE <= size <= config.vocab_size:
        raise ValueError(
            f"{path} does not fit the model: it has {size:,} tokens, and the model's"
            f" vocab_size is {config.vocab_size:,}."
        )
    for pair in (False, True):
        check_tokens(tokenizer, config.vocab_size, path, pair)
    pad = next((p for p in map(tokenizer.token_to_id, _PADS) if p is not None), None)
    if pad is not None and pad != config.pad_token_id:
        raise ValueError(
            f"{path} does not fit the model: its padding is token {pad}, and the"
            f" model's pad_token_id is {config.pad_token_id}."
        )
