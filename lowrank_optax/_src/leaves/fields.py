"""Where a parameter's entries stand in an optimizer's state."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax._src.leaves.box import (
    ParamBox,
    annotate,
    annotation,
    apart,
    empty,
    is_box,
    is_variable,
    rebox,
    unbox,
    value_of,
)
from lowrank_optax._src.leaves.context import (
    is_quiet,
    note_views,
    quietly,
    record_views,
)
from lowrank_optax._src.leaves.paths import check_arrays, flatten, labels, path_parts
from lowrank_optax._src.leaves.placing import (
    annotate_by,
    place_by_rules,
    whole_spec,
)
from lowrank_optax._src.leaves.roles import Known, Role, holder_of, is_own, role_of

Where = tuple[str, int]  # a field of a state, and the number of a parameter's leaf


class StateFields:
    """The fields of an optimizer's state that mirror the parameters' tree.

    Found by initialising the optimizer, for its shapes alone, with every parameter in
    a box of its path: wherever a box comes out again, it is that parameter's entry of
    a field. So masks, labels and partitions inside are followed as they are. What
    stands below a parameter's place, as in a code, is a field of its own, "mu.left",
    unless what a state keeps there is to be taken whole. The boxes call the axes of a
    parameter 0, 1 and so on.
    """

    def __init__(self, inner: optax.GradientTransformation, whole: bool = False):
        # Traced, as JAX keeps what was, by shapes and by what is said around the call.
        self._layout = jax.jit(functools.partial(_layout, inner, whole))

    def layout(self, tree: Any) -> "Layout":
        """Where the fields are, for parameters (or their shapes) like ``tree``."""
        leaves, treedef = jax.tree.flatten(tree, is_leaf=is_variable)
        boxes = []
        for i, x in enumerate(map(value_of, leaves)):
            shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
            boxes.append(ParamBox(shape, i, tuple(range(len(x.shape)))))
        with quietly():
            return self._layout.eval_shape(treedef.unflatten(boxes))


def _layout(inner: optax.GradientTransformation, whole: bool, tree: Any) -> "Layout":
    """Where the fields are, by parameters in boxes of their numbers."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)
    leaves = {tuple(path): i for i, (path, _) in enumerate(flat)}
    plain = inner.init(unbox(tree))
    state = _of_boxes(inner.init, tree, plain)
    state = _told_by_place(plain, tree) if state is None else state
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)),
        state if whole else apart(state),
    )
    found, structure = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_box)
    where = [field_of(k, x, leaves) for k, x in found]
    placed = [(k, w[0]) for (k, _), w in zip(found, where, strict=True) if w]
    holders = {
        name: holder_of(state, k, field_name(name).partition(".")[0])
        for k, name in placed
    }
    codes = frozenset(
        name
        for k, name in placed
        if "." in field_name(name) and is_own(holder_of(state, k))
    )
    entries, masked = [x for _, x in found], _masked_fields(state, set(leaves))
    return Layout(structure, where, entries, masked, holders, codes)


def _of_boxes(init: Callable[[Any], Any], tree: Any, plain: Any) -> Any | None:
    """The state of a tree of boxes, by shapes; None if it is another than without.

    A function that chooses parameters, as of a mask, may ask for the path or the shape
    of a leaf, which a box changes.
    """
    try:
        with quietly():
            state = empty(jax.eval_shape(lambda tree: init(tree), tree))
    except Exception:  # whatever such a function raises, which it does not otherwise
        return None
    return state if _shapes(unbox(state)) == _shapes(unbox(plain)) else None


def _told_by_place(plain: Any, tree: Any) -> Any:
    """A state without boxes, its entries in the boxes of a tree by where they stand."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)
    places = {tuple(path): i for i, (path, _) in enumerate(flat)}
    found, structure = jax.tree_util.tree_flatten_with_path(unbox(plain))
    where = [field_of(key, x, places) for key, x in found]
    return structure.unflatten(
        rebox(flat[w[1]][1], x) if w else x
        for (_, x), w in zip(found, where, strict=True)
    )


def _shapes(tree: Any) -> tuple[Any, list[tuple[int, ...]]]:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [jnp.shape(x) for x in leaves]


def field_of(key_path: Any, entry: Any, leaves: Mapping[Any, int]) -> Where | None:
    """Which field of which parameter an entry is, by the place at which it stands.

    A number that is kept for a parameter, such as an age, is in no box; it stands below
    the parameter's path all the same.
    """
    for end in range(len(key_path), -1, -1):
        for start in range(end + 1):
            leaf = leaves.get(tuple(key_path[start:end]))
            if leaf is None or (is_box(entry) and entry.path != leaf):
                continue
            if start == end and not is_box(entry):  # the tree is a single leaf
                continue
            field = "/".join(path_parts(key_path[:start]))
            return ".".join((field, *path_parts(key_path[end:]))), leaf
    return None


def _masked_fields(state: Any, paths: set[Any]) -> list[str]:
    """Fields in which some parameter, or each of them, has no entry."""

    def left_out(x):
        return isinstance(x, optax.MaskedNode)

    entries, _ = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda x: is_box(x) or left_out(x)
    )
    starts = (
        key_path[:start]
        for key_path, x in entries
        if left_out(x)
        for start in range(len(key_path) + 1)  # to the end if it is a single leaf
        if tuple(key_path[start:]) in paths
    )
    return ["/".join(path_parts(start)) for start in starts]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Where each parameter's entries stand in a state, see `StateFields`."""

    structure: Any
    where: list[Where | None]
    found: list[Any]
    masked: list[str]
    holders: dict[str, type]
    codes: frozenset[str]  # the fields that are arrays of a code, as "mu.left"

    @property
    def names(self) -> list[str]:
        """Paths of the fields within the state, such as ``"0/mu"``."""
        return list(dict.fromkeys([*(w[0] for w in self.where if w), *self.masked]))

    def role(self, name: str) -> Role | None:
        """What the field of this path is known to be."""
        return role_of(self.holders.get(name), field_name(name))

    @property
    def known(self) -> tuple[tuple[str, Known], ...]:
        """Each field with what it is known to be."""
        return tuple(
            (name, "code" if name in self.codes else self.role(name))
            for name in self.names
        )

    def is_foreign(self, name: str) -> bool:
        """Whether the field holds arrays for a state that is not of this library."""
        if name in self.codes or is_own(self.holders.get(name, Layout)):
            return False
        own = (x for (field, _), x in self.abstract.items() if field == name)
        return any(x.ndim and jnp.issubdtype(x.dtype, jnp.floating) for x in own)

    def inherits(self, where: Where, ndim: int) -> bool:
        """Whether an entry is in the box of its parameter, of so many axes, as it came.

        Another annotation says where the entry itself belongs.
        """
        box = self.found[self.where.index(where)]
        return is_box(box) and box.out_sharding == tuple(range(ndim))

    @property
    def abstract(self) -> dict[Where, Any]:
        """Shape and dtype of each entry as the optimizer makes it."""
        entries = ((w, value_of(self.found[i])) for i, w in enumerate(self.where) if w)
        return dict(entries)

    def get(self, state: Any) -> dict[Where, Any]:
        """What stands at each parameter's place in each field."""
        entries = self.structure.flatten_up_to(apart(empty(state)))
        return {w: x for w, x in zip(self.where, entries, strict=True) if w}

    def set(self, state: Any, values: dict[Where, Any]) -> Any:
        """The state with other values at some places."""
        entries = self.structure.flatten_up_to(apart(empty(state)))
        placed = zip(self.where, entries, strict=True)
        return self.structure.unflatten(
            [values.get(w, x) if w else x for w, x in placed]
        )


def by_leaf(values: Mapping[Where, Any], leaves: Iterable[int]) -> dict[int, Any]:
    """``{leaf: {field: value}}``, with an entry for each of the leaves."""
    found: dict[int, dict[str, Any]] = {i: {} for i in leaves}
    for (name, i), x in values.items():
        found[i][name] = x
    return found


def by_field(values: Mapping[int, Mapping[str, Any]]) -> dict[Where, Any]:
    """The inverse of `by_leaf`."""
    return {(name, i): x for i, own in values.items() for name, x in own.items()}


def fit_boxes(layout: Layout, state: Any, tree: Any) -> Any:
    """The state without annotations that do not fit, as factored moments inherit them.

    An optimizer that keeps something of another shape than its parameter leaves it in
    the parameter's box, whose sharding would be that of another array. What it says of
    axes of the same size stays.
    """
    leaves = flatten(tree)[1]

    def fit(where, x):
        source = leaves[where[1]]
        shape, own = np.shape(value_of(x)), np.shape(value_of(source))
        if not is_variable(x) or shape == own or not layout.inherits(where, len(own)):
            return x
        if annotation(x) is None or len(shape) != len(own):
            return annotate(x, value_of(x), None)
        axes = zip(whole_spec(x) or (), shape, own, strict=True)
        fitting = tuple(a if i == j else None for a, i, j in axes)
        return annotate_by(x, value_of(x), fitting)

    return layout.set(state, {w: fit(w, x) for w, x in layout.get(state).items()})


def field_name(name: str) -> str:
    """The field's own name at the end of its path."""
    return name.rpartition("/")[2]


def abstract_state(tx: optax.GradientTransformation, params: Any) -> Any:
    """``tx.init(params)`` by shapes alone, without a warning."""
    with quietly():
        # A function of its own, see `boxed_state`.
        return jax.eval_shape(lambda params: tx.init(params), params)


def boxed_state(tx: Any, params: Any, mesh: Any = None) -> Any:
    """``tx.init(params)`` by shapes alone, arrays boxed with their parameter's path.

    With a mesh, each box says where on it the array belongs.
    """
    check_arrays(params)
    paths, leaves, treedef = flatten(params)
    boxes, plain = [], []
    for parts, leaf in zip(paths, leaves, strict=True):
        x, place = value_of(leaf), place_by_rules(leaf)
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)  # on no mesh, which may not fit
        plain.append(rebox(leaf, shape) if is_variable(leaf) else shape)
        box = ParamBox(shape, parts)
        if mesh is not None and place is not None:
            kind = place.memory_kind
            box = box.replace(
                box.value, out_sharding=place.spec, mesh=mesh, memory_kind=kind
            )
        boxes.append(box)
    tree, bare = treedef.unflatten(boxes), treedef.unflatten(plain)
    told = _of_boxes(tx.init, tree, abstract_state(tx, bare)) is not None
    # A function of its own, or JAX would answer from memory what is recorded and
    # limited anew at every call.
    given = tree if told else bare
    with quietly() if is_quiet() else record_views() as noted:
        state = jax.eval_shape(lambda params: tx.init(params), given)
    views = noted or []
    if not told:
        state = _told_by_place(state, tree)
        sources = dict(zip(labels(paths), boxes, strict=True))
        views = [dataclasses.replace(v, source=sources.get(v.path)) for v in views]
    note_views(views)
    return apart(empty(state))
