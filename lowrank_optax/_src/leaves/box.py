"""Boxes of arrays, and meshes: the only code that knows NNX variables and shardings.

A `ParamBox` is a boxed abstract parameter, by which optimizer state is traced back to
its source.
"""

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
from jax.sharding import NamedSharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ParamBox:
    """An array with the path (or number) of the parameter it belongs to and a spec.

    Speaks the part of the NNX variable's interface that the library knows, so whatever
    state a transformation makes beside a parameter comes out in a box of its path.
    """

    value: Any
    path: Hashable = dataclasses.field(metadata={"static": True})
    out_sharding: tuple[Any, ...] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

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


def with_auto_axes(run: Any, *args: Any) -> Any:
    """``run(*args)``, its two results sharded as the first two arguments came in."""
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, args[:2])
    if any(explicit_axes(s.mesh) for s in jax.tree.leaves(shardings)):
        run = jax.sharding.auto_axes(run, out_sharding=shardings)
    return run(*args)


def is_boxed(x: Any) -> bool:
    """Whether ``x`` is a box, as a Flax NNX variable is (no flax import)."""
    return hasattr(x, "get_value") and hasattr(x, "get_metadata")


def is_variable(x: Any) -> bool:
    """Whether ``x`` is a boxed array.

    A mask by a function over a tree of boxes leaves the array out and keeps the box,
    which has no more leaves than the placeholder in it.
    """
    return is_boxed(x) and bool(jax.tree.leaves(x.get_value()))


def leaf_spec(leaf: Any) -> tuple[tuple[Any, ...] | None, Any]:
    """A leaf's partition spec, one entry an axis, and its mesh; None where it has none.

    Known for an annotated variable, for a concrete array with a `NamedSharding`, and
    for a traced one on a mesh of explicit axes.
    """
    if leaf is None:
        return None, None
    if is_variable(leaf):
        spec = leaf.get_metadata().get("out_sharding")
        if spec is None:
            return None, None
        ndim = leaf.get_value().ndim
        # nnx.vmap stacks layers in front without telling the annotation.
        return (None,) * (ndim - len(spec)) + tuple(spec), None
    sharding = getattr(leaf, "sharding", None)
    if isinstance(leaf, jax.core.Tracer):
        sharding = jax.typeof(leaf).sharding
        if not explicit_axes(sharding.mesh):
            return None, None
    if not isinstance(sharding, NamedSharding):
        return None, None
    spec = tuple(sharding.spec)
    return spec + (None,) * (leaf.ndim - len(spec)), sharding.mesh


def explicit_axes(mesh: Any) -> bool:
    """Whether a mesh has axes whose shardings are part of the types."""
    kinds = getattr(mesh, "axis_types", ())
    return any(kind == jax.sharding.AxisType.Explicit for kind in kinds)


def value_of(leaf: Any) -> Any:
    return leaf.get_value() if is_boxed(leaf) else leaf
