"""The calls of a transformation: what comes in is checked here, and nowhere else."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax._src.leaves.box import empty, unbox
from lowrank_optax._src.leaves.context import averaging, left_out, quietly
from lowrank_optax._src.leaves.fields import field_of
from lowrank_optax._src.leaves.paths import (
    Path,
    check_arrays,
    is_array,
    path_parts,
)
from lowrank_optax._src.leaves.placing import (
    beside,
    varying,
    with_auto_axes,
    with_whole_specs,
)


def transformation(
    init: Callable[..., Any], update: Callable[..., tuple[Any, Any]]
) -> optax.GradientTransformationExtraArgs:
    """An optax transformation from an ``init`` and an ``update`` over plain arrays.

    ``update`` never sees boxes, and on a mesh of explicit axes runs with automatic
    ones; what it returns has the structure, boxes and shardings of what came in. Nor
    does it see what has no gradient: where there is None for it, the update is None and
    the state stays. So does that of integers and booleans, whose update is zero.

    Raises:
      TypeError, ValueError: for leaves that are not arrays, gradients that do not fit
        the parameters, and a state that is not of the shapes that ``init`` makes.
    """
    # Traced, as JAX keeps what was, by shapes and by what is said around the call.
    traced_init = jax.jit(init)

    def init_fn(params):
        params = empty(params)
        check_arrays(params)
        return beside(init(with_whole_specs(params)), params)

    def update_fn(updates, state, params=None, **extra):
        given, old, weights, extra = map(unbox, (updates, state, params, extra))
        check_arrays(given)
        grads = _trained(given)
        frozen: dict[Path, jax.ShapeDtypeStruct] = {}
        if weights is not None:
            weights, frozen = _weights(given, weights)

        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), grads)

        def run(grads, state, weights, extra):
            return update(grads, state, weights, **extra)

        with left_out(frozen):
            with quietly():
                expected = traced_init.eval_shape(shapes)
            part, places = _part(old, expected, grads)
            new = with_auto_axes(run, grads, part, weights, extra)
        for made, like in zip(new, (grads, part), strict=True):
            if jax.tree.structure(made) != jax.tree.structure(like):
                raise ValueError(
                    "A transformation changed the structure of its updates or state: "
                    f"{jax.tree.structure(like)} became {jax.tree.structure(made)}."
                )
        kept = jax.tree.leaves(old)
        for place, x in zip(places, jax.tree.leaves(new[1]), strict=True):
            kept[place] = x
        found = iter(jax.tree.leaves(new[0]))
        out = [
            next(found) if _is_trained(x) else _nothing(x)
            for x in jax.tree.leaves(given)
        ]
        return (
            jax.tree.unflatten(jax.tree.structure(updates), out),
            jax.tree.unflatten(jax.tree.structure(state), kept),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_trained(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _trained(grads: Any) -> Any:
    """The gradients, with None for integers and booleans, which have none."""
    return jax.tree.map(lambda x: x if _is_trained(x) else None, grads)


def _nothing(x: Any) -> jax.Array:
    """An update that changes nothing; JAX gives what has no gradient a type of its own.

    No array of that type can be added to a parameter.
    """
    if x.dtype == jax.dtypes.float0:
        return jnp.zeros(x.shape, bool)
    return jnp.zeros_like(x)


def _is_none(x: Any) -> bool:
    return x is None


def _weights(grads: Any, weights: Any) -> tuple[Any, dict[Path, jax.ShapeDtypeStruct]]:
    """The parameters that have a gradient, each of its shape; and shapes of others."""
    frozen: dict[Path, jax.ShapeDtypeStruct] = {}
    trained = _trained(grads)

    def keep(path, grad, weight):
        if grad is not None and _is_trained(grad):
            return weight
        if grad is not None and is_array(weight) and _is_trained(weight):
            raise TypeError(
                f"Cannot update parameter '{_name(path)}' of dtype {weight.dtype} by a "
                f"gradient of dtype {grad.dtype}: it must be floating or complex."
            )
        for below, x in jax.tree_util.tree_flatten_with_path(weight)[0]:
            if is_array(x):
                shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
                frozen[path_parts((*path, *below))] = shape
        return None

    with contextlib.suppress(ValueError):  # said below, by paths
        weights = jax.tree_util.tree_map_with_path(
            keep, grads, weights, is_leaf=_is_none
        )
    if jax.tree.structure(trained) != jax.tree.structure(weights):
        difference = _difference(grads, weights, "gradients", "parameters")
        raise ValueError(
            f"Cannot update parameters by gradients of another tree: {difference}. "
            "Where a parameter has no gradient, give None."
        )
    flat, _ = jax.tree_util.tree_flatten_with_path(trained)
    for (path, g), w in zip(flat, jax.tree.leaves(weights), strict=True):
        if np.shape(g) != np.shape(w):
            raise ValueError(
                f"Cannot update parameter '{_name(path)}' of shape {np.shape(w)} by a "
                f"gradient of shape {np.shape(g)}: the shapes must be equal."
            )
    return weights, frozen


_REMEDY = (
    "Use the transformation that made the state, or begin with tx.init(params); for a "
    "state that lowrank_optax.rank.shrink has cut, the transformation that it returned "
    "or that of lowrank_optax.rank.fit."
)

_CAST = (
    "Where parameters are cast, leave the state as it is; if it has been, cast it back."
)


def _part(state: Any, expected: Any, grads: Any) -> tuple[Any, list[int]]:
    """The entries of a state that are of leaves with gradients, and their places."""
    flat, structure = jax.tree_util.tree_flatten_with_path(state)
    wanted, part = jax.tree_util.tree_flatten_with_path(expected)
    places = list(range(len(flat)))
    if structure != part:
        at = {tuple(path): i for i, (path, _) in enumerate(flat)}
        found = [at.get(tuple(path)) for path, _ in wanted]
        places = [i for i in found if i is not None]
        partial = any(map(_is_none, jax.tree.leaves(grads, is_leaf=_is_none)))
        if not partial or len(places) < len(wanted):
            ours = "what this transformation makes"
            difference = _difference(state, expected, "it", ours)
            raise ValueError(
                f"Cannot use a state of another transformation: {difference}. {_REMEDY}"
            )
    own = [flat[i] for i in places]
    for (path, x), (_, y) in zip(own, wanted, strict=True):
        if np.shape(x) != y.shape:
            shapes = f"has shape {np.shape(x)}", f"have {y.shape}"
            raise ValueError(_misfit(path, *shapes, _REMEDY, grads))
        if _is_narrowed(jnp.result_type(x), y.dtype):
            dtypes = f"is in {jnp.result_type(x)}", f"be in {y.dtype}"
            raise ValueError(_misfit(path, *dtypes, _CAST, grads))
    _check_local(own, grads)
    return part.unflatten([x for _, x in own]), places


def _check_local(state: Any, grads: Any) -> None:
    """Refuse gradients of single devices, which no state in common can be kept by.

    Args:
      state: path and array of each entry.
      grads: of the leaves.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(grads)
    averaged = set(averaging() or ())
    if not any(varying(grad) - averaged for _, grad in flat):
        return
    leaves = {tuple(path): i for i, (path, _) in enumerate(flat)}
    for path, _ in state:
        where = field_of(path, None, leaves)
        if where is not None and (
            axes := sorted(varying(flat[where[1]][1]) - averaged)
        ):
            name, grad = flat[where[1]]
            said = axes[0] if len(axes) == 1 else tuple(axes)
            raise ValueError(
                f"Cannot update parameter '{_name(name)}' by a gradient of shape "
                f"{grad.shape} that differs over the devices of {said!r}. Average "
                f"what are gradients of parts of a batch: jax.lax.pmean(grads, "
                f"{said!r}), or lro.average_gradients, which does it where they are "
                "projected. If each device has a parameter of its own, say "
                "check_vma=False to that jax.shard_map."
            )


def _is_narrowed(dtype: Any, wanted: Any) -> bool:
    """Whether a state that is kept in float32 at least has been cast to less."""
    floating = all(jnp.issubdtype(x, jnp.floating) for x in (dtype, wanted))
    return floating and dtype.itemsize < min(wanted.itemsize, 4)


def _misfit(path: Any, has: str, wanted: str, remedy: str, grads: Any) -> str:
    flat, _ = jax.tree_util.tree_flatten_with_path(grads)
    leaves: Mapping[Any, int] = {tuple(path): i for i, (path, _) in enumerate(flat)}
    field, whose = _name(path), ""
    if (where := field_of(path, None, leaves)) is not None:
        field, i = where
        name, grad = flat[i]
        whose = f" parameter '{_name(name)}' with a gradient of shape {grad.shape}"
    return (
        f"Cannot update{whose}: the state's '{field}' {has}, and must {wanted}. "
        f"{remedy}"
    )


def _difference(a: Any, b: Any, a_name: str, b_name: str) -> str:
    """In which paths two trees differ, in words."""
    flat = [jax.tree_util.tree_flatten_with_path(x)[0] for x in (a, b)]
    ours, theirs = ({_name(path): None for path, _ in x} for x in flat)
    said = [
        f"{name} alone has {', '.join(map(repr, list(only)[:5]))}"
        for name, only in (
            (a_name, [x for x in ours if x not in theirs]),
            (b_name, [x for x in theirs if x not in ours]),
        )
        if only
    ]
    if not said:
        structures = jax.tree.structure(a), jax.tree.structure(b)
        said = [f"{a_name}: {structures[0]}", f"{b_name}: {structures[1]}"]
    return "; ".join(said)


def _name(path: Any) -> str:
    return "/".join(path_parts(path))
