"""Which leaves are matrices: the default rule, and what a user says instead."""

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lowrank_optax._src.leaves.box import value_of
from lowrank_optax._src.leaves.context import limits, note_views, record_views
from lowrank_optax._src.leaves.matrix import (
    SIDES,
    DenseLeaf,
    Matrices,
    MatrixAxes,
    MatrixView,
    Side,
    view_by,
)
from lowrank_optax._src.leaves.paths import flatten, words
from lowrank_optax._src.leaves.specs import choices, placeholders


def view_leaves(
    tree: Any,
    matrices: Matrices = None,
    side: Side | Callable[[str], Side] = "short",
    creating: bool = False,
) -> list[MatrixView | DenseLeaf]:
    """One view for each leaf of a tree of parameters or gradients, in their order.

    Args:
      tree: parameters at init, gradients later: only paths, shapes, dtypes are read.
      matrices: None for the default rule; one `MatrixAxes` for each leaf that is none
        of its biases, norms, embeddings, heads or attention kernels; a callable ``tree
        -> specs``, such as `matrix_rules`; or a tree of ``MatrixAxes | None``, matched
        by path. The default rule chooses for what it does not name.
      side: which side the basis spans: "short", "short_left" (the same with square
        matrices by their rows), "long", "left" (rows) or "right"; or a function from
        a leaf's path to these.
      creating: whether state is about to be created beside the leaves (at init).

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
    for parts, leaf in zip(paths, leaves, strict=True):
        x, choice = value_of(leaf), chosen[parts]
        path, shape, dtype = "/".join(parts), tuple(np.shape(x)), x.dtype
        source = leaf if creating else None
        if choice.axes is None:
            result.append(DenseLeaf(path, shape, dtype, choice.why, source))
        else:
            own = side(path) if callable(side) else side
            view = view_by(path, shape, dtype, choice.axes, own, source)
            if creating:
                view = dataclasses.replace(view, limit=dict(limits()).get(path))
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
        unknown = {parts for parts, choice in chosen.items() if choice.unknown}
        _warn_of_stacks([v for p, v in zip(paths, result, strict=True) if p in unknown])
        note_views(result)
    return result


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
      matrices: as in `view_leaves`, with columns for blocks; each number of a leaf that
        it does not name is a block. With None, of every leaf of two axes or more, a
        block is an index of the longer of its last two axes (of the last if they are
        equal).
    """
    if matrices is not None:
        seen = view_leaves(tree, matrices, "left", creating)
    else:
        seen = view_dense(tree, creating)
    result = []
    for view in seen:
        whole = (view.path, view.shape, view.dtype)
        if isinstance(view, DenseLeaf):
            if matrices is None and len(view.shape) > 1:
                view = view_by(*whole, MatrixAxes(), "short_left", view.source)
            else:
                axes = tuple(range(len(view.shape)))
                view = MatrixView(*whole, (), axes, (), view.source)
        result.append(view)
    return result


def _warn_of_stacks(unknown: list[MatrixView | DenseLeaf]) -> None:
    """Name what is left dense as nothing tells its rows and columns, and a remedy."""
    alike: dict[str, list[MatrixView | DenseLeaf]] = {}
    for v in unknown:  # those of a list of layers by one rule
        pattern = re.sub(r"[0-9]+", lambda _: "[0-9]+", re.escape(v.path))
        alike.setdefault(pattern, []).append(v)
    if not alike:
        return
    named = [
        f"'{first.path}' {first.shape}" + (f" and {len(more)} like it" if more else "")
        for first, *more in alike.values()
    ]
    likely = {f"^{pattern}$": _likely_axes(own[0]) for pattern, own in alike.items()}
    rules = ", ".join(
        f"{pattern!r}: {axes and f'lro.{axes}'}" for pattern, axes in likely.items()
    )
    warnings.warn(
        "Kept at full rank, as they have three axes or more and nothing tells which "
        f"are rows and columns: {', '.join(named)}. If this is how they lie, pass "
        f"matrices=lro.matrix_rules({{{rules}}}); None leaves a leaf as it is.",
        stacklevel=3,
    )


def _likely_axes(leaf: MatrixView | DenseLeaf) -> MatrixAxes | None:
    """How a leaf of three axes and more most often lies, where its name says little."""
    ndim, shape = len(leaf.shape), leaf.shape
    if min(shape[-2:]) == 1:  # of a depthwise convolution
        return None
    convolution = any(word.startswith("conv") for word in words(leaf.path))
    if ndim > 3 and shape[-1] == shape[-2] < min(shape[:2]):  # of PyTorch and Equinox
        return MatrixAxes(0, tuple(range(1, ndim)))
    if convolution or (ndim > 3 and shape[0] == shape[1] < min(shape[2:])):
        return MatrixAxes(tuple(range(ndim - 1)), ndim - 1)
    # A stack stands in front or, as MaxText has it, behind the rows.
    rows = max(range(ndim - 1), key=lambda a: (shape[a], a))
    return MatrixAxes() if rows == ndim - 2 else MatrixAxes(rows, ndim - 1)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Initialise a transformation for its shapes only: record and warn of nothing."""
    with record_views(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
