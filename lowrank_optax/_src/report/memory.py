"""What an optimizer's state takes, leaf by leaf and in total; nothing is allocated."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from lowrank_optax._src.leaves.box import is_box, value_of
from lowrank_optax._src.leaves.context import record_views
from lowrank_optax._src.leaves.fields import boxed_state
from lowrank_optax._src.leaves.matrix import DenseLeaf, MatrixView
from lowrank_optax._src.leaves.paths import flatten, labels
from lowrank_optax._src.report.sharding import state_shardings


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * x.dtype.itemsize


def state_bytes(tx: Any, params: Any) -> int:
    """Exact size of ``tx.init(params)`` in bytes, from shapes alone.

    Args:
      tx: any Optax transformation.
      params: arrays or abstract ones.

    Returns:
      The sum over all arrays of the state, counters included.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> params = {"w": jnp.ones((64, 32))}
    >>> tx = lro.mlorc_scale_by_adam(rank=4)
    >>> lro.state_bytes(tx, params)  # 2 r (m + n) floats and two counters
    3080
    """
    return sum(_bytes(x) for x in jax.tree.leaves(boxed_state(tx, params)))


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter in `describe`'s table, which says what the columns are."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    view: tuple[int, ...] | None
    side: str
    rank: int | None
    state_bytes: int
    why: str


class Table(tuple):
    """Rows with a readable ``str``; `describe` and `memory_report` return it."""

    def __str__(self):
        if not self:
            return "(no parameters)"
        names = [f.name for f in dataclasses.fields(self[0])]
        cells = [names] + [
            ["" if (x := getattr(row, n)) is None else str(x) for n in names]
            for row in self
        ]
        widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in cells
        ]
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__


def describe(tx: Any, params: Any) -> Table:
    """What a transformation makes of each parameter, as a table.

    Print it before a long run: it shows which leaves are seen as matrices, at which
    rank, what each costs, and why the others are not. The columns, which are attributes
    of a row:

    - ``path``, ``shape``, ``dtype``: of the parameter.
    - ``view``: ``(*batch, m, n)``, the side of the basis first, or None if it is dense.
    - ``side``: which side of the leaf that is: "left" (rows), "right" (columns), or "".
    - ``rank``: of the state kept for it, or None.
    - ``state_bytes``: of all state that belongs to it.
    - ``why``: why it is dense, or "".

    Args:
      tx: any Optax transformation, chains and wrappers included.
      params: arrays or abstract ones.

    Returns:
      A tuple with a row for each parameter, that prints as a table.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> params = {"w": jnp.ones((64, 32)), "b": jnp.ones(32)}
    >>> print(lro.describe(lro.galore_adamw(1e-2, rank=4), params))
    path  shape     dtype    view      side   rank  state_bytes  why
    b     (32,)     float32                         256          it is a vector
    w     (64, 32)  float32  (32, 64)  right  4     2560
    """
    with record_views() as seen:
        state = boxed_state(tx, params)
    boxes = [x for x in jax.tree.leaves(state, is_leaf=is_box) if is_box(x)]
    owned = [(v, v.source.path) for v in seen if is_box(v.source)]
    views = {path: v for v, path in owned if isinstance(v, MatrixView)}
    why = {path: v.why for v, path in owned if isinstance(v, DenseLeaf)}
    paths, leaves, _ = flatten(params)
    rows = []
    for parts, path, leaf in zip(paths, labels(paths), leaves, strict=True):
        x = value_of(leaf)
        own = [box.value for box in boxes if box.path == parts]
        view = views.get(parts)
        rows.append(
            Row(
                path=path,
                shape=tuple(x.shape),
                dtype=str(x.dtype),
                view=(*view.batch_shape, view.m, view.n) if view else None,
                side=_side(view),
                rank=_rank(view, own),
                state_bytes=sum(_bytes(s) for s in own),
                why="" if view else why.get(parts, "no low-rank method sees it"),
            )
        )
    return Table(rows)


def _side(view: MatrixView | None) -> str:
    if view is None:
        return ""
    return "left" if view.left < view.right else "right"


def _rank(view: MatrixView | None, own: list[Any]) -> int | None:
    """The rank of a leaf's state: the side that its (m, r) and (r, n) arrays share."""
    if view is None:
        return None
    batch = view.batch_shape
    # An array of bytes may hold several numbers in each.
    bases = [x for x in own if jnp.issubdtype(x.dtype, jnp.floating)]
    columns = [x.shape[-1] for x in bases if x.shape[:-1] == (*batch, view.m)]
    # Where no basis is stored, the moments alone tell it.
    matrices = [x for x in own if x.ndim == len(batch) + 2]
    rows = [x.shape[-2] for x in matrices if x.shape[-1] == view.n]
    # One row may be a number for each column, as of Adam-mini's squares.
    rows = [r for r in rows if r > 1] or rows
    return min(columns or rows, default=None)


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """One line of `memory_report`: bytes in total, and on the fullest device."""

    what: str
    bytes: int
    bytes_per_device: int


def memory_report(tx: Any, params: Any, mesh: jax.sharding.Mesh | None = None) -> Table:
    """Bytes of weights, gradients and optimizer state.

    Activations and the update's temporaries are not in it: for these, compile the step
    and ask ``memory_analysis()``.

    Args:
      tx: any Optax transformation.
      params: arrays or abstract ones; their shardings count.
      mesh: where the state is sharded as `state_shardings` says; None for one device.

    Returns:
      A tuple of three rows, that prints as a table. A row's attributes are ``what``,
      ``bytes`` in all, and ``bytes_per_device``, those on the fullest device.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> params = {"w": jnp.ones((64, 32))}
    >>> print(lro.memory_report(lro.mlorc_adamw(1e-3, rank=4), params))
    what             bytes  bytes_per_device
    weights          8192   8192
    gradients        8192   8192
    optimizer state  3080   3080
    """
    state = boxed_state(tx, params)
    leaves = [value_of(x) for x in flatten(params)[1]]
    weights = sum(_bytes(x) for x in leaves)
    local = sum(_local_bytes(x, getattr(x, "sharding", None)) for x in leaves)
    total = mine = sum(map(_bytes, jax.tree.leaves(state)))
    if mesh is not None:
        shardings = state_shardings(tx, params, mesh)
        parts = jax.tree.map(
            lambda s, own: sum(_local_bytes(x, s) for x in jax.tree.leaves(own)),
            shardings,
            state,
        )
        mine = sum(jax.tree.leaves(parts))
    return Table(
        [
            MemoryRow("weights", weights, local),
            MemoryRow("gradients", weights, local),
            MemoryRow("optimizer state", total, mine),
        ]
    )


def _local_bytes(x: Any, sharding: Any) -> int:
    if not isinstance(sharding, NamedSharding):
        return _bytes(x)
    return math.prod(sharding.shard_shape(tuple(x.shape))) * x.dtype.itemsize
