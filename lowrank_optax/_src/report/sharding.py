"""Shardings of optimizer state, from those of the parameters."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_optax._src.leaves.box import is_box, is_boxed, value_of
from lowrank_optax._src.leaves.fields import boxed_state


def state_shardings(tx: Any, params: Any, mesh: jax.sharding.Mesh) -> Any:
    """Where each array of ``tx.init(params)`` belongs, as a tree of `NamedSharding`.

    For a weight sharded ``(a, b)``, a basis or left factor gets ``(a, None)`` on its
    own shape, moments and right factors ``(None, b)``; batch axes keep theirs; dense
    state follows its parameter, and what belongs to no parameter is replicated. So is
    an array whose shape the spec does not fit (Optax's own factored states).

    Args:
      tx: any Optax transformation, chains and wrappers included.
      params: arrays, or `jax.ShapeDtypeStruct` with shardings, or annotated NNX state.
      mesh: of the result.

    Returns:
      A tree like ``tx.init(params)``, for ``jax.jit(tx.init, out_shardings=...)``.

    >>> import jax, jax.numpy as jnp, lowrank_optax as lro
    >>> from jax.sharding import NamedSharding, PartitionSpec as P
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> spec = NamedSharding(mesh, P("data", None))
    >>> params = {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=spec)}
    >>> tx = lro.mlorc_scale_by_lion(rank=2)
    >>> shardings = lro.state_shardings(tx, params, mesh)
    >>> shardings.inner_state.mu["w"].right.spec
    P(None, 'data')
    """

    def place(x):
        spec = x.out_sharding if is_box(x) and x.out_sharding is not None else ()
        # Of an empty box, one stands for all the arrays in it, which are none.
        shape = getattr(value_of(x), "shape", ())
        return NamedSharding(mesh, _fitting(PartitionSpec(*spec), shape, mesh))

    return jax.tree.map(place, boxed_state(tx, params), is_leaf=is_boxed)


def _fitting(spec: PartitionSpec, shape: tuple[int, ...], mesh) -> PartitionSpec:
    """The spec if it can shard the shape, else none."""
    if len(spec) > len(shape):
        return PartitionSpec()
    for size, names in zip(shape, spec, strict=False):
        names = names if isinstance(names, tuple) else (names,)
        parts = np.prod([mesh.shape[n] for n in names if n is not None], dtype=int)
        if size % parts:
            return PartitionSpec()
    return spec
