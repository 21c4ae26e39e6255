"""What is said once, at init, of leaves that stay at full rank."""

import re
from collections.abc import Callable, Collection, Sequence

from lowrank_optax._src.leaves.matrix import DenseLeaf, MatrixAxes, MatrixView
from lowrank_optax._src.leaves.paths import Path, words
from lowrank_optax._src.leaves.warn import warn

Leaf = MatrixView | DenseLeaf


def warn_of_waste(idle: Sequence[DenseLeaf]) -> None:
    """Name what the default rule leaves dense as the rank is too large to save."""
    if idle:
        warn(
            "Kept at full rank, as this rank saves nothing there: "
            f"{_named(_alike(idle), _why)}. Choose a smaller rank, or name them in "
            "`matrices` to have them at this one all the same.",
        )


def warn_of_unknown(fields: Sequence[str]) -> None:
    """Name the fields of a state that stay uncompressed as their role is unknown."""
    if fields:
        warn(
            f"Stored as they are, as nothing tells their role: the state fields "
            f"{', '.join(map(repr, fields))}. If they are moments, name all fields to "
            "compress, `fields={name: role}`: 'first' for those with signs, 'second' "
            "for those that are never negative.",
        )


def warn_of_nameless(paths: Sequence[Path]) -> None:
    """Say that the default rule goes by names, of which a list has none."""
    if len(paths) > 1 and not any(words("/".join(path)) for path in paths):
        warn(
            f"No name tells which of these {len(paths)} parameters are embeddings, "
            "heads, norms or attention, as they stand in a list: all of two axes are "
            "taken for matrices. Give `matrices` a list of MatrixAxes and None, one "
            "for each; `default_matrices` says how to make it of Keras' variables.",
        )


def _why(leaf: Leaf) -> str:
    return f" ({leaf.why})" if isinstance(leaf, DenseLeaf) else ""


def warn_of_stacks(unknown: Sequence[Leaf], others: Sequence[Leaf]) -> None:
    """Name what is left dense as nothing tells its rows and columns, and a remedy."""
    alike = _alike(unknown, others)
    if not alike:
        return
    widths = {leaf.shape[-3] for leaf in unknown if _splits_heads(leaf.shape)}
    likely = {
        f"^{pattern}$": _likely_axes(own[0], widths) for pattern, own in alike.items()
    }
    rules = ", ".join(
        f"{pattern!r}: {axes and f'lro.{axes}'}" for pattern, axes in likely.items()
    )
    warn(
        "Kept at full rank, as they have three axes or more and nothing tells which "
        f"are rows and columns: {_named(alike)}. If this is how they lie, pass "
        f"matrices=lro.matrix_rules({{{rules}}}); None leaves a leaf as it is.",
    )


def _alike(
    leaves: Sequence[Leaf], others: Sequence[Leaf] = ()
) -> dict[str, list[Leaf]]:
    """Leaves by a regular expression for their paths, one for those of all layers.

    But by a path of its own where the expression is one of other leaves too.
    """
    found: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        pattern = re.sub(r"[0-9]+", lambda _: "[0-9]+", re.escape(leaf.path))
        found.setdefault(pattern, []).append(leaf)
    result: dict[str, list[Leaf]] = {}
    for pattern, own in found.items():
        taken = any(re.fullmatch(pattern, leaf.path) for leaf in others)
        if taken or len({len(leaf.shape) for leaf in own}) > 1:
            result |= {re.escape(leaf.path): [leaf] for leaf in own}
        else:
            result[pattern] = own
    return result


def _named(
    alike: dict[str, list[Leaf]], what: Callable[[Leaf], str] = lambda leaf: ""
) -> str:
    return ", ".join(
        f"'{leaf.path}' {leaf.shape}{what(leaf)}"
        + (f" and {len(more)} like it" if more else "")
        for leaf, *more in alike.values()
    )


def _splits_heads(shape: tuple[int, ...]) -> bool:
    """Whether the last three axes are a width, and heads that add up to it."""
    return shape[-3] == shape[-2] * shape[-1]


def _likely_axes(leaf: Leaf, widths: Collection[int]) -> MatrixAxes | None:
    """How a leaf of three axes and more most often lies, where its name says little.

    Args:
      leaf: what nothing is known of.
      widths: of the model, where other such leaves have split heads.
    """
    ndim, shape = len(leaf.shape), leaf.shape
    if min(shape[-2:]) == 1:  # of a depthwise convolution
        return None
    convolution = any(word.startswith("conv") for word in words(leaf.path))
    if ndim > 3 and shape[-1] == shape[-2] < min(shape[:2]):  # of PyTorch and Equinox
        return MatrixAxes(0, tuple(range(1, ndim)))
    if convolution or (ndim > 3 and shape[0] == shape[1] < min(shape[2:])):
        return MatrixAxes(tuple(range(ndim - 1)), ndim - 1)
    first, middle, last = range(ndim - 3, ndim)
    if _splits_heads(shape):
        return MatrixAxes(first, (middle, last))
    # A stack of four layers may have such a shape, too.
    if shape[first] * shape[middle] == shape[last] and shape[last] in widths:
        return MatrixAxes((first, middle), last)
    # A stack stands in front or, as MaxText has it, behind the rows.
    rows = max(range(ndim - 1), key=lambda a: (shape[a], a))
    return MatrixAxes() if rows == ndim - 2 else MatrixAxes(rows, ndim - 1)
