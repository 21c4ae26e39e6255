"""How a leaf is seen as a matrix.

A `MatrixView` holds the static facts of one leaf: it turns the leaf into
``(*batch, m, n)`` with the basis side on the left, and back. Views are recomputed from
paths and shapes wherever they are needed, and never stored in a state.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax._src.leaves.box import value_of
from lowrank_optax._src.leaves.placing import put_beside
from lowrank_optax._src.linalg.products import Lying, wide

Side = Literal["short", "short_left", "long", "left", "right"]


SIDES = get_args(Side)

Dim = int | str | tuple[str, int]  # of an array beside a matrix, see `MatrixView.zeros`


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
    """Which axes of a leaf are its rows and columns; all others are batch axes.

    Args:
      rows: axis or axes of the rows, in order, merged into one.
      cols: axis or axes of the columns.

    >>> import lowrank_optax as lro
    >>> lro.MatrixAxes()  # a matrix, or a stack of them: (*batch, rows, cols)
    MatrixAxes(rows=-2, cols=-1)
    >>> lro.MatrixAxes(rows=0, cols=(1, 2))  # a query kernel (embed, heads, head_dim)
    MatrixAxes(rows=0, cols=(1, 2))
    """

    rows: int | tuple[int, ...] = -2
    cols: int | tuple[int, ...] = -1


Matrices = MatrixAxes | Callable[[Any], Any] | Any | None


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """One leaf seen as ``(*batch, m, n)``, its basis side on the left.

    Attributes:
      path: the leaf's path, parts joined by ``/``.
      shape, dtype: of the leaf.
      left, right: the leaf's axes that make up m and n.
      batch: the remaining axes, in their order.
      source: the leaf itself where state is to be created beside it, else None.
      limit: the largest rank of that state, None for any.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    left: tuple[int, ...]
    right: tuple[int, ...]
    batch: tuple[int, ...]
    source: Any = dataclasses.field(default=None, compare=False, repr=False)
    limit: int | None = None

    @property
    def m(self) -> int:
        return math.prod(self.shape[a] for a in self.left)

    @property
    def n(self) -> int:
        return math.prod(self.shape[a] for a in self.right)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def turned(self) -> bool:
        """Whether the matrix is the transpose of how the leaf lies in memory."""
        return bool(self.left and self.right) and self.left[0] > self.right[0]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[a] for a in self.batch)

    @property
    def compute_dtype(self) -> np.dtype:
        """What arithmetic and state are in: float32, or the leaf's if wider."""
        return wide(self.dtype)

    def rank(self, rank: int) -> int:
        """The effective rank, ``min(rank, m, n)``, and at most the limit."""
        return min(rank, self.m, self.n, *([] if self.limit is None else [self.limit]))

    def matrix(self, leaf: jax.Array, dtype: Any = None) -> jax.Array:
        """The leaf as ``(*batch, m, n)``, in the compute dtype if no other is given."""
        x = jnp.transpose(leaf, (*self.batch, *self.left, *self.right))
        x = x.reshape(*self.batch_shape, self.m, self.n)
        return x.astype(dtype or self.compute_dtype)

    def leaf(self, matrix: jax.Array, dtype: Any = None) -> jax.Array:
        """The inverse of `matrix`, in the leaf's dtype unless another is given."""
        order = (*self.batch, *self.left, *self.right)
        x = matrix.reshape(tuple(self.shape[a] for a in order))
        return jnp.transpose(x, tuple(np.argsort(order))).astype(dtype or self.dtype)

    def lying(self, leaf: jax.Array) -> Lying:
        """The matrix in the order of the leaf's memory."""
        x = self.matrix(leaf)
        return Lying(x.mT if self.turned else x, self.turned, self.dtype)

    def zeros(self, *dims: Dim, dtype: Any = None) -> Any:
        """Zeros of shape ``(*batch, *dims)`` that live where the leaf lives.

        A dimension is a number, or ``"m"`` or ``"n"`` for that of the matrix, along
        which the array then is sharded as the leaf is, or ``("m", number)`` for a
        number of blocks of it. The only constructor of leaf-sized state: dtype, batch
        axes, NNX box and sharding are set here and nowhere else.
        """
        return self.full(jnp.zeros, *dims, dtype=dtype)

    def full(self, fill: Callable[..., Any], *dims: Dim, dtype: Any = None) -> Any:
        """`zeros` for another initial value: ``fill(shape, dtype)``."""
        known = {"m": (self.m, self.left), "n": (self.n, self.right)}
        sizes, along = [], []
        for dim in dims:
            side, size = dim if isinstance(dim, tuple) else (dim, None)
            whole, axes = known[side] if isinstance(side, str) else (side, ())
            sizes.append(whole if size is None else size)
            along.append(axes)
        value = fill((*self.batch_shape, *sizes), dtype or self.compute_dtype)
        return put_beside(self.source, value, self.batch, along)


@dataclasses.dataclass(frozen=True)
class DenseLeaf:
    """A leaf that is not seen as a matrix, and why."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    why: str
    source: Any = dataclasses.field(default=None, compare=False, repr=False)


def view_by(path, shape, dtype, axes: MatrixAxes, side: Side, source) -> MatrixView:
    ndim = len(shape)
    given = [(a,) if isinstance(a, int) else tuple(a) for a in (axes.rows, axes.cols)]
    rows, cols = ([a + ndim if a < 0 else a for a in group] for group in given)
    both = [*rows, *cols]
    in_range = all(0 <= a < ndim for a in both)
    if not rows or not cols or not in_range or len(set(both)) != len(both):
        raise ValueError(
            f"Cannot view parameter '{path}' of shape {shape} as a matrix by {axes}: "
            f"rows and columns must be distinct axes among its {ndim}."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"Cannot view parameter '{path}' of shape {shape} as a matrix: its dtype "
            f"{dtype} is not floating. Give None for it in `matrices`."
        )
    m, n = (math.prod(shape[a] for a in group) for group in (rows, cols))
    right = {
        "short": m >= n,  # a square matrix goes to the right, as GaLore has it
        "short_left": m > n,  # to the left, as LDAdam has it
        "long": m < n,
        "left": False,
        "right": True,
    }[side]
    left, other = (cols, rows) if right else (rows, cols)
    batch = tuple(a for a in range(ndim) if a not in both)
    return MatrixView(path, shape, dtype, tuple(left), tuple(other), batch, source)


def last_axes_view(path: str, leaf: Any) -> MatrixView:
    """Any array seen by its own last two axes; a vector as one row."""
    x = value_of(leaf)
    axes = tuple(range(x.ndim))
    return MatrixView(path, x.shape, x.dtype, axes[-2:-1], axes[-1:], axes[:-2], leaf)


def zeros_like(leaf: Any) -> Any:
    """Zeros of a leaf's own shape, in the compute dtype, that live where it lives."""
    view = last_axes_view("", leaf)
    own_axes = ("m", "n")[max(0, 2 - len(view.shape)) :]
    return view.zeros(*own_axes)


def nameless(view: MatrixView) -> MatrixView:
    """The view without its path: leaves of equal shape share one compiled body."""
    return dataclasses.replace(view, path="", source=None)
