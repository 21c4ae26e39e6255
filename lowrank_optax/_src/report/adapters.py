"""A fine-tuned model's difference from its base as a LoRA adapter, and as PEFT's files.

Full-parameter fine-tuning with a low-rank method still ends in a full set of weights.
Where the difference from the base is close to low rank, a truncated SVD makes a small
adapter of it, which anything that reads Hugging Face PEFT's format can apply.
"""

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowrank_optax._src import linalg
from lowrank_optax._src.leaves.box import value_of
from lowrank_optax._src.leaves.paths import flatten, labels
from lowrank_optax._src.leaves.warn import warn
from lowrank_optax._src.report import diagnostics


class LoraAdapter(NamedTuple):
    """A low-rank difference ``b @ a`` of one leaf, in the leaf's own layout.

    Attributes:
      b: ``(*batch, m, r)``, ``U S^(1/2)``.
      a: ``(*batch, r, n)``, ``S^(1/2) V^T``.
      residual: ``||D - b a||_F / ||D||_F`` of the whole leaf's difference ``D``.
    """

    b: Float[Array, "*b m r"]
    a: Float[Array, "*b r n"]
    residual: float


def extract_lora(
    finetuned: Any, base: Any, *, rank: int | None = None, energy: float = 0.9
) -> dict[str, LoraAdapter]:
    """The best low-rank form of ``finetuned - base``, leaf by leaf.

    Every float leaf of two axes or more that differs is taken as ``(*batch, m, n)``,
    its difference as a truncated SVD in float32. One rank serves a whole stack. Leaves
    that do not differ are left out; so are biases, norms and other leaves that an
    adapter cannot hold, with a warning that names those which differ.

    Args:
      finetuned: a pytree of parameters, such as a nested dict or an ``nnx.State``.
      base: the parameters it started from, with the same paths and shapes.
      rank: rank of every adapter, at most ``min(m, n)``; None (default) to choose it by
        ``energy``.
      energy: where ``rank`` is None, each leaf gets the smallest rank that keeps this
        share of the squared Frobenius norm of every matrix in it; in (0, 1), default
        0.9.

    Returns:
      ``{path: LoraAdapter}``, path parts joined by ``/``; where two leaves would have
      one path, parts that hold a ``/`` themselves stand in quotes.

    Raises:
      ValueError: if paths or shapes differ, a difference is not finite, or ``rank`` or
        ``energy`` is out of range.

    >>> import jax.numpy as jnp
    >>> base = {"up_proj": {"kernel": jnp.ones((4, 6))}}
    >>> change = jnp.outer(jnp.arange(4.0), jnp.arange(6.0))
    >>> tuned = {"up_proj": {"kernel": base["up_proj"]["kernel"] + change}}
    >>> adapters = extract_lora(tuned, base)
    >>> adapter = adapters["up_proj/kernel"]
    >>> adapter.b.shape, adapter.a.shape, adapter.residual < 1e-5
    ((4, 1), (1, 6), True)
    """
    if rank is not None and rank < 1:
        raise ValueError(f"Cannot extract adapters of rank {rank}. Pass rank >= 1.")
    diagnostics.check_energy(energy)
    new, old = _leaves_by_path(finetuned), _leaves_by_path(base)
    if new.keys() != old.keys():
        raise ValueError(
            "Cannot compare the fine-tuned parameters with the base: "
            f"{sorted(new.keys() ^ old.keys())} stand in one of them only."
        )
    adapters, beyond = {}, []
    for path, x in new.items():
        x, y = jnp.asarray(x), jnp.asarray(old[path])
        if x.shape != y.shape:
            raise ValueError(
                f"Cannot compare parameter '{path}' of shape {x.shape} with the base's "
                f"of shape {y.shape}."
            )
        if bool(jnp.all(x == y)):
            continue
        if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
            beyond.append(path)
            continue
        difference = linalg.at_least_float32(x) - linalg.at_least_float32(y)
        if not bool(jnp.all(jnp.isfinite(difference))):
            raise ValueError(
                f"Cannot extract an adapter for parameter '{path}' of shape {x.shape}: "
                "its difference from the base is not finite."
            )
        adapters[path] = _truncate(difference, rank, energy)
    if beyond:
        warn(
            f"These parameters differ from the base and are no matrices, so the "
            f"adapters leave them as they are in the base: {beyond}."
        )
    return adapters


def _leaves_by_path(tree: Any) -> dict[str, Any]:
    paths, leaves, _ = flatten(tree)
    return dict(zip(labels(paths), map(value_of, leaves), strict=True))


def _truncate(
    difference: Float[Array, "*b m n"], rank: int | None, energy: float
) -> LoraAdapter:
    scaled, scale = linalg.unit_scale(difference)
    u, s, vt = linalg.svd(scaled)
    if rank is None:
        rank = int(jnp.max(diagnostics.rank_keeping(s, energy)))
    rank = min(rank, s.shape[-1])
    tail = diagnostics.tail_energy(s)
    # Each matrix of a stack was scaled by itself; the residual is that of all.
    weight = (scale[..., 0] / jnp.max(scale)) ** 2
    left_out = jnp.sum(weight * tail[..., rank : rank + 1])
    residual = float(jnp.sqrt(left_out / jnp.sum(weight * tail[..., :1])))
    root = jnp.sqrt(s[..., :rank]) * jnp.sqrt(scale[..., 0])
    return LoraAdapter(
        b=u[..., :rank] * root[..., None, :],
        a=root[..., :, None] * vt[..., :rank, :],
        residual=residual,
    )


def module_name(path: str) -> str:
    """The module of a parameter's path: dots for slashes, the parameter's name dropped.

    Args:
      path: such as the keys of what `extract_lora` gives.

    Returns:
      The name that torch would have for it.

    >>> module_name("model/layers/0/mlp/up_proj/kernel")
    'model.layers.0.mlp.up_proj'
    """
    return ".".join(path.split("/")[:-1])


def save_peft(
    adapters: Mapping[str, LoraAdapter],
    directory: str | Path,
    *,
    base_model_name: str,
    key_map: Callable[[str], str] = module_name,
    task_type: str | None = None,
) -> Path:
    """Writes adapters as ``adapter_config.json`` and ``adapter_model.safetensors``.

    ``peft.PeftModel.from_pretrained(base_model, directory)`` loads them, and its
    ``merge_and_unload`` gives base + b a. Leaves are taken to be in the layout of Flax,
    (in, out), and written in that of torch, (out, in). A leaf named ``embedding`` goes
    to an embedding; a head tied to it sees the change only after merging. Ranks may
    differ between modules, and ``lora_alpha`` equals the rank throughout, so that
    nothing is rescaled. Needs the safetensors package (extra ``examples``).

    Args:
      adapters: what `extract_lora` gave, or a part of it.
      directory: made if it does not exist.
      base_model_name: the hub name or directory of the base model, for the record.
      key_map: the name of the torch module for a path, by default `module_name`. For a
        stacked leaf, with one ``{}`` for each batch axis, where its index goes:
        ``"model.layers.{}.mlp.up_proj"``.
      task_type: PEFT's, such as "CAUSAL_LM" or "SEQ_CLS"; its Auto classes ask for one.

    Returns:
      The directory.

    Raises:
      ValueError: if there are no adapters, or ``key_map`` gives an empty name, one
        without the ``{}`` of a stacked leaf, or the same one twice.

    >>> import tempfile, jax.numpy as jnp, lowrank_optax as lro
    >>> base = {"up_proj": {"kernel": jnp.zeros((4, 6))}}
    >>> tuned = {"up_proj": {"kernel": jnp.ones((4, 6))}}
    >>> adapters = lro.adapters.extract_lora(tuned, base)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = lro.adapters.save_peft(adapters, directory, base_model_name="tiny")
    ...     sorted(file.name for file in path.iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    from safetensors.numpy import save_file

    if not adapters:
        raise ValueError(
            "Cannot save an adapter without modules: no matrix differs from the base."
        )
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for path, adapter in adapters.items():
        for name, b, a in _modules(path, adapter, key_map):
            if name in ranks:
                raise ValueError(
                    f"Cannot save parameter '{path}' as module '{name}': another one "
                    "has that name. Make `key_map` tell them apart."
                )
            ranks[name] = a.shape[0]
            key = f"base_model.model.{name}.lora_"
            down, up = "A.weight", "B.weight"
            if path.split("/")[-1] == "embedding":
                down, up = "embedding_A", "embedding_B"
            # safetensors writes the buffer as it lies, so a transposed view would be
            # stored untransposed.
            tensors[key + down] = np.ascontiguousarray(b.T)
            tensors[key + up] = np.ascontiguousarray(a.T)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = json.dumps(_config(ranks, base_model_name, task_type), indent=2)
    # Written aside and renamed: a link in a file's place is replaced, not followed, and
    # a full disk leaves older files as they are.
    with tempfile.TemporaryDirectory(prefix=".peft-", dir=directory) as folder:
        weights = Path(folder, "adapter_model.safetensors")
        save_file(tensors, weights, {"format": "pt"})
        text = Path(folder, "adapter_config.json")
        text.write_text(config + "\n")
        for draft in (weights, text):
            draft.replace(directory / draft.name)
    return directory


def _modules(path: str, adapter: LoraAdapter, key_map: Callable[[str], str]):
    """Name, b and a of each matrix of a leaf, which is one or a stack of them."""
    b, a = np.asarray(adapter.b), np.asarray(adapter.a)
    name, batch = key_map(path), b.shape[:-2]
    if not name or name.count("{}") != len(batch):
        raise ValueError(
            f"Cannot name the modules of parameter '{path}' with batch axes {batch}: "
            f"`key_map` gave '{name}'. It must give a name with {len(batch)} '{{}}', "
            "one for each batch axis."
        )
    for index in np.ndindex(batch):
        yield name.format(*index), b[index], a[index]


def _config(
    ranks: Mapping[str, int], base_model_name: str, task_type: str | None
) -> dict[str, Any]:
    rank = max(ranks.values())
    # PEFT matches these as regular expressions on the end of a module's name.
    pattern = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name,
        "target_modules": sorted(ranks),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
