"""LLaMA weights in Hugging Face's directory format, in and out."""

from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from examples.common.tokens import TOKENIZER, save_tokenizer
from examples.common.weights import (
    check_depth,
    fill_state,
    local_directory,
    read_tensors,
    state_tensors,
    write_tensors,
)
from examples.llama.config import LlamaConfig
from examples.llama.model import Llama

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


def tensor_name(path: tuple[Any, ...]) -> str:
    """Name of a parameter in the file, with `{}` for the layer if layers are stacked.

    >>> tensor_name(("layers", 3, "mlp", "up_proj", "kernel"))
    'model.layers.3.mlp.up_proj.weight'
    >>> tensor_name(("layers", "mlp", "up_proj", "kernel"))
    'model.layers.{}.mlp.up_proj.weight'
    """
    modules = [str(part) for part in path[:-1]]
    if modules[0] == "layers" and not modules[1].isdigit():
        modules.insert(1, "{}")
    if modules[0] != "lm_head":
        modules.insert(0, "model")
    return ".".join([*modules, "weight"])


def load_llama(directory: str | Path, **overrides: Any) -> Llama:
    """Loads `config.json` and the safetensors, in one file or sharded.

    Args:
      directory: a local directory, or a hub name such as `owner/model`.
      **overrides: `LlamaConfig` fields, such as `scan_layers=True` or
        `param_dtype="bfloat16"`; both dtypes are float32 unless set here.

    Raises:
      FileNotFoundError: the directory has no `config.json`.
      ValueError: the directory cannot be had, the config is not of a model this one
        can represent, or tensors are missing, unexpected or misshapen (all named).
    """
    directory = local_directory(directory)
    config = LlamaConfig.from_json(directory / "config.json", **overrides)
    tensors = {
        name: tensor
        for name, tensor in read_tensors(directory).items()
        # A table of RoPE's frequencies that old checkpoints carry; they follow from
        # rope_theta.
        if not name.endswith("rotary_emb.inv_freq")
    }
    if config.tie_word_embeddings and _HEAD in tensors and _EMBEDDING in tensors:
        # Some files repeat the tied matrix; a head of its own stays and is refused.
        if np.array_equal(tensors[_HEAD], tensors[_EMBEDDING]):
            del tensors[_HEAD]
    check_depth(config.num_hidden_layers, tensors, directory)
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(config)))
    return nnx.merge(graph, fill_state(state, tensors, tensor_name, directory))


def save_llama(
    model: Llama, directory: str | Path, tokenizer: Tokenizer | None = None
) -> None:
    """Writes `config.json` and `model.safetensors`, creating the directory.

    The file is the same for stacked and separate layers; tensors keep the model's
    `param_dtype`. A tokenizer is written beside them, as `tokenizer.json`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory, state_tensors(nnx.state(model, nnx.Param), tensor_name))
    if tokenizer is not None:
        save_tokenizer(tokenizer, directory / TOKENIZER)
    model.config.to_json(directory / "config.json")
