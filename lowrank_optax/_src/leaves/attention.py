"""Rows and columns of attention kernels whose heads have an axis of their own.

The layouts, with E for the width of the model, N heads and H for the width of a head:

- queries, keys and values of Flax, Keras, MaxText and Tunix: (E, N, H);
- those of Gemma, whose modules end in `einsum`, and some of Tunix: (N, E, H);
- outputs of all: (N, H, E).

Stacks of layers, and of keys with values, stand in front; MaxText has them behind the
first axis.
"""

from collections.abc import Mapping

from lowrank_optax._src.leaves.matrix import MatrixAxes
from lowrank_optax._src.leaves.names import pieces
from lowrank_optax._src.leaves.paths import Path, words

Shape = tuple[int, ...]

QUERIES = frozenset("q query wq qkv".split())

INPUTS = QUERIES | frozenset("k key wk v value wv kv wkv".split())

OUTPUTS = frozenset("o out output wo vec".split())


def attention_axes(shapes: Mapping[Path, Shape]) -> dict[Path, MatrixAxes]:
    """Axes of the kernels of three axes and more that names and shapes tell.

    An output is told by the heads of the queries beside it: a stack of merged kernels,
    (layers, N H, E), has no such queries.
    """
    found: dict[Path, MatrixAxes] = {}
    queries: dict[Path, tuple[int, bool]] = {}
    for path, shape in shapes.items():
        module, name, leaf = _named(path, INPUTS)
        if "lora" in words(leaf):  # of a kernel's adapters, which have no heads
            continue
        if len(shape) > 2 and name and (axes := _input_axes(name, leaf, shape)):
            rows, heads, last = axes
            found[path] = MatrixAxes(rows, (heads, last))
            if not QUERIES.isdisjoint(words(name)):
                queries[module] = shape[heads], rows == 0 and len(shape) > 3
    for path, shape in shapes.items():
        module, name, _ = _named(path, OUTPUTS)
        if len(shape) > 2 and name and module in queries:
            heads, behind = queries[module]
            first = 0 if behind else len(shape) - 3
            if shape[first] == heads:
                rows = (first, len(shape) - 2)
                found[path] = MatrixAxes(rows, len(shape) - 1)
    return found


def _named(path: Path, names: frozenset[str]) -> tuple[Path, str, str]:
    """The module around, the last piece with one of the names, and what is below."""
    own = pieces(path)
    for i in range(len(own) - 1, max(len(own) - 3, -1), -1):
        if not names.isdisjoint(words(own[i])):
            return own[:i], own[i], "/".join(own[i + 1 :])
    return own, "", ""


def _input_axes(name: str, leaf: str, shape: Shape) -> Shape | None:
    """The axes of E, N and H, if these are what the axes are."""
    first, heads, last = (len(shape) - k for k in (3, 2, 1))
    rows = first
    turned = leaf == "w" and words(name)[-1] == "proj"
    if "einsum" in words(name) or (turned and shape[heads] >= 2 * shape[last]):
        rows, heads = heads, first
    elif len(shape) > 3 and shape[0] > shape[first]:
        rows = 0
    # A stack of merged kernels is (layers, E, N H): its first axis is the shorter.
    return (rows, heads, last) if shape[rows] > shape[heads] else None
