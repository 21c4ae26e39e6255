"""Shape and numerics of an encoder, read from and written to Hugging Face's JSON."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from examples.common.files import write_json

MODEL_TYPES = ("roberta", "bert")

_DTYPES = ("float32", "bfloat16", "float16")

# Fields of a Hugging Face config that change the function this model computes, each
# with the one value it can represent. A missing field has this value there too.
_FIXED_FIELDS = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape and numerics of a RoBERTa or BERT encoder, in Hugging Face's field names.

    Attributes:
      model_type: "roberta" or "bert": where positions begin, and which head there is.
      vocab_size: number of tokens V.
      hidden_size: model width D.
      intermediate_size: width of the feed-forward layer.
      num_hidden_layers: number of layers.
      num_attention_heads: heads N, a divisor of D.
      max_position_embeddings: rows of the table of positions; RoBERTa leaves the first
        `pad_token_id + 1` of them unused.
      type_vocab_size: how many kinds of tokens are told apart, such as first and
        second sentence.
      pad_token_id: what fills up short sequences.
      layer_norm_eps: added to the variance in every norm.
      hidden_dropout_prob: of embeddings and of what is added to the residual stream.
      attention_probs_dropout_prob: of attention weights.
      classifier_dropout: of the head's input; None means `hidden_dropout_prob`.
      initializer_range: standard deviation of every initial matrix.
      labels: names of the classes; one name means a number is predicted.
      dtype: what matrix products and activations are computed in.
      param_dtype: what parameters are stored in.

    Raises:
      ValueError: a field has no meaning, or two fields do not fit together.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int
    pad_token_id: int
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    initializer_range: float = 0.02
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.model_type not in MODEL_TYPES:
            raise ValueError(
                f"model_type={self.model_type!r} is not supported, only "
                f"{' and '.join(map(repr, MODEL_TYPES))} are."
            )
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "type_vocab_size",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"{name} must be a whole number of at least 1, got {value!r}."
                )
        if self.pad_token_id not in range(self.vocab_size):
            raise ValueError(
                f"pad_token_id must be a token, below vocab_size={self.vocab_size}, "
                f"got {self.pad_token_id!r}."
            )
        for name in ("layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value!r}.")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, got "
                    f"{getattr(self, name)!r}."
                )
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in _DTYPES:
                raise ValueError(
                    f"{name} must be one of {', '.join(_DTYPES)}, "
                    f"got {getattr(self, name)!r}."
                )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide "
                f"hidden_size={self.hidden_size}. Choose a divisor."
            )
        if not self.labels:
            raise ValueError("labels must name at least one class.")
        if self.max_length < 1:
            raise ValueError(
                f"max_position_embeddings={self.max_position_embeddings} leaves no "
                f"position behind pad_token_id={self.pad_token_id}. Raise it."
            )

    @property
    def first_position(self) -> int:
        """Row of the table of positions that belongs to the first token."""
        return self.pad_token_id + 1 if self.model_type == "roberta" else 0

    @property
    def max_length(self) -> int:
        """Tokens in the longest sequence that the model accepts."""
        return self.max_position_embeddings - self.first_position

    @property
    def head_dropout(self) -> float:
        """Dropout of the head, with the default filled in."""
        if self.classifier_dropout is None:
            return self.hidden_dropout_prob
        return self.classifier_dropout

    @classmethod
    def from_json(cls, path: str | Path, **overrides: Any) -> "EncoderConfig":
        """Reads a Hugging Face `config.json`.

        Fields without a counterpart here are ignored; so is the stored `dtype`: what
        the model computes in and keeps is chosen by the caller.

        Args:
          path: the JSON file.
          **overrides: `EncoderConfig` fields that replace the file's.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is no JSON object, lacks a field, or describes a model
            that differs from these (a decoder, relative positions, another activation).
        """
        path = Path(path)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls(**(_config_fields(raw) | overrides))
        except ValueError as error:
            raise ValueError(f"Cannot use the model config {path}: {error}") from error

    def to_json(self, path: str | Path, architecture: str) -> None:
        """Writes the config in the format that `from_json` and transformers read.

        Args:
          path: the file.
          architecture: the class in transformers that the weights are of, without the
            model's name, such as "ForSequenceClassification".
        """
        family = {"roberta": "Roberta", "bert": "Bert"}[self.model_type]
        raw: dict[str, Any] = {"architectures": [family + architecture]}
        raw |= {name: getattr(self, name) for name in _HF_FIELDS} | _FIXED_FIELDS
        raw["id2label"] = {str(i): name for i, name in enumerate(self.labels)}
        raw["label2id"] = {name: i for i, name in enumerate(self.labels)}
        # transformers 4 reads `torch_dtype`, transformers 5 `dtype`.
        raw["torch_dtype"] = raw["dtype"] = self.param_dtype
        write_json(Path(path), raw)


# Labels are written in Hugging Face's way; how this model is computed is no property
# of the checkpoint.
_HF_FIELDS = [
    field.name
    for field in dataclasses.fields(EncoderConfig)
    if field.name not in ("labels", "dtype", "param_dtype")
]
_REQUIRED_FIELDS = [
    field.name
    for field in dataclasses.fields(EncoderConfig)
    if field.default is dataclasses.MISSING
]


def _config_fields(raw: Any) -> dict[str, Any]:
    """`EncoderConfig` fields of a parsed Hugging Face config, or ValueError."""
    if not isinstance(raw, dict):
        raise ValueError(f"it holds {type(raw).__name__}, not a JSON object.")
    if raw.get("model_type") not in MODEL_TYPES:
        # Said first: of another model, other fields would be missing too.
        raise ValueError(
            f"model_type={raw.get('model_type')!r} is not supported, only "
            f"{' and '.join(map(repr, MODEL_TYPES))} are."
        )
    missing = [name for name in _REQUIRED_FIELDS if name not in raw]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}.")
    for name, only in _FIXED_FIELDS.items():
        if raw.get(name, only) != only:
            raise ValueError(
                f"{name}={raw[name]!r} is not supported, only {only!r} is."
            )
    fields = {name: raw[name] for name in _HF_FIELDS if name in raw}
    names = raw.get("id2label")
    if isinstance(names, dict) and names:
        try:
            fields["labels"] = tuple(names[str(i)] for i in range(len(names)))
        except KeyError as error:
            raise ValueError(f"id2label has no {error}.") from error
    elif "num_labels" in raw:
        fields["labels"] = tuple(f"LABEL_{i}" for i in range(raw["num_labels"]))
    return fields
