"""A boxed abstract parameter, by which optimizer state is traced back to its source."""

import dataclasses
from typing import Any

import jax

from lowrank_optax._src import matrix, trees


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ParamBox:
    """An array with the path of the parameter that it belongs to and a spec.

    Speaks the part of the NNX variable's interface that the library knows, so whatever
    state a transformation makes beside a parameter comes out in a box of its path.
    """

    value: Any
    path: str = dataclasses.field(metadata={"static": True})
    out_sharding: tuple[Any, ...] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    def get_value(self):
        return self.value

    def get_metadata(self):
        return {"out_sharding": self.out_sharding}

    def replace(self, value, **changes):
        return dataclasses.replace(self, value=value, **changes)


def boxed_state(tx: Any, params: Any) -> Any:
    """``tx.init(params)`` by shapes alone, arrays boxed with their parameter's path."""
    paths, leaves, treedef = trees.flatten(params)
    boxes = []
    for parts, leaf in zip(paths, leaves, strict=True):
        spec, _ = matrix.leaf_spec(leaf)
        x = matrix.value_of(leaf)
        x = jax.ShapeDtypeStruct(x.shape, x.dtype)
        boxes.append(ParamBox(x, "/".join(parts), spec))
    # A function of its own, or JAX would answer from memory what is recorded and
    # limited anew at every call.
    return jax.eval_shape(lambda params: tx.init(params), treedef.unflatten(boxes))


def is_box(x: Any) -> bool:
    return isinstance(x, ParamBox)
