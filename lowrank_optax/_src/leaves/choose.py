"""Which leaves are matrices: the default rule, and what a user says instead."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax._src.leaves.box import is_box, value_of
from lowrank_optax._src.leaves.context import limits, note_views
from lowrank_optax._src.leaves.default import Choice
from lowrank_optax._src.leaves.matrix import (
    SIDES,
    DenseLeaf,
    Matrices,
    MatrixAxes,
    MatrixView,
    Side,
    view_by,
)
from lowrank_optax._src.leaves.paths import flatten, placeholders
from lowrank_optax._src.leaves.saving import StateSizes, waste
from lowrank_optax._src.leaves.specs import choices
from lowrank_optax._src.leaves.told import (
    warn_of_nameless,
    warn_of_stacks,
    warn_of_waste,
)


def view_leaves(
    tree: Any,
    matrices: Matrices = None,
    side: Side | Callable[[str], Side] = "short",
    creating: bool = False,
    state_sizes: StateSizes | None = None,
) -> list[MatrixView | DenseLeaf]:
    """One view for each leaf of a tree of parameters or gradients, in their order.

    Args:
      tree: parameters at init, gradients later: only paths, shapes, dtypes are read.
      matrices: None for the default rule; one `MatrixAxes` for each leaf that is none
        of its biases, norms, embeddings or heads (``MatrixAxes()`` leaves attention
        kernels their own, too); a callable ``tree -> specs``, such as `matrix_rules`;
        or a tree of ``MatrixAxes | None``, matched by path. The default rule chooses
        for what it does not name.
      side: which side the basis spans: "short", "short_left" (the same with square
        matrices by their rows), "long", "left" (rows) or "right"; or a function from
        a leaf's path to these.
      creating: whether state is about to be created beside the leaves (at init).
      state_sizes: see `StateSizes`. A leaf that a low rank saves nothing of stays at
        full rank, unless `matrices` names it.

    Raises:
      ValueError: for an unknown side, a spec that matches nothing or does not fit.
    """
    if not callable(side) and side not in SIDES:
        raise ValueError(
            f"Unknown side {side!r}: it must be one of {', '.join(SIDES)}."
        )
    paths, leaves, _ = flatten(tree)
    chosen = choices(matrices, tree)
    result: list[MatrixView | DenseLeaf] = []
    idle: list[DenseLeaf] = []
    for parts, leaf in zip(paths, leaves, strict=True):
        x, choice = value_of(leaf), chosen[parts]
        path, shape, dtype = "/".join(parts), tuple(np.shape(x)), x.dtype
        if 0 in shape:
            choice = Choice(None, "it has no numbers")
        source = leaf if creating else None
        if choice.axes is None:
            result.append(DenseLeaf(path, shape, dtype, choice.why, source))
        else:
            own = side(path) if callable(side) else side
            view = view_by(path, shape, dtype, choice.axes, own, source)
            if state_sizes and not choice.asked and (why := waste(view, state_sizes)):
                view = DenseLeaf(path, shape, dtype, why, source)
                idle.append(view)
            elif creating:
                view = dataclasses.replace(view, limit=dict(limits()).get(parts))
            result.append(view)
    found = any(isinstance(view, MatrixView) for view in result)
    if matrices is not None and result and not found and not placeholders(tree):
        raise ValueError(
            "`matrices` matches no parameter. The tree has "
            + ", ".join(
                f"'{v.path}' {v.shape}: {v.why}"
                for v in result[:5]
                if isinstance(v, DenseLeaf)
            )
            + ". Name at least one leaf of two axes or more, or leave `matrices` out."
        )
    if creating:
        by_path = dict(zip(paths, result, strict=True))
        unknown = [v for path, v in by_path.items() if chosen[path].unknown]
        warn_of_stacks(
            unknown, [v for path, v in by_path.items() if not chosen[path].unknown]
        )
        if any(c.axes is not None and not c.asked for c in chosen.values()):
            warn_of_nameless(paths)
        warn_of_waste(idle)
        # Leaves may be traced, and must not outlive that.
        note_views([dataclasses.replace(v, source=_box(v.source)) for v in result])
    return result


def _box(source: Any) -> Any:
    """Whose leaf it is, if that is known, by its shape alone."""
    if not is_box(source):
        return None
    return source.replace(jax.ShapeDtypeStruct(source.value.shape, source.value.dtype))


def view_dense(tree: Any, creating: bool = False) -> list[DenseLeaf]:
    """`view_leaves` for what treats every number alike and asks for no matrix."""
    paths, leaves, _ = flatten(tree)
    result = []
    for parts, leaf in zip(paths, leaves, strict=True):
        x, source = value_of(leaf), leaf if creating else None
        why = "it is treated element by element"
        leaf = DenseLeaf("/".join(parts), tuple(np.shape(x)), x.dtype, why, source)
        result.append(leaf)
    return result


def view_blocks(
    tree: Any, matrices: Matrices = None, creating: bool = False
) -> list[MatrixView]:
    """Every leaf as a matrix whose columns are blocks of numbers that share something.

    Args:
      tree, creating: as in `view_leaves`.
      matrices: as in `view_leaves`, with columns for blocks; each number of a leaf for
        which it says None is a block. Of what it does not name, with two axes or more,
        a block is an index of the longer of the last two (of the last if they are
        equal).
    """
    if matrices is not None:
        seen = view_leaves(tree, matrices, "left", creating)
        asked = [choice.asked for choice in choices(matrices, tree).values()]
    else:
        seen = view_dense(tree, creating)
        asked = [False] * len(seen)
    result = []
    for view, named in zip(seen, asked, strict=True):
        whole = (view.path, view.shape, view.dtype)
        if isinstance(view, DenseLeaf) or not named:
            countable = not jnp.issubdtype(view.dtype, jnp.inexact)
            if not named and len(view.shape) > 1 and not countable:
                view = view_by(*whole, MatrixAxes(), "short_left", view.source)
            else:
                axes = tuple(range(len(view.shape)))
                view = MatrixView(*whole, (), axes, (), view.source)
        result.append(view)
    return result
