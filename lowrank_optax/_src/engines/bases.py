"""The bases that stand in a state, and all of its entries."""

from collections.abc import Iterator
from typing import Any

import jax
from jaxtyping import Array

from lowrank_optax._src.engines.project_state import ProjectState
from lowrank_optax._src.leaves.box import is_variable, value_of
from lowrank_optax._src.leaves.paths import Path, path_parts
from lowrank_optax._src.parts.codec import BlockInt8Code, CastCode, PackedInt4Code
from lowrank_optax._src.parts.factors import LowRankCode

CODES = (LowRankCode, CastCode, BlockInt8Code, PackedInt4Code)


def bases(opt_state: Any) -> Iterator[tuple[Path, Array, int]]:
    """Path, basis and n of each matrix; n of a moment that stands at the same path.

    Only of bases that are stored as such: there is nothing to see in what is drawn
    again at every step, or stored as a code.
    """

    def is_engine(x):
        return isinstance(x, ProjectState)

    for state in jax.tree.leaves(opt_state, is_leaf=is_engine):
        if not is_engine(state):
            continue
        moments = entries(state.inner_state)
        for key, basis in entries(state.basis):
            if getattr(basis, "ndim", 0) < 2:
                continue
            widths = [
                _shape(x)[-1]
                for k, x in moments
                if k[len(k) - len(key) :] == key
                and _shape(x)[-2:-1] == (basis.shape[-1],)
            ]
            yield path_parts(key), basis, max(widths, default=0)


def _shape(x: Any) -> tuple[int, ...]:
    """Of an array, or of what stands for one; () if that is not known."""
    if isinstance(x, BlockInt8Code):
        x = x.index
    elif isinstance(x, LowRankCode):
        return (*x.left.shape[:-1], x.right.shape[-1])
    return getattr(x, "shape", ())


def entries(tree: Any) -> list[tuple[Any, Any]]:
    """Key and array, out of its box, of each entry; codes whole."""

    def whole(x):
        return isinstance(x, CODES) or is_variable(x)

    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=whole)
    return [(key, value_of(x)) for key, x in flat]
