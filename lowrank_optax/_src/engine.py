"""What the three engines share: the wrapper of a transformation, the look into a state.

Boxes (NNX variables) and meshes of explicit axes are handled here and in
`MatrixView.full`, and nowhere else.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._src import matrix, trees


def transformation(
    init: Callable[..., Any], update: Callable[..., tuple[Any, Any]]
) -> optax.GradientTransformationExtraArgs:
    """An optax transformation from an ``init`` and an ``update`` over plain arrays.

    ``update`` never sees boxes, and on a mesh of explicit axes runs with automatic
    ones; what it returns has the structure, boxes and shardings of what came in.
    """

    def update_fn(updates, state, params=None, **extra):
        plain = [_unbox(x) for x in (updates, state, params)]

        def run(updates, state, params):
            return update(updates, state, params, **extra)

        new = _with_auto_axes(run, *plain)
        return tuple(
            jax.tree.unflatten(jax.tree.structure(old), jax.tree.leaves(x))
            for old, x in zip((updates, state), new, strict=True)
        )

    return optax.GradientTransformationExtraArgs(init, update_fn)


def _unbox(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: matrix.value_of(x),
        tree,
        is_leaf=matrix.is_variable,
    )


def _with_auto_axes(run: Any, *args: Any) -> Any:
    """``run(updates, state, params)``, its results sharded as the first two came in."""
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, args[:2])
    if any(matrix.explicit_axes(s.mesh) for s in jax.tree.leaves(shardings)):
        run = jax.sharding.auto_axes(run, out_sharding=shardings)
    return run(*args)


@jax.tree_util.register_pytree_node_class
class _Slot:
    """Stands for the whole parameter tree; has no leaves."""

    def tree_flatten(self):
        return (), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls()


class ParamFields:
    """The fields of an optimizer's state that mirror the parameters' tree.

    Found by initialising the optimizer with a single slot in the place of all
    parameters: wherever the slot comes out again, a tree like the parameters' stands.

    Attributes:
      names: the fields' paths within the state, such as ``"0/mu"``.
    """

    def __init__(self, inner: optax.GradientTransformation):
        slot: Any = _Slot()
        flat, self._treedef = jax.tree_util.tree_flatten_with_path(
            inner.init(slot), is_leaf=lambda x: isinstance(x, _Slot)
        )
        self._where = [i for i, (_, x) in enumerate(flat) if isinstance(x, _Slot)]
        self.names = ["/".join(trees.path_parts(flat[i][0])) for i in self._where]

    def get(self, state: Any, treedef: Any) -> dict[str, list[Any]]:
        """``{name: what stands at each leaf}`` of the parameters' ``treedef``."""
        entries = self._treedef.flatten_up_to(state)
        values = (treedef.flatten_up_to(entries[i]) for i in self._where)
        return dict(zip(self.names, values, strict=True))

    def set(self, state: Any, treedef: Any, fields: dict[str, list[Any]]) -> Any:
        """The state with other values at the parameter leaves of some fields."""
        entries = self._treedef.flatten_up_to(state)
        for i, name in zip(self._where, self.names, strict=True):
            if name in fields:
                entries[i] = treedef.unflatten(fields[name])
        return self._treedef.unflatten(entries)


def increment(step: jax.Array) -> jax.Array:
    """The next step; stays at the largest int32 instead of wrapping around."""
    return jnp.asarray(optax.safe_increment(step))


def last(name: str) -> str:
    """The field's own name at the end of its path."""
    return name.rpartition("/")[2]


def where(accept: jax.Array, new: Any, old: Any) -> Any:
    """``new`` where a scalar (or a predicate a matrix) accepts it, else ``old``."""

    def pick(x, y):
        mask = accept.reshape(accept.shape + (1,) * (x.ndim - accept.ndim))
        return jnp.where(mask, x, y)

    return jax.tree.map(pick, new, old)


def check_rank(rank: Any, name: str = "rank") -> int:
    """A rank as a positive int, or an error that says what would be right."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(
            f"`{name}` must be a Python int, as it decides shapes; got {rank!r} of "
            f"type {type(rank).__name__}. To inject hyperparameters, use "
            "lowrank_optax.inject_hyperparams, which keeps it static."
        )
    if rank < 1:
        raise ValueError(f"`{name}` must be at least 1, got {rank}.")
    return rank
