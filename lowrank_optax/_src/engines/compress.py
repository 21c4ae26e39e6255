"""The state-space engine: an optimizer whose moments are stored compressed."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._src.engines import batching
from lowrank_optax._src.engines.accept import accept_finite, increment, tree_where
from lowrank_optax._src.engines.groups import UpdateInGroups
from lowrank_optax._src.kernels.adam import Adam, recognize
from lowrank_optax._src.kernels.dispatch import active
from lowrank_optax._src.leaves import matrix
from lowrank_optax._src.leaves.box import (
    is_variable,
    leaf_spec,
    transformation,
    value_of,
)
from lowrank_optax._src.leaves.choose import view_dense, view_leaves
from lowrank_optax._src.leaves.fields import (
    StateFields,
    field_name,
    fit_boxes,
    is_part_of_code,
)
from lowrank_optax._src.leaves.keys import leaf_keys
from lowrank_optax._src.leaves.matrix import MatrixView
from lowrank_optax._src.leaves.paths import flatten, full_precision
from lowrank_optax._src.linalg import random
from lowrank_optax._src.parts import compatible
from lowrank_optax._src.parts.laws import Codec
from lowrank_optax._src.parts.part import compiled
from lowrank_optax._src.parts.transfer import FIRST_MOMENTS, SECOND_MOMENTS
from lowrank_optax._src.training import stack
from lowrank_optax._src.training.phases import accumulating

# Smaller leaves stay as they are under an element-wise codec (int8, cast).
ELEMENTWISE_MIN_SIZE = 4096


# What a field requires of its codec.
_REQUIRED = {
    **dict.fromkeys(FIRST_MOMENTS, (compatible.SIGNS,)),
    **dict.fromkeys(SECOND_MOMENTS, (compatible.NONNEGATIVE, compatible.ALL_SIZES)),
    "basis": (compatible.SIGNS, compatible.INDEPENDENT),
}


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

    for name, codec in codecs.items():
        for need in _REQUIRED.get(field_name(name), ()):
            if need in getattr(codec, "lacks", ()):
                field, kind = f"the state field '{name}'", compatible.name(codec)
                raise compatible.cannot_use(kind, field, "it", need, kind)

    def choose(names):
        chosen = {}
        for name, codec in codecs.items():
            found = [f for f in names if name in (f, field_name(f))]
            if not found:
                raise ValueError(
                    f"Cannot compress the state field '{name}': the inner optimizer's "
                    "fields that mirror the parameters are "
                    f"{', '.join(sorted(names)) or 'none'}. Name one of these."
                )
            chosen |= dict.fromkeys(found, codec)
        return chosen

    return compress_fields(inner, choose, matrices=matrices, key=key)


def by_moment(
    first: Codec, second: Codec, fields: tuple[str, ...] | None
) -> Callable[[list[str]], Mapping[str, Codec]]:
    """A choice for `compress_fields`: one codec for first, one for second moments.

    Args:
      fields: names of the fields; None for all that are known as moments.
    """

    def choose(names):
        wanted = FIRST_MOMENTS | SECOND_MOMENTS if fields is None else set(fields)
        chosen = [name for name in names if {name, field_name(name)} & wanted]
        if not chosen:
            raise ValueError(
                "Cannot compress the momentum of an optimizer without any: its state "
                f"has the fields {', '.join(names)}. Name some of them in `fields`."
            )
        return {
            name: second if field_name(name) in SECOND_MOMENTS else first
            for name in chosen
        }

    return choose


def compress_fields(
    inner: optax.GradientTransformation,
    choose: Callable[[list[str]], Mapping[str, Codec]],
    *,
    matrices: matrix.Matrices,
    key: int | jax.Array,
) -> optax.GradientTransformationExtraArgs:
    """`compress_state`, with the codecs chosen once the state's fields are known."""
    adam = recognize(inner)
    inner = optax.with_extra_args_support(inner)
    fields = StateFields(inner)

    def see(tree, names, moments, creating=False):
        """How each leaf is seen, and the codec of each coded moment with its view."""
        codec_of = choose(names) if flatten(tree)[1] else {}
        if all(map(_elementwise, codec_of.values())):
            views = view_dense(tree, creating)
        else:
            views = view_leaves(tree, matrices, creating=creating)
        return views, {
            (name, i): (codec_of[name], view)
            for (name, i), x in moments.items()
            if name in codec_of
            and (view := _code_view(codec_of[name], views[i], x)) is not None
        }

    def init(params):
        _, leaves, treedef = flatten(params)
        whole = treedef.unflatten([full_precision(x) for x in leaves])
        layout = fields.layout(whole)
        # Compiled, the moments that are not kept are never allocated; but boxes and
        # shardings only survive outside.
        placed = any(leaf_spec(x)[0] is not None for x in leaves)
        placed |= any(is_variable(x) for x in leaves)
        state = None
        if placed:
            state = fit_boxes(layout, inner.init(whole), whole)
        moments = layout.get(state) if placed else layout.abstract
        views, coded = see(params, layout.names, moments, creating=True)
        codec_of = choose(layout.names) if leaves else {}
        wanted = {i for name, i in moments if name in codec_of}
        if not coded and any(isinstance(views[i], MatrixView) for i in wanted):
            kinds = {compatible.name(codec) for codec in codec_of.values()}
            codec, names = " and ".join(sorted(kinds)), ", ".join(codec_of)
            need = "moments with rows and columns"
            raise compatible.cannot_use(
                codec, f"the fields {names}", codec, need, "that"
            )

        def without_codes(state):
            moments = {w: value_of(layout.get(state)[w]) for w in coded}
            # The arrays of a code need not start at zero, and they are small.
            start = {w: x for w, x in moments.items() if is_part_of_code(w[0])}
            largest = {w: jnp.max(jnp.abs(moments[w])) for w in coded if w not in start}
            bare = dict.fromkeys(coded, optax.MaskedNode())
            return layout.set(state, bare), start, largest

        if placed:
            state, start, largest = without_codes(state)
        else:
            compiled = jax.jit(lambda whole: without_codes(inner.init(whole)))
            state, start, largest = compiled(whole)
        for (name, i), x in largest.items():
            if not isinstance(x, jax.core.Tracer) and x > 0:
                raise ValueError(
                    f"Cannot compress the state field '{name}' of parameter "
                    f"'{views[i].path}': it starts at {x:.3g}, and codes start "
                    "at zero. Let the inner optimizer start it at zero."
                )
        codes = {w: codec.init(view) for w, (codec, view) in coded.items()}
        step = jnp.zeros([], jnp.int32)
        keys = leaf_keys(key, [v.path for v in views], step)
        for w, x in start.items():
            codec, view = coded[w]
            plain = jax.tree.map(value_of, codes[w], is_leaf=is_variable)
            own_keys = _own_keys(codec, keys[w[1]], w[0], view)
            code = _encode(codec, own_keys, view.matrix(x), plain)
            codes[w] = jax.tree.map(
                lambda old, new: old.replace(new) if is_variable(old) else new,
                codes[w],
                code,
                is_leaf=is_variable,
            )
        return CompressState(step, layout.set(state, codes), {})

    def update(updates, state, params=None, **extra):
        treedef = jax.tree.structure(updates)
        given = treedef.flatten_up_to(updates)
        whole = [full_precision(g) for g in given]
        layout = fields.layout(treedef.unflatten(whole))
        views, coded = see(updates, layout.names, layout.abstract)
        keys = leaf_keys(key, [v.path for v in views], state.step)
        old = layout.get(state.inner_state)
        own = [[w for w in old if w[1] == i] for i in range(len(views))]
        directions, new = list(given), dict(old)

        def decode(w, code):
            codec, view = coded[w]
            return view.leaf(_decode(codec, code))

        def encode(w, x, before):
            codec, view = coded[w]
            own_keys = _own_keys(codec, keys[w[1]], w[0], view)
            own_keys = batching.wait_turn(own_keys)
            code = _encode(codec, own_keys, view.matrix(x), old[w])
            if accumulating() == "add":  # most often, only the sum has changed
                code = tree_where(jnp.any(x != before), code, old[w])
            return code

        def accept(i, moments):
            """Of a leaf with codes as a whole or not at all: they belong together."""
            if any(w in coded for w in moments):
                kept = {w: old[w] for w in moments}
                moments = accept_finite(moments, kept, directions[i])
            new.update(moments)

        # At these, one pass stands for the inner optimizer and both codecs.
        in_one = {} if adam is None else _passes(adam, coded)
        for i, adam_in_blocks in in_one.items():
            view = coded["mu", i][1]
            direction, *codes = adam_in_blocks(
                view.matrix(given[i], given[i].dtype),
                old["mu", i],
                old["nu", i],
                state.inner_state.count,
            )
            directions[i] = view.leaf(direction, given[i].dtype)
            accept(i, {("mu", i): codes[0], ("nu", i): codes[1]})

        masks = {w: optax.MaskedNode() for i in in_one for w in own[i]}
        later = {w: functools.partial(decode, w) for w in coded if w not in masks}
        shapes = {w: jax.eval_shape(decode, old[w]) for w, decode in later.items()}
        run = UpdateInGroups(
            inner,
            layout,
            treedef,
            [optax.MaskedNode() if i in in_one else g for i, g in enumerate(whole)],
            layout.set(state.inner_state, masks | shapes),
            params,
            extra,
        )
        with batching.turns():
            for leaves in run.leaves:
                before = {
                    w: later[w](batching.wait_turn(old[w]))
                    for i in leaves
                    for w in own[i]
                    if w in later
                }
                results, inner_state = run(leaves, before)
                found = layout.get(inner_state)
                for i in leaves:
                    directions[i] = results[i].astype(given[i].dtype)
                    moments = {w: found[w] for w in own[i]}
                    moments |= {
                        w: encode(w, moments[w], before[w])
                        for w in moments
                        if w in later
                    }
                    accept(i, moments)
                batching.end_turn_of(
                    [(directions[i], [new[w] for w in own[i]]) for i in leaves]
                )
        _, inner_state = run.results()
        new_state = CompressState(
            step=increment(state.step),
            inner_state=layout.set(inner_state, new),
            own=state.own,
        )
        return treedef.unflatten(directions), new_state

    return transformation(init, update)


def _passes(adam: Adam, coded: Any) -> dict[int, Callable[..., Any]]:
    if not active():
        return {}
    from lowrank_optax._src.kernels import int8

    return int8.passes(adam, coded)


@compiled
def _decode(codec, code):
    return codec.decode(code)


@compiled
def _encode(codec, key, x, old):
    return codec.encode(key, x, old)


def _own_keys(codec: Codec, key: jax.Array, name: str, view: MatrixView) -> jax.Array:
    """A key for each matrix of a field, of which a leaf may have several."""
    key = key if getattr(codec, "one_key", False) else random.named(key, name)
    return random.matrix_keys(key, view.batch_shape)


def _elementwise(codec: Codec) -> bool:
    return getattr(codec, "elementwise", False)


def _code_view(codec: Codec, view: Any, leaf: Any) -> MatrixView | None:
    """How a codec sees a moment, or None where it stays as it is."""
    moment = value_of(leaf)
    if not jnp.issubdtype(moment.dtype, jnp.floating):
        return None
    if _elementwise(codec):
        if moment.size * stack.parts() < ELEMENTWISE_MIN_SIZE:
            return None
    elif not isinstance(view, MatrixView) or moment.ndim < 2:
        return None
    if moment.shape != view.shape:
        return matrix.last_axes_view(view.path, leaf)
    if isinstance(view, MatrixView):
        return dataclasses.replace(view, dtype=moment.dtype)
    source = moment if view.source is None else view.source
    seen = matrix.last_axes_view(view.path, source)
    return dataclasses.replace(seen, dtype=moment.dtype)
