"""Which leaves are matrices: the default rule, and what a user says instead."""

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

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
from lowrank_optax._src.leaves.paths import flatten, path_parts, words

# A word of the path that starts like this, or is one of these, names a table that is
# looked up or a head that is read out, not a weight whose gradient is low-rank.
_DENSE_PREFIX = "embed"


_DENSE_WORDS = frozenset("wte wpe shared logits score classifier pooler".split())


_DENSE_PARTS = frozenset("lm_head head heads predictions".split())


def named_dense(parts: tuple[str, ...]) -> str | None:
    """The reason why the default rule keeps a leaf of this path at full rank."""
    pieces = [p for part in parts for p in re.split(r"[./]", part) if p]
    for i, piece in enumerate(pieces):
        for word in words(piece):
            if word.startswith(_DENSE_PREFIX) or word in _DENSE_WORDS:
                return f"'{piece}' names an embedding or a head"
        # An `output` that holds further modules is a block's output, not the head.
        last = i >= len(pieces) - 2
        if piece.lower() in _DENSE_PARTS or (piece.lower() == "output" and last):
            return f"'{piece}' names a head"
    return None


def view_leaves(
    tree: Any,
    matrices: Matrices = None,
    side: Side | Callable[[str], Side] = "short",
    creating: bool = False,
) -> list[MatrixView | DenseLeaf]:
    """One view for each leaf of a tree of parameters or gradients, in their order.

    Args:
      tree: parameters at init, gradients later: only paths, shapes, dtypes are read.
      matrices: None for the default rule; one `MatrixAxes` for every float leaf of two
        axes or more that the rule does not call dense by its name; a callable
        ``tree -> specs``; or a tree of ``MatrixAxes | None``, matched by path.
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
    matrices = matrices(tree) if callable(matrices) else matrices
    paths, leaves, _ = flatten(tree)
    by_rule = matrices is None or isinstance(matrices, MatrixAxes)
    specs = {} if by_rule else _specs_by_path(matrices, tree, paths)
    result: list[MatrixView | DenseLeaf] = []
    for parts, leaf in zip(paths, leaves, strict=True):
        x = value_of(leaf)
        path, shape, dtype = "/".join(parts), tuple(np.shape(x)), x.dtype
        axes, why = _by_rule(parts, x, matrices) if by_rule else specs[parts]
        source = leaf if creating else None
        if axes is None:
            result.append(DenseLeaf(path, shape, dtype, why, source))
        else:
            own = side(path) if callable(side) else side
            view = view_by(path, shape, dtype, axes, own, source)
            if creating:
                view = dataclasses.replace(view, limit=dict(limits()).get(path))
            result.append(view)
    found = any(isinstance(view, MatrixView) for view in result)
    if matrices is not None and result and not found and not _placeholders(tree):
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
        _warn_of_stacks(result, matrices)
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


def _by_rule(parts: tuple[str, ...], x: Any, matrices: Matrices):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return None, f"its dtype {x.dtype} is not floating"
    if x.ndim < 2:
        return None, f"it has {x.ndim} axes"
    if (why := named_dense(parts)) is not None:
        return None, why
    if isinstance(matrices, MatrixAxes):
        return matrices, ""
    if x.ndim > 2:
        return (
            None,
            f"it has {x.ndim} axes and no `matrices` names its rows and columns",
        )
    return MatrixAxes(), ""


def _specs_by_path(matrices: Any, tree: Any, paths: list[tuple[str, ...]]):
    """``{path: (axes | None, why)}`` of a tree of specs, matched by path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(
        matrices, is_leaf=lambda x: x is None or isinstance(x, MatrixAxes)
    )
    specs = {path_parts(k): axes for k, axes in flat if axes is not None}
    for path, axes in specs.items():
        if not isinstance(axes, MatrixAxes):
            raise TypeError(
                f"`matrices` holds {axes!r} at '{'/'.join(path)}'; its leaves must be "
                "MatrixAxes or None."
            )
    if paths and (unknown := set(specs) - set(paths) - _placeholders(tree)):
        raise ValueError(
            f"`matrices` names {sorted('/'.join(p) for p in unknown)}, which the tree "
            f"does not have. It has {['/'.join(p) for p in paths[:10]]}."
        )
    return {p: (specs.get(p), "`matrices` does not name it") for p in paths}


def _placeholders(tree: Any) -> set[tuple[str, ...]]:
    """Paths at which another transformation has left out the parameter."""

    def left_out(x):
        return x is None or isinstance(x, optax.MaskedNode)

    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=left_out)
    return {path_parts(k) for k, x in flat if left_out(x)}


def _warn_of_stacks(result: list[MatrixView | DenseLeaf], matrices: Matrices) -> None:
    stacks = [
        v for v in result if isinstance(v, DenseLeaf) and "no `matrices`" in v.why
    ]
    if stacks and matrices is None:
        warnings.warn(
            "Kept at full rank, as they have three axes or more and no `matrices` "
            "names their rows and columns: "
            + ", ".join(f"'{v.path}' {v.shape}" for v in stacks)
            + ". For stacked (*batch, rows, cols) weights pass matrices=MatrixAxes().",
            stacklevel=2,
        )


def default_matrices(params: Any) -> Any:
    """The default rule as a tree: ``MatrixAxes()`` where a leaf is a matrix, else None.

    Edit the result and pass it as ``matrices=`` to change which leaves are projected.
    Matrices are the float leaves of two axes, except embeddings and heads: paths with a
    word that starts with "embed" or is wte, wpe, shared, logits, score, classifier or
    pooler, or with a part lm_head, head, heads or predictions, or that end in output.

    Args:
      params: arrays or abstract ones.

    Returns:
      A tree like ``params``.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> params = {"embed": jnp.ones((9, 4)), "w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    >>> lro.default_matrices(params)
    {'b': None, 'embed': None, 'w': MatrixAxes(rows=-2, cols=-1)}
    """
    paths, leaves, treedef = flatten(params)
    rule = (
        _by_rule(p, value_of(x), None)[0] for p, x in zip(paths, leaves, strict=True)
    )
    return treedef.unflatten(list(rule))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Initialise a transformation for its shapes only: record and warn of nothing."""
    with record_views(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
