"""Encoder weights in Hugging Face's directory format, in and out."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from examples.common.config import check_room
from examples.common.tokens import TOKENIZER, save_tokenizer
from examples.common.weights import (
    check_depth,
    fill_state,
    local_directory,
    read_tensors,
    state_tensors,
    write_tensors,
)
from examples.roberta.config import EncoderConfig
from examples.roberta.model import Classifier, Encoder

CONFIG = "config.json"

_NAMES = {
    "embeddings.norm": "embeddings.LayerNorm",
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.dense": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
    "pooler": "pooler.dense",
}
# What TensorFlow called a norm's parameters, as in the hub's bert-base-uncased.
_OLD_NAMES = {"gamma": "weight", "beta": "bias"}
_HEAD = ("pooler", "classifier")
# The heads that pre-training ends in, and buffers that older versions stored.
_LEFT_OUT = re.compile(r"^(cls|lm_head)\.|(^|\.)embeddings\.(position|token_type)_ids$")


def tensor_name(path: Sequence[Any]) -> str:
    """Name of a parameter in the file, but for the prefix of the model.

    >>> tensor_name(("layers", 3, "attention", "query", "kernel"))
    'encoder.layer.3.attention.self.query.weight'
    >>> tensor_name(("embeddings", "norm", "bias"))
    'embeddings.LayerNorm.bias'
    """
    *modules, leaf = map(str, path)
    prefix = ""
    if modules[0] == "layers":
        prefix, modules = f"encoder.layer.{modules[1]}.", modules[2:]
    name = ".".join(modules)
    leaf = "bias" if leaf == "bias" else "weight"
    return f"{prefix}{_NAMES.get(name, name)}.{leaf}"


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a classifier, as far as there are any.

    Attributes:
      config: the classifier's.
      read: parameters by path. What is not among them is drawn anew for each seed.
    """

    config: EncoderConfig
    read: Mapping[tuple[Any, ...], jax.Array]

    @property
    def fresh(self) -> tuple[str, ...]:
        """Names of the tensors that are drawn anew."""
        paths = [path for path, _ in nnx.to_flat_state(_abstract(self.config))]
        return tuple(sorted(_name(path) for path in paths if path not in self.read))

    @property
    def start(self) -> str:
        """What training starts from, in words."""
        if not self.read:
            return "from scratch"
        if self.fresh:
            return f"pretrained, with fresh {', '.join(self.fresh)}"
        return "pretrained, head included"

    def model(self, rngs: nnx.Rngs) -> Classifier:
        """The classifier; its arrays are its own."""
        model = Classifier(self.config, rngs=rngs)
        state = [
            (path, x.replace(jnp.copy(self.read[path])) if path in self.read else x)
            for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))
        ]
        nnx.update(model, nnx.from_flat_state(state))
        return model


def load_classifier(
    directory: str | Path, labels: Sequence[str] | None = None, **overrides: Any
) -> Weights:
    """Loads `config.json` and the safetensors, in one file or sharded.

    What the file has no tensors of is fresh: the head of a base checkpoint, BERT's
    pooler where that is missing, the last layer of a head for another number of
    classes, and all of it where there are no weights at all.

    Args:
      directory: a local directory, or a hub name such as `owner/model`.
      labels: names of the classes; None for those of the config.
      **overrides: `EncoderConfig` fields, such as `param_dtype="bfloat16"`; both dtypes
        are float32 unless set here.

    Raises:
      FileNotFoundError: the directory has no `config.json`.
      ValueError: the directory cannot be had, the config is not of a model this one
        can represent, or tensors are missing, unexpected or misshapen (all named).
    """
    directory = local_directory(directory)
    stored = EncoderConfig.from_json(directory / CONFIG, **overrides)
    labels = stored.labels if labels is None else tuple(labels)
    config = dataclasses.replace(stored, labels=labels)
    if not has_weights(directory):
        check_room(config.parameters, config.param_dtype, directory / CONFIG)
        return Weights(config, {})
    tensors = _plain(read_tensors(directory), stored.model_type)
    check_depth(config.num_hidden_layers, tensors, directory)
    # Read as the file has it, with its own number of classes.
    state = nnx.to_flat_state(_abstract(stored))
    parts = [p for p in _HEAD if not any(name.startswith(f"{p}.") for name in tensors)]
    there = [(path, x) for path, x in state if path[0] not in parts]
    filled = fill_state(nnx.from_flat_state(there), tensors, _name, directory)
    shapes = {path: x.shape for path, x in nnx.to_flat_state(_abstract(config))}
    return Weights(
        config,
        {
            path: x[...]
            for path, x in nnx.to_flat_state(filled)
            if x.shape == shapes[path]
        },
    )


def has_weights(directory: Path) -> bool:
    """Whether there are any, of a format that can be read or of another."""
    patterns = ("*.safetensors*", "*.bin", "*.h5", "*.msgpack", "*.pt", "*.pth")
    return any(True for pattern in patterns for _ in directory.glob(pattern))


def save_model(
    model: Classifier | Encoder, directory: str | Path, tokenizer: Tokenizer | None
) -> None:
    """Writes `config.json`, `model.safetensors` and `tokenizer.json`.

    Args:
      model: a classifier, or an encoder alone, which makes a base checkpoint.
      directory: made if missing.
      tokenizer: the model's, if it is to be saved too.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    prefix, architecture = f"{model.config.model_type}.", "ForSequenceClassification"
    if isinstance(model, Encoder):
        prefix, architecture = "", "Model"

    def name_of(path: Sequence[Any]) -> str:
        name = _name(path)
        return name if path[0] == "classifier" else prefix + name

    if tokenizer is not None:
        save_tokenizer(tokenizer, directory / TOKENIZER)
    write_tensors(directory, state_tensors(nnx.state(model, nnx.Param), name_of))
    # Last: a directory with a config but without weights would be one from scratch.
    model.config.to_json(directory / CONFIG, architecture)


def _name(path: Sequence[Any]) -> str:
    return tensor_name(path[1:] if path[0] == "encoder" else path)


def _abstract(config: EncoderConfig) -> nnx.State:
    model = nnx.eval_shape(lambda: Classifier(config, rngs=nnx.Rngs(0)))
    return nnx.state(model, nnx.Param)


def _plain(tensors: Mapping[str, np.ndarray], model_type: str) -> dict[str, np.ndarray]:
    """The tensors that this model may have, without the prefix of the encoder."""

    def renamed(name: str) -> str:
        module, _, leaf = name.removeprefix(f"{model_type}.").rpartition(".")
        return f"{module}.{_OLD_NAMES.get(leaf, leaf)}"

    plain = {
        renamed(name): tensor
        for name, tensor in tensors.items()
        if not _LEFT_OUT.search(name)
    }
    if model_type == "roberta":
        # Base checkpoints carry one; the head does not use it.
        plain = {k: x for k, x in plain.items() if not k.startswith("pooler.")}
    return plain
