"""What is known of a mesh when tracing, and arithmetic that must not gather on it.

How an array is split is not in its type, but over which axes it may be is. Where there
are none, as on one device and within `jax.shard_map`, nothing is done.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

T = TypeVar("T")


def split_axes(x: Array) -> tuple[str, ...]:
    """The axes of a mesh over which XLA may split an array that is traced."""
    if not isinstance(x, jax.core.Tracer):
        return ()
    mesh = jax.typeof(x).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(a for a, k in kinds if k == AxisType.Auto and mesh.shape[a] > 1)


def devices(x: Array) -> int:
    """How many parts an array may be split into."""
    shape = jax.typeof(x).sharding.mesh.shape
    return math.prod(shape[a] for a in split_axes(x))


def gathered(x: Array) -> Array:
    """A thin array, whole on each device, but for its batch axes.

    Else XLA's GPU backend would exchange what is as large as the weight: the product of
    two factors that the same devices split, or the gradient for a basis.
    """
    if not split_axes(x):
        return x
    batch = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 2)
    spec = PartitionSpec(*batch, None, None)
    return jax.lax.with_sharding_constraint(x, _placed(x, spec))


def whole_product(x: Array) -> Array:
    """A thin product that XLA sums over devices, whole on each.

    It is summed where XLA has it, and told to be whole behind a barrier: else XLA would
    gather what it is made of, as large as the weight.
    """
    return gathered(jax.lax.optimization_barrier(x)) if split_axes(x) else x


def whole_single(y: Float[Array, "b m k"]) -> Float[Array, "b m k"]:
    """A thin matrix whole on each device, see `whole_product`; stacks stay split.

    All sums over its rows are local then, where those of a split one are as many
    collectives. Of a stack of layers it would be as large as a weight.
    """
    return whole_product(y) if len(y) == 1 else y


def whole_each(arrays: Sequence[Array]) -> list[Array]:
    """`gathered` of thin arrays of one leaf, those of equal shapes by one collective.

    XLA's GPU compiler joins gathers itself, that for TPU does not.

    Args:
      arrays: (*batch, m, k) and (*batch, k, n).
    """
    found = dict(enumerate(arrays))
    groups: dict[object, list[int]] = {}
    for i, x in found.items():
        if split_axes(x):
            groups.setdefault((x.shape, x.dtype), []).append(i)
    for members in groups.values():
        *_, m, n = found[members[0]].shape
        short = -1 if m > n else -2  # that of the rank, which is not split
        x = gathered(jnp.concatenate([found[i] for i in members], axis=short))
        found |= zip(members, jnp.split(x, len(members), axis=short), strict=True)
    return list(found.values())


def at_once(arrays: Iterable[Array]) -> list[Array]:
    """Small sums of many leaves; on a mesh, all of them before what needs any.

    XLA makes one collective of those that do not wait for one another. It takes them in
    the order of the program, in which those of a leaf would wait for its own.
    """
    found = list(arrays)
    split = any(map(split_axes, found))
    return jax.lax.optimization_barrier(found) if split else found


def whole_columns(a: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """The same, its columns shared out, so that ``a a^T`` is a sum over the devices.

    Of rows that are split, that product would gather the whole matrix at each device.
    Here a device sends and receives its own part at most.
    """
    axes = split_axes(a)
    if not axes:
        return a
    spec = PartitionSpec(*(None,) * (a.ndim - 1), axes)
    return jax.lax.with_sharding_constraint(a, _placed(a, spec))


def taken(
    x: Float[Array, "*b m h w"], chosen: Int[Array, "*b d"]
) -> Float[Array, "*b m d w"]:
    """Some entries of an axis that devices may share, none twice.

    As a sum of all, of which each device has its part, where the whole array would be
    gathered for a choice.
    """
    if not split_axes(x):
        return jnp.take_along_axis(x, chosen[..., None, :, None], axis=-2)
    places = jnp.arange(x.shape[-2])
    parts = []
    for i in range(chosen.shape[-1]):
        mine = (places == chosen[..., i, None])[..., None, :, None]
        parts.append(jnp.sum(jnp.where(mine, x, 0.0), axis=-2, keepdims=True))
    return jnp.concatenate(parts, axis=-2)


def shape_of(function: Callable[[T], Array], x: T) -> jax.ShapeDtypeStruct:
    """What a function makes of arrays, by shape and type, on the mesh of these.

    `jax.eval_shape` forgets a mesh of Auto axes, and what is traced with such shapes
    would not know that it is on one.
    """
    found = jax.eval_shape(function, x)
    first = next(iter(jax.tree.leaves(x)), None)
    if found.sharding is not None or first is None or not split_axes(first):
        return found
    where = _placed(first, PartitionSpec())
    return jax.ShapeDtypeStruct(found.shape, found.dtype, sharding=where)


# From here on, a matrix is worth dealing out: XLA deals out what it is made of, too, up
# to the gradients, which then change devices.
_WORTH = 512


def shared_out(function: Callable[[Array], T], a: Float[Array, "*b m n"]) -> T:
    """``function(a)``, of which each device takes its part of the stack's matrices.

    Each takes all where they cannot be dealt out evenly, or are small. Results begin
    with the stack's axis.
    """
    axes = split_axes(a)
    if not axes or a.ndim != 3 or a.shape[0] % devices(a) or a.shape[-1] < _WORTH:
        return function(a)
    mesh, spec = jax.typeof(a).sharding.mesh, PartitionSpec(axes)
    shared = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        axis_names=set(axes),
        check_vma=False,
    )
    return shared(a)


def _placed(x: Array, spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(jax.typeof(x).sharding.mesh, spec)
