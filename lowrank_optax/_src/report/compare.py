"""Whether a state, as one of a checkpoint, is what a transformation makes."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from lowrank_optax._src.leaves.box import unbox, value_of
from lowrank_optax._src.leaves.fields import abstract_state
from lowrank_optax._src.leaves.paths import Path, flatten, path_parts

_SHOWN = 20  # arrays that differ; a model has hundreds
_REMEDIES = {
    "smaller": "A smaller rank made smaller arrays: give it to the transformation. If "
    "lowrank_optax.rank.shrink has cut the state, lowrank_optax.rank.fit(tx, state) is "
    "the transformation for it.",
    "larger": "A larger rank made larger arrays: give it to the transformation. Once "
    "the state is restored, lowrank_optax.rank.shrink frees what is not used of it, "
    "and lowrank_optax.convert_state cuts it to a smaller rank.",
    "dtype": "Parameters of another dtype, or a `Cast`, made arrays of another dtype.",
    "alone": "Another method, or codecs as for 8 bits, made arrays that only one of "
    "the two has: restore the state with the transformation that made it. For bytes, "
    "lowrank_optax.convert_state makes of it what the other keeps.",
}


def check_state(tx: optax.GradientTransformation, opt_state: Any, params: Any) -> None:
    """Refuse a state that is not what a transformation makes, saying where it differs.

    For what is known of a checkpoint before it is restored: a reader that is told other
    shapes names neither parameter nor field, nor what is to be done.

    Args:
      tx: any Optax transformation, which is to be given the state.
      opt_state: of arrays, or of whatever else has a shape and a dtype, such as the
        metadata of a checkpoint. Containers may be others than the transformation's,
        such as dicts for NamedTuples, if their keys are the names of the fields.
      params: arrays or abstract ones.

    Returns:
      None, for a state that fits.

    Raises:
      ValueError: for one that does not, with parameter, field and both shapes
        of each array that differs, and the remedies.

    >>> import jax, jax.numpy as jnp, lowrank_optax as lro
    >>> params = {"w": jnp.ones((12, 16))}
    >>> saved = jax.eval_shape(lro.mlorc_scale_by_lion(rank=2).init, params)
    >>> lro.check_state(lro.mlorc_scale_by_lion(rank=2), saved, params)
    >>> try:
    ...     lro.check_state(lro.mlorc_scale_by_lion(rank=4), saved, params)
    ... except ValueError as error:
    ...     print(str(error).splitlines()[1])
      'inner_state/mu.left' of 'w' (12, 16): float32 (12, 2), must be float32 (12, 4)
    """
    lines, kinds = differences(tx, opt_state, params)
    if lines:
        remedies = [text for kind, text in _REMEDIES.items() if kind in kinds]
        what = "Cannot use a state that is not what the transformation makes:"
        raise ValueError("\n".join([what, *lines, *remedies]))


def differences(
    tx: optax.GradientTransformation, opt_state: Any, params: Any
) -> tuple[list[str], set[str]]:
    """A line for each array that is not what a transformation makes, and the kinds."""
    wanted, found = _arrays(abstract_state(tx, params)), _arrays(opt_state)
    paths, leaves, _ = flatten(params)
    shapes = {p: tuple(value_of(x).shape) for p, x in zip(paths, leaves, strict=True)}
    lines, kinds = [], set()
    for parts in dict.fromkeys((*wanted, *found)):
        ours, theirs = wanted.get(parts), found.get(parts)
        if ours != theirs:
            kinds.add(_kind(ours, theirs))
            there, here = _said(theirs), _said(ours)
            lines.append(f"  {_place(parts, shapes)}: {there}, must be {here}")
    rest = len(lines) - _SHOWN
    return lines[:_SHOWN] + ([f"  and {rest} more"] if rest > 0 else []), kinds


def _arrays(state: Any) -> dict[Path, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each array, by its path."""
    plain = unbox(state)
    flat, _ = jax.tree_util.tree_flatten_with_path(
        plain, is_leaf=lambda x: hasattr(x, "shape") and hasattr(x, "dtype")
    )
    arrays = [(path_parts(key), x) for key, x in flat if hasattr(x, "shape")]
    return {parts: (tuple(x.shape), str(x.dtype)) for parts, x in arrays}


def _kind(ours: Any, theirs: Any) -> str:
    if ours is None or theirs is None or len(ours[0]) != len(theirs[0]):
        return "alone"
    if ours[0] == theirs[0]:
        return "dtype"
    less = all(i <= j for i, j in zip(theirs[0], ours[0], strict=True))
    return "smaller" if less else "larger"


def _said(array: tuple[tuple[int, ...], str] | None) -> str:
    return "absent" if array is None else f"{array[1]} {array[0]}"


def _place(parts: Path, shapes: Mapping[Path, tuple[int, ...]]) -> str:
    """Field and parameter of an array, where it is of one; else its path."""
    for start in range(len(parts)):
        for end in range(len(parts), start, -1):
            path = parts[start:end]
            if path in shapes:
                field = ".".join(("/".join(parts[:start]), *parts[end:]))
                return f"'{field}' of '{'/'.join(path)}' {shapes[path]}"
    return f"'{'/'.join(parts)}'"
