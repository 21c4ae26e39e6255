"""Shape and numerics of an encoder, read from and written to Hugging Face's JSON."""

import dataclasses
from pathlib import Path
from typing import Any

from examples.common.config import (
    Fields,
    check_counts,
    check_dtypes,
    check_file,
    check_layers,
    check_positive,
    required_fields,
    stored_fields,
)
from examples.common.files import read_object, write_json
from examples.common.typed import checked_fields

MODEL_TYPES = ("roberta", "bert")

_MOST_LABELS = 2**16

# What this model cannot do otherwise.
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
        check_counts(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=self.max_position_embeddings,
            type_vocab_size=self.type_vocab_size,
        )
        check_layers(self.num_hidden_layers)
        if self.pad_token_id not in range(self.vocab_size):
            raise ValueError(
                f"pad_token_id must be a token, below vocab_size={self.vocab_size}, "
                f"got {self.pad_token_id!r}."
            )
        check_positive(
            layer_norm_eps=self.layer_norm_eps,
            initializer_range=self.initializer_range,
        )
        check_dtypes(dtype=self.dtype, param_dtype=self.param_dtype)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, got "
                    f"{getattr(self, name)!r}."
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
    def parameters(self) -> int:
        """How many weights the classifier has at least: those but for its head."""
        d, up = self.hidden_size, self.intermediate_size
        rows = self.vocab_size + self.max_position_embeddings + self.type_vocab_size
        layer = 4 * (d * d + d) + 2 * d * up + up + d + 4 * d
        return rows * d + 2 * d + self.num_hidden_layers * layer

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
            return cls(**(_config_fields(read_object(path)) | overrides))
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
_HF_FIELDS = stored_fields(EncoderConfig, but=("labels", "dtype", "param_dtype"))
_REQUIRED_FIELDS = required_fields(EncoderConfig)


def _config_fields(raw: Fields) -> Fields:
    """`EncoderConfig` fields of those of a Hugging Face config, or ValueError."""
    if raw.get("model_type") not in MODEL_TYPES:
        # Said first: of another model, other fields would be missing too.
        raise ValueError(
            f"model_type={raw.get('model_type')!r} is not supported, only "
            f"{' and '.join(map(repr, MODEL_TYPES))} are."
        )
    check_file(raw, _REQUIRED_FIELDS, _FIXED_FIELDS)
    fields = {name: raw[name] for name in _HF_FIELDS if name in raw}
    names = raw.get("id2label")
    if isinstance(names, dict) and names:
        try:
            fields["labels"] = tuple(names[str(i)] for i in range(len(names)))
        except KeyError as error:
            raise ValueError(f"id2label has no {error}.") from error
    elif "num_labels" in raw:
        check_counts(_MOST_LABELS, num_labels=raw["num_labels"])
        fields["labels"] = tuple(f"LABEL_{i}" for i in range(raw["num_labels"]))
    return checked_fields(EncoderConfig, fields, whole=False)
