"""Boxes of arrays, and meshes: the only code that knows Flax's boxes and shardings.

A `ParamBox` is a boxed abstract parameter, by which optimizer state is traced back to
its source.
"""

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


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


def with_auto_axes(run: Any, *args: Any) -> Any:
    """``run(*args)``, its two results sharded as the first two arguments came in."""
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, args[:2])
    if any(explicit_axes(s.mesh) for s in jax.tree.leaves(shardings)):
        run = jax.sharding.auto_axes(run, out_sharding=shardings)
    return run(*args)


def is_boxed(x: Any) -> bool:
    """Whether ``x`` is a box of Flax: a variable of NNX, or Linen's `nn.Partitioned`.

    Told by what they have, so that Flax need not be there.
    """
    return _is_linen(x) or hasattr(x, "get_value") and hasattr(x, "get_metadata")


def _is_linen(x: Any) -> bool:
    return hasattr(x, "replace_boxed") and hasattr(x, "names")


def is_variable(x: Any) -> bool:
    """Whether ``x`` is a boxed array.

    A mask by a function over a tree of boxes leaves the array out and keeps the box,
    which has no more leaves than the placeholder in it.
    """
    return is_boxed(x) and bool(jax.tree.leaves(value_of(x)))


def rebox(box: Any, value: Any) -> Any:
    """The box with another value in it."""
    return box.replace_boxed(value) if _is_linen(box) else box.replace(value)


def annotate(box: Any, value: Any, spec: tuple[Any, ...] | None) -> Any:
    """The box with another value in it, and another spec, or none."""
    if _is_linen(box):
        return box.replace(value=value, names=spec or ())
    placed = _placed(box)
    if placed is None or spec is None:
        return box.replace(value, out_sharding=spec)
    kind = placed.memory_kind
    other = NamedSharding(placed.mesh, PartitionSpec(*spec), memory_kind=kind)
    return box.replace(value, out_sharding=other)


def annotation(box: Any) -> tuple[Any, ...] | None:
    """The spec of a box, of mesh axes or of names that stand for these."""
    if _is_linen(box):
        return box.names
    placed = _placed(box)
    return tuple(placed.spec) if placed else box.get_metadata().get("out_sharding")


def _placed(box: Any) -> NamedSharding | None:
    """The sharding of a box of NNX that has one with its mesh instead of a spec."""
    found = None if _is_linen(box) else box.get_metadata().get("out_sharding")
    return found if isinstance(found, NamedSharding) else None


def leaf_spec(leaf: Any) -> tuple[tuple[Any, ...] | None, Any]:
    """A leaf's partition spec, one entry an axis, and its sharding, if it has them.

    Known for an annotated box, for a concrete array with a `NamedSharding`, and for a
    traced one on a mesh of explicit axes.
    """
    if leaf is None:
        return None, None
    if is_variable(leaf):
        spec = annotation(leaf)
        if spec is None:
            return None, None
        rest, placed = (None,) * (value_of(leaf).ndim - len(spec)), _placed(leaf)
        # nnx.vmap stacks layers in front without telling the annotation.
        behind = _is_linen(leaf) or placed is not None
        return (*spec, *rest) if behind else (*rest, *spec), placed
    sharding = getattr(leaf, "sharding", None)
    if isinstance(leaf, jax.core.Tracer):
        sharding = jax.typeof(leaf).sharding
        if not explicit_axes(sharding.mesh):
            return None, None
    if not isinstance(sharding, NamedSharding):
        return None, None
    spec = tuple(sharding.spec)
    return spec + (None,) * (leaf.ndim - len(spec)), sharding


def mesh_spec(leaf: Any) -> tuple[Any, ...] | None:
    """`leaf_spec` in axes of the mesh, where Flax has rules for other names in it."""
    spec, _ = leaf_spec(leaf)
    if spec is None or not is_variable(leaf):
        return spec
    if hasattr(leaf, "rules"):
        from flax import linen  # is there, as the box is Linen's

        rules = leaf.rules or linen.get_logical_axis_rules()
        return tuple(linen.logical_to_mesh_axes(spec, rules) or ()) if rules else spec
    if _is_linen(leaf):  # whose names are the mesh's
        return spec
    from flax.core import spmd  # is there, as the variable is of NNX

    own = leaf.get_metadata().get("sharding_rules") or ()
    rules = spmd.composite_rules(spmd.get_logical_axis_rules(), own)
    return tuple(spmd.from_sharding_rules(spec, rules))


def explicit_axes(mesh: Any) -> bool:
    """Whether a mesh has axes whose shardings are part of the types."""
    kinds = getattr(mesh, "axis_types", ())
    return any(kind == jax.sharding.AxisType.Explicit for kind in kinds)


def value_of(leaf: Any) -> Any:
    if not is_boxed(leaf):
        return leaf
    return leaf.value if _is_linen(leaf) else leaf.get_value()
