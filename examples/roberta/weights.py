"""Encoder weights in Hugging Face's directory format, in and out."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from examples.common.weights import (
    fill_state,
    local_directory,
    read_tensors,
    state_tensors,
    write_tensors,
)
from examples.roberta.config import EncoderConfig
from examples.roberta.model import Classifier, Encoder

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"

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
class Loaded:
    """A classifier and where its weights are from.

    Attributes:
      model: the classifier.
      fresh: names of the tensors that are initial values and not read.
    """

    model: Classifier
    fresh: tuple[str, ...]

    @property
    def start(self) -> str:
        """What training starts from, in words."""
        if any(name.startswith("embeddings.") for name in self.fresh):
            return "from scratch"
        if self.fresh:
            return f"pretrained, with fresh {', '.join(self.fresh)}"
        return "pretrained, head included"


def load_classifier(
    directory: str | Path,
    labels: Sequence[str] | None = None,
    *,
    rngs: nnx.Rngs | None = None,
    **overrides: Any,
) -> Loaded:
    """Loads `config.json` and the safetensors, in one file or sharded.

    What the file has no tensors of is initial: the head of a base checkpoint, BERT's
    pooler where that is missing, the last layer of a head for another number of
    classes, and all of it where there are no weights at all.

    Args:
      directory: a local directory, or a hub name such as `owner/model`.
      labels: names of the classes; None for those of the config.
      rngs: source of initial values; `nnx.Rngs(0)` if None.
      **overrides: `EncoderConfig` fields, such as `param_dtype="bfloat16"`; both dtypes
        are float32 unless set here.

    Raises:
      FileNotFoundError: the directory has no `config.json`.
      ValueError: the directory cannot be had, the config is not of a model this one
        can represent, or tensors are missing, unexpected or misshapen (all named).
    """
    directory = local_directory(directory)
    own = EncoderConfig.from_json(directory / CONFIG, **overrides)
    config = own if labels is None else dataclasses.replace(own, labels=tuple(labels))
    model = Classifier(config, rngs=nnx.Rngs(0) if rngs is None else rngs)
    if not any(directory.glob("*.safetensors*")) and not _other_weights(directory):
        return Loaded(model, _names(nnx.state(model, nnx.Param)))

    tensors = _plain(read_tensors(directory), own.model_type)
    initial = nnx.state(model, nnx.Param)
    # As the file has it: with its own number of classes.
    stored = nnx.state(nnx.eval_shape(lambda: Classifier(own, rngs=nnx.Rngs(0))))
    fresh = _absent(stored, tensors)
    if len(own.labels) != len(config.labels) and not _is_fresh("classifier", fresh):
        fresh |= {path for path, _ in nnx.to_flat_state(stored) if _last(path)}
        for path in fresh:
            tensors.pop(_name(path), None)
    read = [(path, x) for path, x in nnx.to_flat_state(stored) if path not in fresh]
    filled = dict(
        nnx.to_flat_state(
            fill_state(nnx.from_flat_state(read), tensors, _name, directory)
        )
    )
    kept = [(path, filled.get(path, x)) for path, x in nnx.to_flat_state(initial)]
    nnx.update(model, nnx.from_flat_state(kept))
    return Loaded(model, tuple(sorted(map(_name, fresh))))


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
        tokenizer.save(str(directory / TOKENIZER))
    write_tensors(directory, state_tensors(nnx.state(model, nnx.Param), name_of))
    # Last: a directory with a config but without weights would be one from scratch.
    model.config.to_json(directory / CONFIG, architecture)


def _name(path: Sequence[Any]) -> str:
    return tensor_name(path[1:] if path[0] == "encoder" else path)


def _names(state: nnx.State) -> tuple[str, ...]:
    return tuple(sorted(_name(path) for path, _ in nnx.to_flat_state(state)))


def _other_weights(directory: Path) -> bool:
    """Whether there are weights in a format that must be converted first."""
    patterns = ("*.bin", "*.h5", "*.msgpack", "*.pt", "*.pth")
    return any(file for pattern in patterns for file in directory.glob(pattern))


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


def _absent(stored: nnx.State, tensors: Iterable[str]) -> set[tuple[Any, ...]]:
    """The parameters of head parts of which the file has nothing at all."""
    names = list(tensors)
    parts = [p for p in _HEAD if not any(name.startswith(f"{p}.") for name in names)]
    return {path for path, _ in nnx.to_flat_state(stored) if path[0] in parts}


def _is_fresh(part: str, fresh: Iterable[tuple[Any, ...]]) -> bool:
    return any(path[0] == part for path in fresh)


def _last(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is of the layer that gives the classes."""
    return path[0] == "classifier" and (len(path) == 2 or path[1] == "out_proj")
