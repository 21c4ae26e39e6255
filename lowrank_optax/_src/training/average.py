"""Data parallelism in the subspace: devices exchange (r, n) instead of (m, n)."""

from collections.abc import Sequence
from typing import Any

import optax

from lowrank_optax._src.leaves.context import accumulation, averaged_over, quietly
from lowrank_optax._src.leaves.fields import boxed_state
from lowrank_optax._src.training.accumulate import check_engines


def average_gradients(
    tx: optax.GradientTransformation, axis_name: str | Sequence[str]
) -> optax.GradientTransformationExtraArgs:
    r"""Update by the mean of the devices' gradients, exchanged in the subspace.

    For gradients G_1, ..., G_k of the devices' parts of a batch, and the basis P of a
    matrix, which all devices have:

    .. math::
      P \leftarrow \mathrm{select}\Bigl(\tfrac{1}{k} \sum_i G_i\Bigr)
      \text{ when due},\quad
      R = \tfrac{1}{k} \sum_i P^\top G_i,\quad \Delta = s\,P\,\rho(R)

    That is the update by the mean gradient, as ``tx`` makes it of
    ``jax.lax.pmean(grads, axis_name)``. But between refreshes devices exchange ``r n``
    numbers a matrix instead of ``m n``: at rank 128, a 32nd for the matrices of
    LLaMA-7B. Leaves that are not matrices are exchanged whole, and so is the gradient
    of a matrix in a step that renews its basis.

    To be called where each device sees its own gradients by the name of an axis, as in
    `jax.shard_map` or `jax.pmap`, with weights and state that are the same on all. In
    a chain, what comes before the projection acts on each device's own gradient:
    ``clip_by_global_norm`` bounds each of them. A refresh rule that looks at norms of
    gradients (`OnConvergence`) is shown their mean over the devices.

    Args:
      tx: `project_gradients` or what is made of it, alone or inside of chains and
        wrappers, with a recovery that needs no full gradient (`Drop`).
      axis_name: of the devices, one or several.

    Returns:
      A transformation with the state of ``tx``.

    Raises:
      ValueError: at init, for a ``tx`` that projects no gradients, leaves some of the
        parameters to others, keeps moments before the projection, or recovers more than
        is projected.

    >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
    >>> from jax.sharding import AxisType, PartitionSpec as P
    >>> tx = lro.average_gradients(lro.galore_adamw(1e-2, rank=2), "batch")
    >>> params = {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}
    >>> x = jnp.ones((jax.device_count(), 4))
    >>> def loss(params, x):
    ...     return jnp.mean(jnp.square(x @ params["w"] + params["b"]))
    >>> def step(params, state, x):
    ...     local = jax.lax.pcast(params, "batch", to="varying")
    ...     grads = jax.grad(loss)(local, x)  # of this device's rows
    ...     updates, state = tx.update(grads, state, params)
    ...     return optax.apply_updates(params, updates), state
    >>> mesh = jax.make_mesh(
    ...     (jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    >>> step = jax.jit(jax.shard_map(
    ...     step, mesh=mesh, in_specs=(P(), P(), P("batch")), out_specs=P()))
    >>> params, state = step(params, tx.init(params), x)
    >>> params["w"].shape
    (4, 6)
    """
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        with averaged_over(axes):
            with accumulation("start"), quietly():
                check_engines(boxed_state(tx, params), params)
            return tx.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        with averaged_over(axes):
            return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)
