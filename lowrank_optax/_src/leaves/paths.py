"""Paths and leaves of a tree of parameters."""

import collections
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._src import linalg
from lowrank_optax._src.leaves.box import is_variable, value_of

Path = tuple[str, ...]

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def path_parts(key_path: tuple[Any, ...]) -> Path:
    """Readable parts of a key path, by which a parameter is known."""
    return tuple(jax.tree_util.keystr((k,), simple=True) for k in key_path)


def labels(paths: Sequence[Path]) -> list[str]:
    """A name for each path, parts joined by ``/``, and no two alike.

    Where two would be, as of ``{"a/b": x, "a": {"b": y}}``, parts with a ``/`` in them
    stand in quotes.
    """
    plain = ["/".join(path) for path in paths]
    times = collections.Counter(plain)
    return [
        "/".join(f"'{p}'" if "/" in p else p for p in path) if times[name] > 1 else name
        for path, name in zip(paths, plain, strict=True)
    ]


def words(path: str) -> list[str]:
    """The words of a path in lower case, parts split at case too."""
    return [word.lower() for word in _WORD.findall(path)]


def full_precision(leaf: Any) -> Any:
    """Floating-point arrays in float32 at least, boxes kept; others as they are."""

    def cast(x):
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return linalg.at_least_float32(x) if floating else x

    return jax.tree.map(cast, leaf)


def flatten(tree: Any) -> tuple[list[Path], list[Any], Any]:
    """Paths, leaves (boxes kept whole) and tree definition."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_variable)
    return [path_parts(k) for k, _ in flat], [x for _, x in flat], treedef


def check_arrays(tree: Any) -> None:
    """Refuse a leaf that is no array of numbers, by its path.

    Raises:
      TypeError: for the first one.
    """
    paths, leaves, _ = flatten(tree)
    for parts, x in zip(paths, map(value_of, leaves), strict=True):
        if not is_array(x):
            raise TypeError(
                f"Cannot optimize '{'/'.join(parts)}': it must be an array of numbers, "
                f"got {x!r} of type {type(x).__name__}. Make it one by jnp.asarray, or "
                "leave it out of the parameters, with None in its place."
            )


def is_array(x: Any) -> bool:
    """Whether it has numbers; random keys are none."""
    dtype = getattr(x, "dtype", None)
    known = dtype is not None and hasattr(x, "shape")
    return known and not jnp.issubdtype(dtype, jax.dtypes.prng_key)


def placeholders(tree: Any) -> dict[Path, Any]:
    """What stands where another transformation has left out the parameter."""

    def left_out(x):
        return value_of(x) is None or isinstance(value_of(x), optax.MaskedNode)

    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=left_out)
    return {path_parts(key): value_of(x) for key, x in flat if left_out(x)}
