"""Boxes of arrays: the only code that knows Flax's.

A `ParamBox` is a boxed abstract parameter, by which optimizer state is traced back to
its source.
"""

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ParamBox:
    """An array with the path (or number) of the parameter it belongs to and a place.

    Speaks the part of the NNX variable's interface that the library knows, so whatever
    state a transformation makes beside a parameter comes out in a box of its path.
    """

    value: Any
    path: Hashable = dataclasses.field(metadata={"static": True})
    out_sharding: tuple[Any, ...] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    mesh: Any = dataclasses.field(default=None, metadata={"static": True})
    memory_kind: str | None = dataclasses.field(default=None, metadata={"static": True})

    def get_value(self):
        return self.value

    def get_metadata(self):
        return {"out_sharding": self.out_sharding}

    def replace(self, value, **changes):
        return dataclasses.replace(self, value=value, **changes)


def is_box(x: Any) -> bool:
    return isinstance(x, ParamBox) and is_variable(x)


def unbox(tree: Any) -> Any:
    """The tree of what is in the boxes."""
    return jax.tree.map(value_of, tree, is_leaf=is_boxed)


def empty(tree: Any) -> Any:
    """The tree without the boxes whose array a mask has left out."""
    return jax.tree.map(
        lambda x: x if is_variable(x) else value_of(x), tree, is_leaf=is_boxed
    )


def apart(tree: Any) -> Any:
    """The tree with a box around each array, also where one was around several.

    So an optimizer leaves them that keeps a list of arrays for a parameter.
    """

    def each(x):
        if not is_variable(x):
            return x
        return jax.tree.map(lambda value: rebox(x, value), value_of(x))

    return jax.tree.map(each, tree, is_leaf=is_variable)


def is_boxed(x: Any) -> bool:
    """Whether ``x`` is a box of Flax: a variable of NNX, or Linen's `nn.Partitioned`.

    Told by what they have, so that Flax need not be there.
    """
    return is_linen(x) or hasattr(x, "get_value") and hasattr(x, "get_metadata")


def is_linen(x: Any) -> bool:
    return hasattr(x, "replace_boxed") and hasattr(x, "names")


def is_variable(x: Any) -> bool:
    """Whether ``x`` is a boxed array.

    A mask by a function over a tree of boxes leaves the array out and keeps the box,
    which has no more leaves than the placeholder in it.
    """
    return is_boxed(x) and bool(jax.tree.leaves(value_of(x)))


def rebox(box: Any, value: Any) -> Any:
    """The box with another value in it."""
    return box.replace_boxed(value) if is_linen(box) else box.replace(value)


def annotate(box: Any, value: Any, spec: Any) -> Any:
    """The box with another value in it, and another `annotation`."""
    if is_linen(box):
        return box.replace(value=value, names=spec or ())
    return box.replace(value, out_sharding=spec)


def annotation(box: Any) -> Any:
    """What a box says of its place: a spec of names, a sharding with its mesh, or None.

    Names are of mesh axes, or stand for these.
    """
    return box.names if is_linen(box) else box.get_metadata().get("out_sharding")


def value_of(leaf: Any) -> Any:
    if not is_boxed(leaf):
        return leaf
    return leaf.value if is_linen(leaf) else leaf.get_value()
