"""What fine-tuning starts from: a model's weights and its tokenizer, or neither."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from tokenizers import Tokenizer

from examples.common.config import check_room
from examples.common.files import sha256
from examples.common.methods import METHODS
from examples.common.settings import RECORD, read_record
from examples.common.tokens import (
    END_OF_TEXT,
    TOKENIZER,
    check_tokens,
    read_tokenizer,
    train_tokenizer,
)
from examples.common.weights import local_directory
from examples.llama.config import LlamaConfig, config_names, config_path
from examples.llama.model import Llama
from examples.llama.pretrain import MODEL
from examples.llama.weights import load_llama


@dataclass(frozen=True)
class Base:
    """A model before fine-tuning.

    Attributes:
      source: where it is from.
      config: its shape, with the tokens that end a text.
      params: its weights on the host, as `nnx.to_pure_dict` makes them; None if there
        are none and training starts from scratch.
      tokenizer: its own, or one that was trained on the examples.
      sha256: hash of its files; None from scratch.
    """

    source: str
    config: LlamaConfig
    params: Any
    tokenizer: Tokenizer
    sha256: str | None

    @property
    def stop(self) -> tuple[int, ...]:
        """The tokens that end a response; the first one ends those trained on."""
        return end_tokens(self.config)

    def with_positions(self, count: int) -> "Base":
        """A model that takes texts of so many tokens: from scratch any does.

        Raises:
          ValueError: one with weights does not.
        """
        limit = self.config.max_position_embeddings
        if count <= limit:
            return self
        if self.params is not None:
            raise ValueError(
                f"Cannot train on rows of {count} tokens: the model takes {limit}."
                " Lower --seq-len."
            )
        config = dataclasses.replace(self.config, max_position_embeddings=count)
        return dataclasses.replace(self, config=config)

    def model(self, params: Any) -> Llama:
        """The plain model with these weights."""
        return nnx.merge(self.graph, params)

    @property
    def graph(self) -> nnx.GraphDef:
        """The plain model without its weights."""
        return nnx.graphdef(nnx.eval_shape(lambda: Llama(self.config)))


def load_base(
    name: str, texts: Sequence[str], tokenizer: Path, **overrides: Any
) -> Base:
    """The model that `--model` names.

    Args:
      name: a file in examples/llama/configs or the path of a config.json, which say
        what to make from scratch; a directory in Hugging Face's format or the hub's
        name of one; a run of examples.llama.pretrain, or a method's directory in it.
      texts: what a tokenizer is trained on, from scratch.
      tokenizer: where one that was trained before is, in a run that is resumed.
      **overrides: `LlamaConfig` fields that say how it is computed.

    Raises:
      ValueError: no such model, a damaged one, or a tokenizer that is not its own.
    """
    path = config_path(name)
    if path is not None:
        config = LlamaConfig.from_json(path, **overrides)
        check_room(config.parameters, config.param_dtype, path)
        if tokenizer.is_file():
            found = read_tokenizer(tokenizer)
        else:
            found = train_tokenizer(texts, config.vocab_size)
        ended = dataclasses.replace(
            config, bos_token_id=None, eos_token_id=found.token_to_id(END_OF_TEXT)
        )
        return Base(name, ended, None, found, None)

    directory = _directory(name)
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} has no config.json: it is no model's directory.")
    config = LlamaConfig.from_json(directory / "config.json", **overrides)
    own = read_tokenizer(directory / TOKENIZER)
    _check_tokenizer(own, config, directory)
    model = load_llama(directory, **overrides)
    files = [directory / "config.json", directory / TOKENIZER]
    files += sorted(directory.glob("model*.safetensors"))
    # On the host: what is trained is a copy, and two on the device may not fit.
    params = jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return Base(name, config, params, own, sha256(files))


def end_tokens(config: LlamaConfig) -> tuple[int, ...]:
    """The tokens that end a text."""
    end = config.eos_token_id
    if end is None:
        return ()
    return end if isinstance(end, tuple) else (end,)


def _directory(name: str) -> Path:
    """Where the weights are."""
    path = Path(name)
    if (path / RECORD).is_file():
        path = path / _first_method(path)
    if (path / "checkpoints").is_dir() and not (path / MODEL).is_dir():
        raise ValueError(f"{path} is a run that is not finished: go on with --resume.")
    if (path / MODEL).is_dir():
        return path / MODEL
    try:
        return local_directory(name)
    except ValueError as error:
        raise ValueError(f"{error} Names of configs: {config_names()}.") from error


def _first_method(run: Path) -> str:
    """The first method of a run of examples.llama.pretrain."""
    settings = read_record(run).get("settings")
    methods = settings.get("methods") if isinstance(settings, dict) else None
    if not isinstance(methods, list) or not methods or methods[0] not in METHODS:
        raise ValueError(f"{run / RECORD} is no record of examples.llama.pretrain.")
    return methods[0]


def _check_tokenizer(
    tokenizer: Tokenizer, config: LlamaConfig, directory: Path
) -> None:
    file = directory / TOKENIZER
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= config.vocab_size:
        raise ValueError(
            f"{file} does not fit the model: it has a token {largest}, and the"
            f" vocabulary of the model ends at {config.vocab_size - 1}."
        )
    check_tokens(tokenizer, config.vocab_size, file)
    ends = end_tokens(config)
    if not ends:
        raise ValueError(f"{directory / 'config.json'} names no eos_token_id.")
    for end in ends:
        if tokenizer.id_to_token(end) is None:
            raise ValueError(
                f"{file} does not fit the model: it has no token {end}, with which the"
                " model ends a text."
            )
