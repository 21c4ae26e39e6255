"""The state-space engine: an optimizer whose moments are stored compressed."""

import dataclasses
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._src.engines.accept import (
    accept_leaf,
    accept_together,
    increment,
    tree_where,
)
from lowrank_optax._src.engines.around import ByLeaves
from lowrank_optax._src.engines.coded import (
    Coded,
    code_view,
    decode,
    encode,
    encode_by,
    is_elementwise,
    measured_by,
)
from lowrank_optax._src.engines.in_bytes import step_in_bytes
from lowrank_optax._src.engines.moments import Choose
from lowrank_optax._src.engines.order import Order
from lowrank_optax._src.engines.start import check_start, largest_of_small
from lowrank_optax._src.kernels.adam import Adam
from lowrank_optax._src.leaves import matrix, saving
from lowrank_optax._src.leaves.box import (
    is_variable,
    rebox,
    value_of,
)
from lowrank_optax._src.leaves.choose import view_dense, view_leaves
from lowrank_optax._src.leaves.context import accumulating
from lowrank_optax._src.leaves.fields import (
    Layout,
    StateFields,
    Where,
    by_leaf,
    field_name,
    fit_boxes,
)
from lowrank_optax._src.leaves.keys import leaf_seed
from lowrank_optax._src.leaves.matrix import MatrixView
from lowrank_optax._src.leaves.paths import Path, flatten, full_precision
from lowrank_optax._src.leaves.placing import place_of
from lowrank_optax._src.leaves.roles import Role
from lowrank_optax._src.leaves.transformation import transformation
from lowrank_optax._src.linalg import meshes
from lowrank_optax._src.parts import compatible
from lowrank_optax._src.parts.laws import Codec

# What a field requires of its codec.
_REQUIRED: dict[Role, tuple[str, ...]] = {
    "first": (compatible.SIGNS,),
    "second": (compatible.NONNEGATIVE, compatible.ALL_SIZES),
}
_BASIS = (compatible.SIGNS, compatible.INDEPENDENT)


class CompressState(NamedTuple):
    """State of `compress_state` and `leafwise`.

    Attributes:
      step: updates made so far, int32.
      inner_state: of the inner optimizer; in its fields that mirror the parameters, a
        leaf position holds an array, or a NamedTuple of arrays where it is compressed.
      own: ``{field: tree}`` of a `leafwise` rule's fields which the inner optimizer
        does not have; empty otherwise.
    """

    step: jax.Array
    inner_state: Any
    own: dict[str, Any]


def compress_state(
    inner: optax.GradientTransformation,
    codecs: Mapping[str, Codec],
    *,
    matrices: matrix.Matrices = None,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Store fields of an optimizer's state compressed between its updates.

    At every update the codes are decoded, the inner optimizer runs at full size, and
    its new moments are encoded, ``encode(inner(decode(code)))``: of one leaf after the
    other, where the inner optimizer treats each by itself, so that the moments of one
    at a time exist at full size. MLorc is this with the `LowRank` codec;
    `mlorc_scale_by_adam` and `mlorc_scale_by_lion` have no moment at full size at all.

    Args:
      inner: any Optax transformation with state that mirrors the parameters.
      codecs: ``{field name: codec}``, such as ``{"mu": LowRank(4)}``. A name stands for
        every field of that name in the state, or give a full path such as ``"0/mu"``.
      matrices: which leaves are matrices, see `default_matrices`. A moment of another
        shape than its parameter (factored, or projected) is seen by its own last two
        axes; codecs that work element by element (`Cast`) ask for no matrices and
        take every leaf of 4,096 numbers or more.
      key: a seed or a key for randomized codecs.

    Returns:
      A transformation from full-shape updates to full-shape updates.

    Raises:
      ValueError: for a field that the inner optimizer does not have; for codecs that
        cannot store what stands there: first moments and bases have signs, second
        moments have none, columns of a basis are independent, and only what has rows
        and columns can be factored.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = lro.compress_state(optax.trace(0.9), {"trace": lro.LowRank(2)})
    >>> state = tx.init({"w": jnp.ones((6, 8))})
    >>> code = state.inner_state.trace["w"]
    >>> code.left.shape, code.right.shape
    ((6, 2), (2, 8))
    >>> codecs = {"mu": lro.Cast(jnp.bfloat16), "nu": lro.LowRank(2, nonnegative=True)}
    >>> tx = lro.compress_state(optax.scale_by_adam(), codecs)
    >>> codecs = {"mu": lro.BlockInt8(signed=True), "nu": lro.BlockInt8(signed=False)}
    >>> tx = lro.compress_state(optax.scale_by_adam(), codecs)
    """

    def choose(layout, creating):
        chosen, names = {}, layout.names
        for name, codec in codecs.items():
            found = [f for f in names if name in (f, field_name(f))]
            if not found:
                raise ValueError(
                    f"Cannot compress the state field '{name}': the inner optimizer's "
                    "fields that mirror the parameters are "
                    f"{', '.join(sorted(names)) or 'none'}. Name one of these."
                )
            chosen |= dict.fromkeys(found, codec)
        for name, codec in chosen.items():
            is_basis = field_name(name) == "basis"
            needs = _BASIS if is_basis else _REQUIRED.get(layout.role(name), ())
            for need in needs:
                if need in getattr(codec, "lacks", ()):
                    field, kind = f"the state field '{name}'", compatible.name(codec)
                    raise compatible.cannot_use(kind, field, "it", need, kind)
        return chosen

    return compress_fields(inner, choose, matrices=matrices, key=key)


def compress_fields(
    inner: optax.GradientTransformation,
    choose: Choose,
    *,
    matrices: matrix.Matrices,
    key: int | jax.Array,
    adam: Adam | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`compress_state`, with the codecs chosen once the state's fields are known.

    Args:
      inner, matrices, key: as of `compress_state`.
      choose: from the fields to the codecs of some, by name, and whether the state is
        about to be created.
      adam: the numbers of ``inner``, if it is Adam: it stores no moments then.
    """
    inner = optax.with_extra_args_support(inner)
    engine = _Compression(inner, StateFields(inner), choose, matrices, key, adam)
    return transformation(engine.init, engine.update)


@dataclasses.dataclass(frozen=True)
class _Compression:
    """The arguments of `compress_fields`, and what is done with them."""

    inner: optax.GradientTransformationExtraArgs
    fields: StateFields
    choose: Choose
    matrices: matrix.Matrices
    key: int | jax.Array
    adam: Adam | None

    def _see(
        self, tree: Any, layout: Layout, moments: Any, creating: bool = False
    ) -> tuple[list[Any], Coded]:
        """How each leaf is seen, and the codec of each coded moment with its view."""
        codec_of = self.choose(layout, creating) if flatten(tree)[1] else {}
        if all(map(is_elementwise, codec_of.values())):
            views = view_dense(tree, creating)
        else:
            sizes = saving.coded(codec_of.values())
            views = view_leaves(tree, self.matrices, "short", creating, sizes)
        coded = {
            (name, i): (codec_of[name], view)
            for (name, i), x in moments.items()
            if name in codec_of
            and (view := code_view(codec_of[name], views[i], x)) is not None
        }
        wanted = {i for name, i in moments if name in codec_of}
        if not coded and any(isinstance(views[i], MatrixView) for i in wanted):
            kinds = {compatible.name(codec) for codec in codec_of.values()}
            codec, names_ = " and ".join(sorted(kinds)), ", ".join(codec_of)
            need = "moments with rows and columns"
            raise compatible.cannot_use(
                codec, f"the fields {names_}", codec, need, "that"
            )
        return views, coded

    def init(self, params):
        paths, leaves, treedef = flatten(params)
        whole = treedef.unflatten([full_precision(x) for x in leaves])
        layout = self.fields.layout(whole)
        # Compiled, the moments that are not kept are never allocated; but boxes and
        # shardings only survive outside.
        placed = any(place_of(x) is not None or is_variable(x) for x in leaves)
        state = None
        if placed:
            state = fit_boxes(layout, self.inner.init(whole), whole)
        moments = layout.get(state) if placed else layout.abstract
        views, coded = self._see(params, layout, moments, creating=True)

        def without_codes(state):
            entries = layout.get(state)
            moments = {w: value_of(entries[w]) for w in coded}
            # The arrays of a code need not start at zero, and they are small.
            start = {w: x for w, x in moments.items() if w[0] in layout.codes}
            largest = {w: jnp.max(jnp.abs(moments[w])) for w in coded if w not in start}
            bare = dict.fromkeys(coded, optax.MaskedNode())
            return layout.set(state, bare), start, largest

        if placed:
            state, start, largest = without_codes(state)
        else:
            make = jax.jit(lambda whole: without_codes(self.inner.init(whole)))
            state, start, largest = make(whole)
        if any(isinstance(x, jax.core.Tracer) for x in largest.values()):
            largest = largest_of_small(self.inner, self.fields, whole, largest)
        check_start(largest, views)
        step = jnp.zeros([], jnp.int32)
        codes = {w: codec.init(view) for w, (codec, view) in coded.items()}
        for w, x in start.items():
            plain = jax.tree.map(value_of, codes[w], is_leaf=is_variable)
            view = coded[w][1]
            at = paths[w[1]], step
            code = self._encode_at(w, coded, view.matrix(x), plain, at)
            codes[w] = jax.tree.map(
                lambda old, new: rebox(old, new) if is_variable(old) else new,
                codes[w],
                code,
                is_leaf=is_variable,
            )
        return CompressState(step, layout.set(state, codes), {})

    def _encode_at(
        self, w: Where, coded: Coded, x: jax.Array, old: Any, at: tuple[Path, jax.Array]
    ) -> Any:
        """The code of a moment; ``at`` are the leaf's path and the step."""
        (codec, view), (path, step) = coded[w], at
        seed = leaf_seed(self.key, path)
        field = "" if getattr(codec, "one_key", False) else w[0]
        parts = codec, field, view.batch_shape
        return encode(parts, seed, step, x, old)

    def update(
        self, updates: Any, state: CompressState, params: Any = None, **extra: Any
    ) -> tuple[Any, CompressState]:
        """Decode the moments of some leaves, step, and encode them; then of others."""
        leaves = self._leaves(updates, state)
        treedef, old, out, new = leaves.treedef, leaves.old, {}, {}
        if self.adam is not None:
            count = state.inner_state.count
            out, new = step_in_bytes(self.adam, leaves.coded, leaves.given, old, count)
        grads = {i: g for i, g in enumerate(leaves.whole) if i not in new}
        weights = None
        if params is not None:
            weights = treedef.flatten_up_to(params)
            weights = {i: full_precision(weights[i]) for i in grads}
        shapes = leaves.decoded_shapes(state.inner_state, grads)
        inner = ByLeaves(
            self.inner, leaves.layout, treedef, shapes, grads, weights, extra
        )
        order, dense = Order(), bool(leaves.coded)
        for group in inner.groups:
            before = leaves.decoded(order.start({i: old[i] for i in group}, dense))
            seen = {i: grads[i] for i in group}
            seen_weights = {} if weights is None else {i: weights[i] for i in group}
            directions, found = inner.step(seen, before, seen_weights)
            measured = by_leaf(measured_by(leaves.coded, found), group)
            for i in group:
                out[i] = directions[i].astype(leaves.given[i].dtype)
                change = _Change(old[i], before[i], found[i], measured[i])
                new[i] = self._keep(leaves, i, change, out[i])
            order.end([new[i] for i in group])
        inner_state = inner.state(new)
        state = CompressState(increment(state.step), inner_state, state.own)
        return treedef.unflatten(out[i] for i in range(len(out))), state

    def _leaves(self, updates: Any, state: CompressState) -> "_Leaves":
        paths, given, treedef = flatten(updates)
        whole = [full_precision(g) for g in given]
        layout = self.fields.layout(treedef.unflatten(whole))
        _, coded = self._see(updates, layout, layout.abstract)
        old = by_leaf(layout.get(state.inner_state), range(len(given)))
        return _Leaves(treedef, paths, layout, coded, given, whole, old, state.step)

    def _keep(
        self, leaves: "_Leaves", i: int, change: "_Change", direction: jax.Array
    ) -> dict[str, Any]:
        """The moments of a leaf as they are kept."""
        new = dict(change.found)
        coded = [name for name in new if (name, i) in leaves.coded]
        for name in coded:
            codec, view = leaves.coded[name, i]
            x, old = change.found[name], change.old[name]
            if name in change.measured:
                code = encode_by(codec, change.measured[name], view.matrix(x))
            else:
                at = leaves.paths[i], leaves.step
                code = self._encode_at((name, i), leaves.coded, view.matrix(x), old, at)
            if accumulating() == "add":  # most often, only the sum has changed
                code = tree_where(jnp.any(x != change.before[name]), code, old)
            new[name] = code
        if not coded:
            return accept_leaf(new, change.old, direction)
        # The moments of a leaf with codes are accepted together. What is measured is
        # known before the codes are written; if it is finite, so are these.
        rest = [x for name, x in new.items() if name not in change.measured]
        told_by = list(change.measured.values()), rest
        return accept_together(new, change.old, direction, told_by)


class _Change(NamedTuple):
    """The moments of one leaf in a step, by field.

    Attributes:
      old: as they were kept.
      before: the same decoded.
      found: after the step.
      measured: what some codecs measured of these.
    """

    old: dict[str, Any]
    before: dict[str, Any]
    found: dict[str, Any]
    measured: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Leaves:
    """The leaves of one update, in the order of their tree.

    Attributes:
      treedef, paths: of the updates.
      layout: of the inner optimizer's state.
      coded: see `_Compression._see`.
      given: gradients.
      whole: the same in float32 at least.
      old: moments as they are kept, by leaf and field.
      step: of the state.
    """

    treedef: jax.tree_util.PyTreeDef
    paths: list[Path]
    layout: Layout
    coded: Coded
    given: list[jax.Array]
    whole: list[jax.Array]
    old: dict[int, Any]
    step: jax.Array

    def decoded(self, codes: Mapping[int, Any]) -> dict[int, Any]:
        """The moments of some leaves at full size."""
        return {
            i: {n: decode(self.coded, (n, i), x) for n, x in own.items()}
            for i, own in codes.items()
        }

    def decoded_shapes(self, inner_state: Any, leaves: Container[int]) -> Any:
        """The inner optimizer's state, decoded by shapes alone; of others, masks."""
        later = {
            (name, i): meshes.shape_of(
                lambda x, w=(name, i): decode(self.coded, w, x), x
            )
            for i, own in self.old.items()
            for name, x in own.items()
            if (name, i) in self.coded and i in leaves
        }
        masks = {w: optax.MaskedNode() for w in self.coded if w[1] not in leaves}
        return self.layout.set(inner_state, masks | later)
