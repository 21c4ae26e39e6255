"""Shape and numerics of a LLaMA model, read from and written to Hugging Face's JSON."""

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

CONFIGS = Path(__file__).parent / "configs"

# What this model cannot do otherwise.
_FIXED_FIELDS = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
}
# The same, of fields that Hugging Face's configs lack where they have this value.
_FIXED_IF_THERE = {"partial_rotary_factor": 1.0, "quantization_config": None}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and numerics of a LLaMA model, in Hugging Face's field names.

    Attributes:
      vocab_size: number of tokens V.
      hidden_size: model width D.
      intermediate_size: width of the SwiGLU feed-forward layer.
      num_hidden_layers: number of decoder layers.
      num_attention_heads: query heads N.
      num_key_value_heads: key and value heads K, a divisor of N; None means N.
      head_dim: width H of a head, even; None means `hidden_size / N`.
      rms_norm_eps: added to the mean square in every norm.
      rope_theta: base of the rotary frequencies.
      max_position_embeddings: longest sequence the model accepts.
      tie_word_embeddings: whether the head is the transposed embedding.
      initializer_range: standard deviation of every initial matrix.
      bos_token_id: first token of a text; only kept for the saved config.
      eos_token_id: last token(s) of a text; only kept for the saved config.
      scan_layers: hold the layers as one, each parameter with a leading layer axis,
        and scan over it: compile time no longer grows with depth.
      remat: recompute each layer in the backward pass instead of keeping its
        activations.
      dtype: what matrix products and activations are computed in.
      param_dtype: what parameters are stored in.

    Raises:
      ValueError: a field has no meaning, or two fields do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    scan_layers: bool = False
    remat: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        check_counts(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.max_position_embeddings,
        )
        check_layers(self.num_hidden_layers)
        check_positive(
            rms_norm_eps=self.rms_norm_eps,
            rope_theta=self.rope_theta,
            initializer_range=self.initializer_range,
        )
        check_dtypes(dtype=self.dtype, param_dtype=self.param_dtype)
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide "
                f"hidden_size={self.hidden_size}. Choose a divisor, or set head_dim."
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}. Choose a divisor."
            )
        width = self.head_width
        if not isinstance(width, int) or width < 2 or width % 2:
            raise ValueError(
                f"head_dim must be even and positive for rotary embeddings, got "
                f"{width!r}. Change num_attention_heads, or set head_dim."
            )

    @property
    def parameters(self) -> int:
        """How many weights the model has."""
        d, h = self.hidden_size, self.head_width
        attention = 2 * d * h * (self.num_attention_heads + self.kv_heads)
        layer = attention + 3 * d * self.intermediate_size + 2 * d
        tables = 1 if self.tie_word_embeddings else 2
        return tables * self.vocab_size * d + self.num_hidden_layers * layer + d

    @property
    def kv_heads(self) -> int:
        """Key and value heads K, with the default filled in."""
        if self.num_key_value_heads is None:
            return self.num_attention_heads
        return self.num_key_value_heads

    @property
    def head_width(self) -> int:
        """Width H of a head, with the default filled in."""
        if self.head_dim is None:
            return self.hidden_size // self.num_attention_heads
        return self.head_dim

    @classmethod
    def from_json(
        cls, path: str | Path, shapes_only: bool = False, **overrides: Any
    ) -> "LlamaConfig":
        """Reads a Hugging Face `config.json`.

        Fields without a counterpart here (`use_cache`, ...) are ignored; so is the
        stored `dtype`: what the model computes in and keeps is chosen by the caller.

        Args:
          path: the JSON file.
          shapes_only: the model is not run, so that its rotary frequencies are not
            looked at.
          **overrides: `LlamaConfig` fields that replace the file's.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is no JSON object, lacks a field, or describes a model
            that differs from this one (biases, rope scaling, another activation).
        """
        path = Path(path)
        try:
            raw = read_object(path)
            if shapes_only:
                raw = {k: x for k, x in raw.items() if k not in _ROPE}
            return cls(**(_config_fields(raw) | overrides))
        except ValueError as error:
            raise ValueError(f"Cannot use the model config {path}: {error}") from error

    def to_json(self, path: str | Path) -> None:
        """Writes the config in the format that `from_json` and transformers read."""
        raw: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], **_FIXED_FIELDS}
        raw |= {name: getattr(self, name) for name in _HF_FIELDS}
        raw |= {"num_key_value_heads": self.kv_heads, "head_dim": self.head_width}
        # transformers 4 reads `rope_theta` and `torch_dtype`, transformers 5
        # `rope_parameters` and `dtype`.
        raw["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
        raw["torch_dtype"] = raw["dtype"] = self.param_dtype
        write_json(Path(path), raw)


def config_path(model: str) -> Path | None:
    """The file of a name in `CONFIGS`, or of a path; None for anything else.

    Of a name, "llama_" may be left out.
    """
    named = (CONFIGS / f"{name}.json" for name in (model, f"llama_{model}"))
    return next((path for path in (*named, Path(model)) if path.is_file()), None)


def config_names() -> str:
    """The names in `CONFIGS`, for errors."""
    return ", ".join(sorted(path.stem for path in CONFIGS.glob("*.json")))


def named_config(model: str, seq_len: int, **overrides: Any) -> LlamaConfig:
    """The config of a name in `CONFIGS`, or of a path, for sequences of a length.

    Args:
      model: see `config_path`.
      seq_len: tokens of a sequence.
      **overrides: as of `LlamaConfig.from_json`.

    Raises:
      ValueError: there is no such model, or it does not take such sequences.
    """
    path = config_path(model)
    if path is None:
        raise ValueError(
            f"Unknown model {model!r}: choose from {config_names()}, or give the path"
            " of a config.json."
        )
    config = LlamaConfig.from_json(path, **overrides)
    if seq_len > config.max_position_embeddings:
        raise ValueError(
            f"Cannot train on sequences of {seq_len} tokens: the model takes"
            f" {config.max_position_embeddings}. Lower --seq-len."
        )
    return config


_ROPE = ("rope_scaling", "rope_parameters")

# How this model is laid out and computed is no property of the checkpoint.
_HF_FIELDS = stored_fields(
    LlamaConfig, but=("scan_layers", "remat", "dtype", "param_dtype")
)
_REQUIRED_FIELDS = required_fields(LlamaConfig)


def _config_fields(raw: Fields) -> Fields:
    """`LlamaConfig` fields of those of a Hugging Face config, or ValueError."""
    check_file(raw, _REQUIRED_FIELDS, _FIXED_FIELDS | _FIXED_IF_THERE)
    fields = {name: raw[name] for name in _HF_FIELDS if name in raw}
    # transformers 4 has one name, transformers 5 the other; a file may have both.
    for name in _ROPE:
        rope = {} if raw.get(name) is None else raw[name]
        if not isinstance(rope, dict):
            raise ValueError(f"{name} must be an object, got {rope!r}.")
        _check_rope(name, rope)
        if "rope_theta" in rope:
            fields["rope_theta"] = rope["rope_theta"]
    # Lists become tuples: the config is a static part of the model, hence hashable.
    return checked_fields(LlamaConfig, fields, whole=False)


def _check_rope(name: str, rope: Fields) -> None:
    """Raises ValueError unless the frequencies are those of `rope_theta` alone."""
    for key in ("rope_type", "type"):
        if (scaling := rope.get(key, "default")) != "default":
            raise ValueError(
                f"rope scaling {scaling!r} is not supported, only 'default' is."
            )
    for key, value in rope.items():
        if key in ("partial_rotary_factor", "factor") and value == 1:
            continue
        if key not in ("rope_type", "type", "rope_theta"):
            raise ValueError(f"{name}: {key}={value!r} is not supported.")
