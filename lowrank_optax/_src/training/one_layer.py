"""Updates of some parameters at a time, in place, by an optimizer of all of them."""

import contextlib
import dataclasses
import functools
import inspect
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.interpreters import partial_eval

from lowrank_optax._src.engines.accumulation import AccumulateState
from lowrank_optax._src.engines.order import after
from lowrank_optax._src.leaves.context import one_layer, quietly
from lowrank_optax._src.linalg.meshes import split_axes
from lowrank_optax._src.parts import compatible


class Progress(NamedTuple):
    """How far a backward pass has come.

    Attributes:
      leaves: the parameters by their numbers, some of them new.
      state: the optimizer's arrays.
      squares: the sum of squares of the gradients so far.
      turn: a zero, known when all that was read so far has been.
    """

    leaves: dict[int, jax.Array]
    state: Sequence[jax.Array] = ()
    squares: Any = np.float32(0)
    turn: Any = np.float32(0)


class PartialUpdate:
    """An optimizer's update of some parameters at a time."""

    def __init__(self, tx, params, opt_state, depth):
        self.tx, self.depth = tx, depth
        flat, self.treedef = jax.tree_util.tree_flatten_with_path(params)
        self.names = [tuple(path) for path, _ in flat]
        flat, self.structure = jax.tree_util.tree_flatten_with_path(opt_state)
        self.places = {tuple(path): k for k, (path, _) in enumerate(flat)}
        self.state = [x for _, x in flat]
        _check(tx, opt_state)

    def __call__(self, now: Progress, grads: dict[int, jax.Array], at: Any) -> Progress:
        """Update what has gradients: outer parameters, or those of the layer ``at``."""
        params = {i: now.leaves[i] for i in grads}
        if at is not None:
            params = {i: slice_layer(x, at) for i, x in params.items()}
            grads = {i: g[None] for i, g in grads.items()}
        layer = contextlib.nullcontext() if at is None else one_layer(at, self.depth)
        with layer:
            entries, structure = self._entries(params, at is not None)
            # What all parts share, such as a count, is that of before the step.
            old = [
                slice_layer(now.state[k], at) if stacked else self.state[k]
                for k, stacked in entries
            ]
            own = self._tree(grads), structure.unflatten(old), self._tree(params)
            self._check_shared(*own)
            updates, new = self.tx.update(*own)
        if at is None:
            updates = after_turn(updates, now.turn)
        applied = optax.apply_updates(self._tree(params), updates)
        leaves, state, turn = dict(now.leaves), list(now.state), now.turn
        for i, x in zip(sorted(params), jax.tree.leaves(applied), strict=True):
            leaves[i], turn = _write(leaves[i], x, at, turn)
        # Only now, as the updates are made of what is written over here.
        for (k, stacked), x in zip(entries, jax.tree.leaves(new), strict=True):
            state[k], turn = _write(state[k], x, at if stacked else None, turn)
        return now._replace(leaves=leaves, state=state, turn=turn)

    def _tree(self, leaves: dict[int, Any]) -> Any:
        """A tree of parameters that leaves out the others."""
        missing = optax.MaskedNode()
        return self.treedef.unflatten(
            [leaves.get(i, missing) for i in range(self.treedef.num_leaves)]
        )

    def _entries(self, params: dict[int, Any], in_layer: bool) -> tuple[list, Any]:
        """Numbers of entries in the state, and whether each is a layer's in a stack."""
        shapes = self._tree({i: jax.typeof(x) for i, x in params.items()})
        with quietly():
            part = jax.eval_shape(lambda params: self.tx.init(params), shapes)
        flat, structure = jax.tree_util.tree_flatten_with_path(part)
        entries = []
        for path, x in flat:
            k = self.places.get(tuple(path))
            whole = None if k is None else self.state[k].shape
            stack = (self.depth, *x.shape[1:]) if x.shape[:1] == (1,) else None
            stacked = in_layer and stack is not None and whole == stack
            own = in_layer and jnp.issubdtype(x.dtype, jnp.floating)
            shared = whole == x.shape and not (own and self._within(path, params))
            if not stacked and not shared:
                raise compatible.cannot_use(
                    _NAME,
                    f"the state field '{_readable(path)}' of shape {whole}",
                    _NAME,
                    f"an entry for each layer, such as {stack or 'its own'}, where "
                    "this one is made of the gradients of all layers",
                    "that",
                    "Let `matrices` name rows and columns of stacked matrices, such as "
                    "MatrixAxes(), and None for stacked vectors.",
                )
            entries.append((k, stacked))
        return entries, structure

    def _check_shared(self, grads: Any, state: Any, params: Any) -> None:
        """Refuse a number of the whole model that would be made of a part's gradients.

        Such as D-Adaptation's step size; those of `inject_hyperparams` are not.
        """
        flat = jax.tree_util.tree_leaves_with_path(state)
        everyone = range(len(self.names))
        shared = [
            jnp.issubdtype(x.dtype, jnp.floating) and not self._within(path, everyone)
            for path, x in flat
        ]
        if not any(shared):
            return
        new_state = jax.make_jaxpr(lambda *given: self.tx.update(*given)[1])
        jaxpr = new_state(grads, state, params).jaxpr
        _, used = partial_eval.dce_jaxpr(jaxpr, shared)
        if any(used[: len(jax.tree.leaves(grads))]):
            path, _ = flat[shared.index(True)]
            field = f"the state field '{_readable(path)}'"
            raise compatible.cannot_use(_NAME, field, _NAME, _ONE_LAYER, "that")

    def _within(self, path: Any, numbers: Iterable[int]) -> bool:
        """Whether a place in the state belongs to one of these parameters."""
        names = [self.names[i] for i in numbers]
        return any(
            tuple(path[k : k + len(name)]) == name
            for name in names
            for k in range(len(path))
        )


_NAME = "layerwise.value_and_update"
_AT_ONCE = (
    "that each gradient is used at once and then forgotten, where accumulation keeps "
    "all of them"
)
_STATES = {
    optax.MultiStepsState: _AT_ONCE,
    AccumulateState: _AT_ONCE,
    optax.ApplyIfFiniteState: "an update that is decided on layer by layer",
}
_ONE_LAYER = "an update of one layer that does not depend on the others"
_CLIP = "For a clip by the global norm, give value_and_update its `clip`."
# These of Optax have no state that would tell: a norm of all leaves, or of a stack, or
# random numbers for all.
_MAKERS = {
    "clip_by_global_norm": _CLIP,
    "normalize_by_update_norm": "",
    "clip_by_block_rms": "",
    "adaptive_grad_clip": "",
    "scale_by_trust_ratio": "",
    "add_noise": "All layers would be given the same noise.",
}


def _check(tx: optax.GradientTransformation, opt_state: Any) -> None:
    """Refuse what needs the gradients of several layers, where it can be told."""
    kinds = tuple(_STATES)
    for x in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(x, kinds):
            need = _STATES[type(x)]
            raise compatible.cannot_use(_NAME, type(x).__name__, _NAME, need, "that")
    for maker in _makers(tx.update, set()):
        if maker in _MAKERS:
            remedy = _MAKERS[maker]
            raise compatible.cannot_use(
                _NAME, f"optax.{maker}", _NAME, _ONE_LAYER, "that", remedy
            )


def _makers(x: Any, seen: set[int]) -> Iterator[str]:
    """Names of the functions that made a function, and what it is made of."""
    if id(x) in seen:
        return
    seen.add(id(x))
    if isinstance(x, types.FunctionType):
        yield x.__qualname__.partition(".")[0]
        parts = inspect.getclosurevars(x).nonlocals.values()
    elif isinstance(x, types.MethodType):  # of an engine with its optimizer
        parts = (x.__func__, x.__self__)
    elif dataclasses.is_dataclass(x) and not isinstance(x, type):
        parts = [getattr(x, field.name) for field in dataclasses.fields(x)]
    elif isinstance(x, Mapping):
        parts = x.values()
    else:
        parts = x if isinstance(x, tuple | list) else ()
    for part in parts:
        yield from _makers(part, seen)


def _readable(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def slice_layer(x: jax.Array, at: Any) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, at, 1)


def _write(old: jax.Array, new: jax.Array, at: Any, turn: jax.Array) -> Any:
    """An array with something new in it, once all has been read, and the next turn."""
    if at is None:
        return new, after(turn, new)
    old = _lying(jax.lax.dynamic_update_slice_in_dim(old, new, after(at, turn), 0))
    # Read from where it was written: ``new`` would be computed again, of what may no
    # longer be there.
    return old, after(turn, slice_layer(old, at))


def _lying(stack: jax.Array) -> jax.Array:
    """The stack, which XLA's GPU backend must keep in the order of its axes.

    It would carry weights through the loop in the order that suits a product with one
    layer, and copy whole stacks before it and after: 14.0 GB of temporaries instead of
    2.2 for a step of LLaMA-7B with GaLore. An array that is split over devices XLA
    would gather for this.
    """

    def lie(x):
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    if split_axes(stack):
        return stack
    return jax.lax.platform_dependent(stack, cuda=lie, default=lambda x: x)


def after_turn(tree: Any, turn: jax.Array) -> Any:
    return jax.tree.map(lambda x: after(x, turn), tree)


def end_turn(tree: Any, turn: jax.Array) -> jax.Array:
    """A zero that is known once every array of the tree is."""
    return functools.reduce(after, jax.tree.leaves(tree), turn)
