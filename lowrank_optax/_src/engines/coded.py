"""The codes of single moments: how each is seen, measured, encoded and decoded."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lowrank_optax._src.leaves import matrix
from lowrank_optax._src.leaves.box import value_of
from lowrank_optax._src.leaves.context import layer_depth
from lowrank_optax._src.leaves.fields import Where, by_field
from lowrank_optax._src.leaves.keys import matrix_keys
from lowrank_optax._src.leaves.matrix import MatrixView
from lowrank_optax._src.parts.laws import Codec
from lowrank_optax._src.parts.part import compiled

# Smaller leaves stay as they are under an element-wise codec (int8, cast).
ELEMENTWISE_MIN_SIZE = 4096

Coded = dict[Where, tuple[Codec, MatrixView]]


def decode(coded: Coded, w: Where, code: Any) -> Any:
    """A moment at full size, as the inner optimizer knows it."""
    if w not in coded:
        return code
    codec, view = coded[w]
    return view.leaf(_decode(codec, code))


@compiled
def _decode(codec, code):
    return codec.decode(code)


def measured_by(coded: Coded, found: Mapping[int, Any]) -> dict[Where, Any]:
    """What codecs measure of the moments before they encode them."""
    return {
        w: _measure(coded[w][0], coded[w][1].matrix(x))
        for w, x in by_field(found).items()
        if w in coded and hasattr(coded[w][0], "measure")
    }


@compiled
def _measure(codec, x):
    return codec.measure(x)


@compiled
def encode_by(codec, measured, x):
    return codec.encode_by(measured, x)


@compiled
def encode(parts, seed, step, x, old):
    codec, field, batch = parts
    return codec.encode(matrix_keys(seed, step, batch, field), x, old)


def is_elementwise(codec: Codec) -> bool:
    return getattr(codec, "elementwise", False)


def code_view(codec: Codec, view: Any, leaf: Any) -> MatrixView | None:
    """How a codec sees a moment, or None where it stays as it is."""
    moment = value_of(leaf)
    if not jnp.issubdtype(moment.dtype, jnp.floating):
        return None
    if is_elementwise(codec):
        if moment.size * layer_depth() < ELEMENTWISE_MIN_SIZE:
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
