"""Shardings of optimizer state, from those of the parameters."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_optax._src.leaves.box import is_box, is_boxed, value_of
from lowrank_optax._src.leaves.fields import boxed_state
from lowrank_optax._src.leaves.paths import flatten, labels
from lowrank_optax._src.leaves.placing import fitting, names, place_by_rules


def state_shardings(tx: Any, params: Any, mesh: jax.sharding.Mesh) -> Any:
    """Where each array of ``tx.init(params)`` belongs, as a tree of `NamedSharding`.

    For a weight sharded ``(a, b)``, a basis or left factor gets ``((a, b), None)`` on
    its own shape, moments and right factors ``(None, (b, a))``: thin arrays are split
    along their long side by all that splits the weight, its own axis first, or by that
    alone within ``split_states("own")``. Batch axes keep theirs, dense state follows
    its parameter, and what belongs to no parameter is replicated, as are Optax's own
    factored states. What does not divide an axis splits another one, or none.

    Args:
      tx: any Optax transformation, chains and wrappers included.
      params: arrays, or `jax.ShapeDtypeStruct` with shardings, or annotated in boxes,
        as NNX state and Linen's `nn.Partitioned` are. Logical names go by the rules of
        the boxes or of `flax.linen.logical_axis_rules`.
      mesh: of the result; the kind of memory is the parameter's.

    Returns:
      A tree like ``tx.init(params)``, for ``jax.jit(tx.init, out_shardings=...)``.
      Without, a compiled ``init`` knows nothing of where parameters lie on automatic
      axes, and XLA puts its arrays where it likes, most often whole on every device.

    Raises:
      ValueError: where a parameter's spec names an axis that the mesh does not have,
        or leaves one unconstrained.

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

    paths, leaves, _ = flatten(params)
    for name, leaf in zip(labels(paths), leaves, strict=True):
        _check_axes(name, leaf, mesh)

    def place(x):
        spec = x.out_sharding if is_box(x) and x.out_sharding is not None else ()
        # Of an empty box, one stands for all the arrays in it, which are none.
        shape = getattr(value_of(x), "shape", ())
        spec = PartitionSpec(*fitting(spec, shape, mesh))
        kind = x.memory_kind if is_box(x) else None
        return NamedSharding(mesh, spec, memory_kind=kind)

    return jax.tree.map(place, boxed_state(tx, params, mesh), is_leaf=is_boxed)


def _check_axes(name: str, leaf: Any, mesh: jax.sharding.Mesh) -> None:
    """Refuse a spec that does not say on which axes of the mesh a parameter is."""
    place = place_by_rules(leaf)
    spec = PartitionSpec(*(place.spec if place else ()))
    cannot = f"Cannot place the state of parameter '{name}' sharded as {spec}: "
    for entry in spec:
        if entry is PartitionSpec.UNCONSTRAINED:
            raise ValueError(
                f"{cannot}UNCONSTRAINED leaves an axis to the compiler. Give the axes "
                "of the mesh that split it, or None."
            )
        for axis in names(entry):
            if axis not in mesh.shape:
                raise ValueError(
                    f"{cannot}the mesh has no axis '{axis}', but {mesh.axis_names}. "
                    "Pass the mesh of the parameters or, if they are annotated with "
                    "logical names, call this within `flax.linen.logical_axis_rules`."
                )
