"""What the state of a matrix takes, beside what it would take at full rank."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from lowrank_optax._src.leaves.matrix import MatrixView

# How many numbers the state of a matrix has, and how many at full rank, for one of a
# stack. A rule of `leafwise` may have such a method.
StateSizes = Callable[[MatrixView], tuple[int, int]]


def projected(view: MatrixView, rank: int, stored: bool) -> tuple[int, int]:
    """Of Adam's two moments in a subspace, and of its basis if that is stored."""
    return view.rank(rank) * (stored * view.m + 2 * view.n), 2 * view.m * view.n


def coded(codecs: Iterable[Any]) -> StateSizes | None:
    """Of the moments whose codecs have a rank."""
    ranks = [codec.rank for codec in codecs if hasattr(codec, "rank")]
    if not ranks:
        return None
    return lambda v: (
        sum(v.rank(rank) for rank in ranks) * (v.m + v.n),
        len(ranks) * v.m * v.n,
    )


def waste(view: MatrixView, sizes: StateSizes) -> str:
    """Why a low rank saves nothing there; empty where it does."""
    own, full = sizes(view)
    if own < full:
        return ""
    each = math.prod(view.batch_shape) * view.compute_dtype.itemsize
    return f"its state would take {own * each} bytes, at full rank {full * each}"
