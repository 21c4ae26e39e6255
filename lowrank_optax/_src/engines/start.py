"""At which numbers moments start, as codes start at zero."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._src.leaves.box import is_variable, value_of
from lowrank_optax._src.leaves.context import is_quiet, quietly
from lowrank_optax._src.leaves.fields import StateFields, Where


def largest_of_small(
    inner: optax.GradientTransformation,
    fields: StateFields,
    whole: Any,
    where: Iterable[Where],
) -> dict[Where, float]:
    """The largest numbers of moments, told by parameters of one number each.

    For an ``init`` that is traced, of which no number can be looked at.
    """
    if is_quiet():
        return {}
    leaves, treedef = jax.tree.flatten(whole, is_leaf=is_variable)
    arrays = map(value_of, leaves)
    try:
        with jax.ensure_compile_time_eval(), quietly():
            ones = [jnp.zeros((1,) * x.ndim, x.dtype) for x in arrays]
            small = treedef.unflatten(ones)
            entries = fields.layout(small).get(inner.init(small))
            return {
                w: float(jnp.max(jnp.abs(value_of(entries[w]))))
                for w in where
                if w in entries
            }
    except Exception:  # such parameters cannot be had: heads that divide an axis
        return {}


def check_start(
    largest: Mapping[Where, jax.Array | float], views: Sequence[Any]
) -> None:
    """Refuse to compress what does not start at zero, as codes do."""
    for (name, i), x in largest.items():
        if x > 0:
            raise ValueError(
                f"Cannot compress the state field '{name}' of parameter "
                f"'{views[i].path}': it starts at {x:.3g}, and codes start "
                "at zero. Let the inner optimizer start it at zero."
            )
