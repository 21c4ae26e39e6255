"""The state-space engine: an optimizer whose moments are stored compressed."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._src import engine, matrix, trees
from lowrank_optax._src.matrix import MatrixView
from lowrank_optax._src.typing import Codec

# Smaller leaves stay as they are under an element-wise codec (int8, cast).
ELEMENTWISE_MIN_SIZE = 4096


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

    At every update the codes are decoded, the inner optimizer runs at full size on the
    whole tree, and its new moments are encoded, ``encode(inner(decode(code)))``.
    MLorc is this with the `LowRank` codec. Within one update a leaf's moments exist
    at full size; `mlorc_scale_by_adam` and `mlorc_scale_by_lion` avoid that.

    Args:
      inner: any Optax transformation with state that mirrors the parameters.
      codecs: ``{field name: codec}``, such as ``{"mu": LowRank(4)}``. A name stands for
        every field of that name in the state, or give a full path such as ``"0/mu"``.
      matrices: which leaves are matrices, see `default_matrices`. A moment of another
        shape than its parameter (factored, or projected) is seen by its own last two
        axes.
      key: a seed or a key for randomized codecs.

    Returns:
      A transformation from full-shape updates to full-shape updates.

    Raises:
      ValueError: for a field that the inner optimizer does not have.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = lro.compress_state(optax.trace(0.9), {"trace": lro.LowRank(2)})
    >>> state = tx.init({"w": jnp.ones((6, 8))})
    >>> code = state.inner_state.trace["w"]
    >>> code.left.shape, code.right.shape
    ((6, 2), (2, 8))
    """
    inner = optax.with_extra_args_support(inner)
    fields = engine.ParamFields(inner)
    codec_of = {}
    for name, codec in codecs.items():
        found = [f for f in fields.names if name in (f, engine.last(f))]
        if not found:
            raise ValueError(
                f"Cannot compress the state field '{name}': the inner optimizer's "
                "fields that mirror the parameters are "
                f"{', '.join(sorted(fields.names)) or 'none'}. Name one of these."
            )
        codec_of |= dict.fromkeys(found, codec)
    # Compiled functions of arrays alone: leaves of equal shape share one body.
    encode = {name: jax.jit(codec.encode) for name, codec in codec_of.items()}
    decode = {name: jax.jit(codec.decode) for name, codec in codec_of.items()}

    def init(params):
        views = trees.views(params, matrices, creating=True)
        _, leaves, treedef = trees.flatten(params)
        whole = treedef.unflatten([trees.full_precision(x) for x in leaves])
        seen = code_views(inner, fields, codec_of, whole, views)

        def without_codes(whole):
            state = inner.init(whole)
            moments = fields.get(state, treedef)
            for name, i in seen:
                moments[name][i] = optax.MaskedNode()
            return fields.set(state, treedef, moments)

        # Compiled, the moments that are not kept are never allocated; but boxes and
        # shardings only survive outside.
        placed = any(matrix.leaf_spec(x)[0] is not None for x in leaves)
        placed |= any(matrix.is_variable(x) for x in leaves)
        state = (without_codes if placed else jax.jit(without_codes))(whole)
        moments = fields.get(state, treedef)
        for (name, i), view in seen.items():
            moments[name][i] = codec_of[name].init(view)
        inner_state = fields.set(state, treedef, moments)
        return CompressState(jnp.zeros([], jnp.int32), inner_state, {})

    def update(updates, state, params=None, **extra):
        views = trees.views(updates, matrices)
        treedef = jax.tree.structure(updates)
        grads = jax.tree.map(trees.full_precision, updates)
        seen = code_views(inner, fields, codec_of, grads, views)
        codes = fields.get(state.inner_state, treedef)
        moments = {name: list(x) for name, x in codes.items()}
        for (name, i), view in seen.items():
            moments[name][i] = view.leaf(decode[name](codes[name][i]))
        directions, inner_state = inner.update(
            grads,
            fields.set(state.inner_state, treedef, moments),
            None if params is None else jax.tree.map(trees.full_precision, params),
            **extra,
        )
        moments = fields.get(inner_state, treedef)
        new = {
            (name, i): encode[name](
                trees.leaf_key(key, f"{view.path}#{name}", state.step),
                view.matrix(moments[name][i]),
                codes[name][i],
            )
            for (name, i), view in seen.items()
        }
        for i in range(len(views)):
            # All codes of a leaf are accepted or none: they belong together.
            own = [name for name, j in seen if j == i]
            accepted = accept(
                [new[name, i] for name in own], [codes[name][i] for name in own]
            )
            for name, code in zip(own, accepted, strict=True):
                moments[name][i] = code
        state = CompressState(
            step=engine.increment(state.step),
            inner_state=fields.set(inner_state, treedef, moments),
            own=state.own,
        )
        cast = jax.tree.map(lambda d, g: d.astype(g.dtype), directions, updates)
        return cast, state

    return engine.transformation(init, update)


def accept(new: Any, old: Any) -> Any:
    """``new`` if every array of it is finite, else ``old``: bad input never sticks."""
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(new)]
    return engine.where(jnp.stack(finite).all(), new, old) if finite else new


def code_views(
    inner: optax.GradientTransformation,
    fields: engine.ParamFields,
    codec_of: Mapping[str, Codec],
    tree: Any,
    views: list[Any],
) -> dict[tuple[str, int], MatrixView]:
    """How each moment that is to be coded is seen, by field name and leaf number.

    ``tree`` is the parameters, or anything of their structure and shapes.
    """
    with trees.quietly():
        abstract = jax.eval_shape(inner.init, tree)
    moments = fields.get(abstract, trees.flatten(tree)[2])
    return {
        (name, i): view
        for name, codec in codec_of.items()
        for i, moment in enumerate(moments[name])
        if (view := _code_view(codec, views[i], moment)) is not None
    }


def _code_view(codec: Codec, view: Any, moment: Any) -> MatrixView | None:
    """How a codec sees a moment, or None where it stays as it is."""
    if isinstance(moment, tuple):  # masked by another transformation, or coded
        return None
    elementwise = getattr(codec, "elementwise", False)
    x = matrix.value_of(moment)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    if elementwise:
        if x.size < ELEMENTWISE_MIN_SIZE:
            return None
    elif not isinstance(view, MatrixView) or x.ndim < 2:
        return None
    if x.shape != view.shape:
        return matrix.last_axes_view(view.path, moment)
    if isinstance(view, MatrixView):
        return dataclasses.replace(view, dtype=x.dtype)
    return matrix.last_axes_view(view.path, view.source or moment)
