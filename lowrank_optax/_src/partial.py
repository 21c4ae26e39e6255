"""Updates of some parameters at a time, in place, by an optimizer of all of them."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax._src import compatible, random, trees
from lowrank_optax._src.accumulate import AccumulateState
from lowrank_optax._src.batching import after


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
        _check_state(opt_state)

    def __call__(self, now: Progress, grads: dict[int, jax.Array], at: Any) -> Progress:
        """Update what has gradients: outer parameters, or those of the layer ``at``."""
        in_layer = at is not None
        params = {i: now.leaves[i] for i in grads}
        if in_layer:
            params = {i: slice_layer(x, at) for i, x in params.items()}
            grads = {i: g[None] for i, g in grads.items()}
        entries, structure = self._entries(params, in_layer)
        # What all parts share, such as a count, is that of before the step for each.
        old = [
            slice_layer(now.state[k], at) if s else self.state[k] for k, s in entries
        ]
        with random.place_in_stack(at if in_layer else 0):
            updates, new = self.tx.update(
                self._tree(grads), structure.unflatten(old), self._tree(params)
            )
        leaves, state = dict(now.leaves), list(now.state)
        if not in_layer:
            updates = after_turn(updates, now.turn)
        applied = optax.apply_updates(self._tree(params), updates)
        written = dict(zip(sorted(params), jax.tree.leaves(applied), strict=True))
        put = functools.partial(_put, after(at, now.turn)) if in_layer else None
        for i, x in written.items():
            leaves[i] = put(leaves[i], x) if put else x
        for (k, stacked), x in zip(entries, jax.tree.leaves(new), strict=True):
            state[k] = put(state[k], x) if put and stacked else x
        return now._replace(
            leaves=leaves, state=state, turn=end_turn(written, now.turn)
        )

    def _tree(self, leaves: dict[int, Any]) -> Any:
        """A tree of parameters that leaves out the others."""
        missing = optax.MaskedNode()
        return self.treedef.unflatten(
            [leaves.get(i, missing) for i in range(self.treedef.num_leaves)]
        )

    def _entries(self, params: dict[int, Any], in_layer: bool) -> tuple[list, Any]:
        """Numbers of entries in the state, and whether each is a layer's in a stack."""
        shapes = self._tree({i: jax.typeof(x) for i, x in params.items()})
        with trees.quietly():
            part = jax.eval_shape(lambda params: self.tx.init(params), shapes)
        flat, structure = jax.tree_util.tree_flatten_with_path(part)
        entries = []
        for path, x in flat:
            k = self.places.get(tuple(path))
            whole = None if k is None else self.state[k].shape
            stack = (self.depth, *x.shape[1:]) if x.shape[:1] == (1,) else None
            stacked = in_layer and stack is not None and whole == stack
            shared = whole == x.shape and not (in_layer and self._belongs(path, x))
            if not stacked and not shared:
                field = jax.tree_util.keystr(path, simple=True, separator="/")
                raise compatible.cannot_use(
                    _NAME,
                    f"the state field '{field}' of shape {whole}",
                    "it",
                    f"state of the shape {stack or x.shape}, stacked as the layers are",
                    "that",
                    "Let `matrices` name rows and columns of stacked matrices, such as "
                    "MatrixAxes(), and None for stacked vectors.",
                )
            entries.append((k, stacked))
        return entries, structure

    def _belongs(self, path: Any, x: Any) -> bool:
        """Whether it is a number that follows the gradients of a parameter."""
        inside = any(
            tuple(path[k : k + len(name)]) == name
            for name in self.names
            for k in range(len(path))
        )
        return inside and jnp.issubdtype(x.dtype, jnp.floating)


_NAME = "layerwise.value_and_update"
_NEEDS = {
    optax.MultiStepsState: "that each gradient is used at once and then forgotten, "
    "where accumulation keeps all of them",
    AccumulateState: "that each gradient is used at once and then forgotten, "
    "where accumulation keeps all of them",
    optax.ApplyIfFiniteState: "an update that is decided on layer by layer",
}


def _check_state(opt_state: Any) -> None:
    kinds = tuple(_NEEDS)
    for x in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(x, kinds):
            need = _NEEDS[type(x)]
            raise compatible.cannot_use(_NAME, type(x).__name__, _NAME, need, "that")


def slice_layer(x: jax.Array, at: Any) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, at, 1)


def _put(at: Any, stack: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(stack, x, at, 0)


def after_turn(tree: Any, turn: jax.Array) -> Any:
    return jax.tree.map(lambda x: after(x, turn), tree)


def end_turn(tree: Any, turn: jax.Array) -> jax.Array:
    """A zero that is known once every array of the tree is."""
    return functools.reduce(after, jax.tree.leaves(tree), turn)
