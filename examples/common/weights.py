"""Hugging Face weight directories: finding, reading, writing, and filling a model.

A model says by `name_of` how its parameters are called in the file: a function from an
NNX path such as `("layers", 0, "mlp", "up_proj", "kernel")` to a tensor name. A name
with a `{}` in it stands for a stack: the parameter's leading axis runs over the tensors
named with 0, 1, 2, ... in that place. Every parameter called `kernel` is (in, out) here
and (out, in) in the file.
"""

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from examples.common.files import aside, read_object

NameOf = Callable[[tuple[Any, ...]], str]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Eight bits take a scale each, in files of their own; quantized weights are no floats.
_DTYPES = ("F64", "F32", "F16", "BF16")
# What they are read as here; buffers of whole numbers are left out by name.
_BUFFERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")


def local_directory(name: str | Path) -> Path:
    """An existing directory as it is, or the local copy of a hub repository.

    Args:
      name: a directory, or a hub name such as `owner/model`, which is downloaded
        (configuration, tokenizer and safetensors only) unless the cache has it.

    Raises:
      ValueError: it is neither, or the hub cannot be reached.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{name} is a file; give the directory that holds it.")
    # Imported here because everything local works without the hub's client.
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{name} is no directory, and downloading it from the hub needs the "
            "package huggingface_hub. Install it, or give a directory."
        ) from error
    wanted = ["*.json", "model*.safetensors", "vocab.txt", "merges.txt"]
    try:
        return Path(snapshot_download(str(name), allow_patterns=wanted))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{name} is no directory, and the Hugging Face hub did not give it either "
            f"({reason[0] if reason else type(error).__name__}). Give an existing "
            "directory, or check the name and the network."
        ) from error


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of `model.safetensors`, or of the shards its index names.

    Raises:
      ValueError: there are no such files, one of them is missing, damaged, outside of
        the directory, or holds a tensor of a type that cannot be used.
    """
    if (directory / _WEIGHTS).is_file():
        files = [_WEIGHTS]
    elif (directory / _INDEX).is_file():
        files = _shards(directory / _INDEX)
    else:
        raise ValueError(
            f"{directory} holds neither {_WEIGHTS} nor {_INDEX}. Weights of another "
            "format must be converted to safetensors first."
        )
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        try:
            _check_types(directory / file)
            tensors |= load_file(directory / file)
        except (OSError, SafetensorError, MemoryError) as error:
            raise ValueError(f"Cannot read {directory / file}: {error}") from error
    return tensors


def _shards(index: Path) -> list[str]:
    """The files that an index names, all of them inside of its directory."""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} is no safetensors index: it has no 'weight_map'.")
    for tensor, name in names.items():
        # By the name alone: the hub's cache itself is made of links that lead outside.
        kinds = (PurePosixPath, PureWindowsPath)
        if not isinstance(name, str) or not name or "\0" in name:
            raise ValueError(f"{index} names no file for {tensor}: {name!r}.")
        if any(kind(name).anchor or ".." in kind(name).parts for kind in kinds):
            raise ValueError(
                f"{index} names {name!r} for {tensor}: a file must be inside of"
                f" {index.parent}."
            )
    return sorted(set(names.values()))


def _check_types(path: Path) -> None:
    """Raises ValueError for a tensor of a type that cannot be used, by name."""
    with safe_open(path, "numpy") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            kind = file.get_slice(name).get_dtype()
            if kind not in _DTYPES + _BUFFERS:
                raise ValueError(
                    f"Cannot read {path}: its tensor {name} is of {kind}, expected one"
                    f" of {', '.join(_DTYPES)}. Convert the weights first."
                )


def check_depth(layers: int, tensors: Mapping[str, Any], source: object) -> None:
    """Raises ValueError for more layers than there are tensors.

    They would be made one by one, only to find that most are missing.
    """
    if layers > len(tensors):
        raise ValueError(
            f"The weights in {source} do not fit the model: its config.json says"
            f" num_hidden_layers={layers:,}, and there are {len(tensors):,} tensors."
        )


def write_tensors(directory: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes `model.safetensors`; an interrupted write leaves an older one intact."""
    # save_file writes memory order, so a transposed view would come back scrambled.
    dense = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    # transformers refuses a file that does not say which framework it is laid out for.
    with aside(directory / _WEIGHTS) as draft:
        save_file(dense, draft, metadata={"format": "pt"})


def fill_state(
    state: nnx.State, tensors: Mapping[str, np.ndarray], name_of: NameOf, source: object
) -> nnx.State:
    """A copy of `state` that holds the tensors, in the dtypes of `state`.

    Args:
      state: parameters, real or abstract (`nnx.eval_shape`).
      tensors: what the file holds, by name.
      name_of: see the module's docstring.
      source: where the tensors are from, for the error.

    Raises:
      ValueError: naming every tensor that is missing, unexpected, misshapen or not of
        floating point, with its shape and the expected one.
    """
    problems: list[str] = []
    expected: set[str] = set()

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        expected.add(name)
        found = tensors.get(name)
        if found is None:
            problems.append(f"missing {name}, expected shape {shape}")
        elif found.shape != shape:
            problems.append(f"misshapen {name}, shape {found.shape}, expected {shape}")
        elif not jnp.issubdtype(found.dtype, jnp.floating):
            problems.append(
                f"unusable {name}, shape {found.shape} as expected but of "
                f"{found.dtype}, expected floating point"
            )
        else:
            return found
        return None

    filled = []
    for path, param in nnx.to_flat_state(state):
        name = name_of(path)
        shape = param.shape[1:] if "{}" in name else param.shape
        stored = shape[::-1] if path[-1] == "kernel" else shape
        if "{}" in name:
            parts = [read(name.format(i), stored) for i in range(param.shape[0])]
        else:
            parts = [read(name, stored)]
        if problems:
            # All of them are named, and nothing is made of a size that may be absurd.
            continue
        found = [part for part in parts if part is not None]
        value = np.stack(found) if "{}" in name else found[0]
        if path[-1] == "kernel":
            value = value.swapaxes(-1, -2)
        filled.append((path, param.replace(jnp.asarray(value, param.dtype))))
    for name in sorted(set(tensors) - expected):
        problems.append(f"unexpected {name}, shape {tensors[name].shape}")
    if problems:
        raise ValueError(
            f"The weights in {source} do not fit the model:\n  " + "\n  ".join(problems)
        )
    return nnx.from_flat_state(filled)


def state_tensors(state: nnx.State, name_of: NameOf) -> dict[str, np.ndarray]:
    """The inverse of `fill_state`: every parameter under its name in the file."""
    tensors: dict[str, np.ndarray] = {}
    for path, param in nnx.to_flat_state(state):
        name, value = name_of(path), np.asarray(param[...])
        if path[-1] == "kernel":
            value = value.swapaxes(-1, -2)
        if "{}" in name:
            tensors |= {name.format(i): part for i, part in enumerate(value)}
        else:
            tensors[name] = value
    return tensors
