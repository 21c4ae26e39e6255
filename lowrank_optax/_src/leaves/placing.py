"""Where arrays of state lie on a mesh.

The mesh axes of a weight are shared out over the axes of an array beside it. What runs
along an axis of the weight has that axis' own; those that are left split the longest.
So a thin array, such as a basis, is split by all that split the weight, and takes as
small a part of itself on each device as the weight does.
"""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_optax._src.leaves.box import (
    ParamBox,
    annotate,
    annotation,
    is_boxed,
    is_linen,
    is_variable,
    rebox,
    value_of,
)

T = TypeVar("T")
Split = Literal["all", "own"]

_split = jax.make_user_context(default_value="all")


def split_states(by: Split) -> contextlib.AbstractContextManager[None]:
    """Choose which mesh axes split thin arrays of state, within a ``with`` block.

    It counts where a state is created or its place is asked for: for `state_shardings`,
    `memory_report`, ``tx.init`` and ``nnx.Optimizer``. An update keeps the places that
    it is given.

    Args:
      by: "all", the default, for the long axis of a basis, a factor or a projected
        moment split by all mesh axes that split the weight. On a device it is as small
        a part as the weight's; a step gathers it over the axes that are not its own.
        "own" for those of the weight's own axis only, as rows of the weight for rows of
        the basis: less is gathered, and where the weight is split along one axis, half
        of the arrays are whole on every device.

    Returns:
      A context manager.

    Raises:
      ValueError: for another choice.

    >>> import jax, jax.numpy as jnp, lowrank_optax as lro
    >>> from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec as P
    >>> mesh = AbstractMesh((4, 2), ("fsdp", "tensor"))
    >>> spec = NamedSharding(mesh, P("fsdp", "tensor"))
    >>> params = {"w": jax.ShapeDtypeStruct((64, 96), jnp.float32, sharding=spec)}
    >>> tx = lro.mlorc_lion(1e-3, rank=2)
    >>> lro.memory_report(tx, params, mesh)[2].bytes_per_device
    168
    >>> with lro.split_states("own"):
    ...     lro.memory_report(tx, params, mesh)[2].bytes_per_device
    520
    """
    if by not in get_args(Split):
        names = ", ".join(map(repr, get_args(Split)))
        raise ValueError(f"`by` must be one of {names}, got {by!r}.")
    return _split(by)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an array lies.

    Attributes:
      spec: what splits each axis: one name, several, or None.
      mesh: which has axes of these names; None if they stand for others.
      memory_kind: of the devices, None for the usual one.
    """

    spec: tuple[Any, ...]
    mesh: Any = None
    memory_kind: str | None = None

    def sharding(self, spec: Sequence[Any]) -> NamedSharding:
        """Of an array beside it, split so."""
        kind = self.memory_kind
        return NamedSharding(self.mesh, PartitionSpec(*spec), memory_kind=kind)


def place_of(leaf: Any) -> Place | None:
    """Where a leaf lies, if that is known.

    It is for an annotated box, for a concrete array with a `NamedSharding`, and for a
    traced one on a mesh of explicit axes.
    """
    if is_variable(leaf):
        return _place_of_box(leaf)
    if isinstance(leaf, jax.core.Tracer):
        # Not its own attribute: that is an error, which takes JAX long to write.
        sharding = jax.typeof(leaf).sharding
        if not explicit_axes(sharding.mesh):
            return None
    else:
        sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    spec = tuple(sharding.spec)
    spec += (None,) * (leaf.ndim - len(spec))
    return Place(spec, sharding.mesh, sharding.memory_kind)


def _place_of_box(box: Any) -> Place | None:
    spec = whole_spec(box)
    if spec is None:
        return None
    if isinstance(box, ParamBox):
        return Place(spec, box.mesh, box.memory_kind)
    if isinstance(placed := annotation(box), NamedSharding):
        return Place(spec, placed.mesh, placed.memory_kind)
    if not is_linen(box):
        spec = _by_rules_of_nnx(box, spec)
    mesh = getattr(box, "mesh", None) or jax.sharding.get_abstract_mesh()
    known = all(name in mesh.shape for entry in spec for name in names(entry))
    logical = is_linen(box) and hasattr(box, "rules")
    return Place(spec, mesh if known and not logical else None)


def whole_spec(box: Any) -> tuple[Any, ...] | None:
    """The annotation of a box, with an entry for each axis."""
    spec = annotation(box)
    if spec is None:
        return None
    placed = isinstance(spec, NamedSharding)
    entries = tuple(spec.spec) if placed else tuple(spec)
    rest = (None,) * (value_of(box).ndim - len(entries))
    # nnx.vmap stacks layers in front without telling the annotation.
    return (*entries, *rest) if is_linen(box) or placed else (*rest, *entries)


def annotate_by(box: Any, value: Any, spec: tuple[Any, ...]) -> Any:
    """The box with another value in it, and another spec in the form of its own."""
    placed = annotation(box)
    if not isinstance(placed, NamedSharding):
        return annotate(box, value, spec)
    return annotate(box, value, placed.update(spec=PartitionSpec(*spec)))


def with_whole_specs(tree: Any) -> Any:
    """The tree with annotations of all axes, as what inherits them must have them."""

    def whole(x):
        spec = annotation(x) if is_variable(x) else None
        if spec is None or isinstance(spec, NamedSharding):
            return x
        full = whole_spec(x)
        return x if full == tuple(spec) else annotate(x, value_of(x), full)

    return jax.tree.map(whole, tree, is_leaf=is_boxed)


def _by_rules_of_nnx(box: Any, spec: tuple[Any, ...]) -> tuple[Any, ...]:
    """The spec in axes of the mesh, as NNX itself reads it."""
    from flax.core import spmd  # is there, as the box is Flax's

    own = box.get_metadata().get("sharding_rules") or ()
    rules = spmd.composite_rules(spmd.get_logical_axis_rules(), own)
    return tuple(spmd.from_sharding_rules(spec, rules))


def place_by_rules(leaf: Any) -> Place | None:
    """`place_of`, where Linen's rules for other names than the mesh's count too.

    Linen keeps such names in its boxes, and so does what is created beside them.
    """
    place = place_of(leaf)
    if place is None or not hasattr(leaf, "rules"):
        return place
    from flax import linen  # is there, as the box is Linen's

    rules = leaf.rules or linen.get_logical_axis_rules()
    if not rules:
        return place
    return Place(tuple(linen.logical_to_mesh_axes(place.spec, rules) or ()))


def put_beside(source: Any, value: Any, batch: Sequence[int], along: Sequence[Any]):
    """An array of state where it belongs beside a leaf, and in a box as the leaf.

    Args:
      source: the leaf, or None where nothing is known of it.
      value: (*batch, *dims), the array.
      batch: the leaf's axes that are its first ones.
      along: for each of its other axes, the leaf's axes along which it runs, in order;
        none for a rank.
    """
    place = place_of(source)
    boxed = is_variable(source)
    if place is None:
        return rebox(source, value) if boxed else value
    spec = share(place, value.shape, batch, along)
    if boxed:
        return annotate_by(source, value, spec)
    if isinstance(value, jax.core.Tracer):
        return jax.sharding.reshard(value, place.sharding(spec))
    return jax.device_put(value, place.sharding(spec))


def share(
    place: Place, shape: Sequence[int], batch: Sequence[int], along: Sequence[Any]
) -> tuple[Any, ...]:
    """The spec of an array beside a leaf, see `put_beside`."""
    spec = [place.spec[a] for a in batch] + [_merged(place.spec, x) for x in along]
    if place.mesh is None:
        return tuple(spec)
    spec = list(fitting(spec, shape, place.mesh))
    # Not of scales, which run along both sides or along none: a code would be moved to
    # where its scales are, or these to it.
    runs_along = [bool(x) for x in along]
    if _split.value == "all" and any(runs_along) and runs_along != [True, True]:
        runs = [False] * len(batch) + runs_along
        axes = range(len(batch), len(shape))
        longest = max(axes, key=lambda a: (runs[a], shape[a]))
        used = {name for entry in spec for name in names(entry)}
        left = [x for e in place.spec for x in names(e) if x not in used]
        spec[longest] = (*names(spec[longest]), *left)
    return fitting(spec, shape, place.mesh)


def fitting(spec: Sequence[Any], shape: Sequence[int], mesh: Any) -> tuple[Any, ...]:
    """The spec without what does not divide an axis; none for other numbers of axes."""
    if len(spec) > len(shape):
        return ()
    found: list[Any] = []
    for size, entry in zip(shape, spec, strict=False):
        kept: list[str] = []
        for name in names(entry):
            if size % math.prod(mesh.shape[x] for x in (*kept, name)) == 0:
                kept.append(name)
        found.append(None if not kept else kept[0] if len(kept) == 1 else tuple(kept))
    return tuple(found)


def unsplit(x: jax.Array, axes: Sequence[bool]) -> jax.Array:
    """A concrete array with some of its axes whole on every device."""
    place = place_of(x)
    if place is None:
        return x
    spec = tuple(
        None if whole else e for e, whole in zip(place.spec, axes, strict=True)
    )
    if spec == place.spec:
        return x
    return jax.device_put(x, place.sharding(spec))


def names(entry: Any) -> tuple[str, ...]:
    """Those in one entry of a spec."""
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple) else (entry,)


def _merged(spec: tuple[Any, ...], axes: tuple[int, ...]) -> Any:
    """The mesh axes of several leaf axes merged into one, where that has any."""
    return spec[axes[0]] if axes and not any(spec[a] for a in axes[1:]) else None


def varying(x: Any) -> frozenset[str]:
    """The axes of a `jax.shard_map` over whose devices an array may differ."""
    kinds = getattr(jax.typeof(x), "mat", None)
    return frozenset() if kinds is None else frozenset(kinds.varying)


def with_auto_axes(run: Any, *args: Any) -> Any:
    """``run(*args)``, its two results sharded as the first two arguments came in."""
    mesh = _explicit_mesh(args[:2])
    if mesh is not None:
        places = jax.tree.map(lambda x: _sharding_on(mesh, x), args[:2])
        run = jax.sharding.auto_axes(run, out_sharding=places)
    return run(*args)


def beside(tree: T, params: Any) -> T:
    """What was made without a mesh, on that of the parameters if its axes are Explicit.

    As an update gives it: the types of a state stay, also within one compilation.
    """
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params))
    mesh = _explicit_mesh(params) if traced else None
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: jax.sharding.reshard(x, _sharding_on(mesh, x)), tree)


def _explicit_mesh(tree: Any) -> Any:
    """The mesh with Explicit axes on which a tree has arrays, if there is one."""
    meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree))
    return next(filter(explicit_axes, meshes), None)


def _sharding_on(mesh: Any, x: Any) -> Any:
    """The sharding of an array; whole on each device if it has none."""
    found = jax.typeof(x).sharding
    return found if explicit_axes(found.mesh) else NamedSharding(mesh, PartitionSpec())


def explicit_axes(mesh: Any) -> bool:
    """Whether a mesh has axes whose shardings are part of the types."""
    kinds = getattr(mesh, "axis_types", ())
    return any(kind == jax.sharding.AxisType.Explicit for kind in kinds)
