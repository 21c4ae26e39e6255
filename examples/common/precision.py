"""Low-precision weights with an optimizer in float32."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer with state and arithmetic in float32, whatever the weights are of.

    Optax keeps moments in the type of the parameters, and in bfloat16 a second moment
    that is multiplied by 0.999 stays as it is. The updates are of float32 too:
    `optax.apply_updates` rounds only the sum.
    """

    def wide(tree: Any) -> Any:
        return jax.tree.map(_wide, tree)

    def init(params: Any) -> Any:
        return tx.init(wide(params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return tx.update(wide(updates), state, wide(params))

    return optax.GradientTransformation(init, update)


def _wide(x: Any) -> Any:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
