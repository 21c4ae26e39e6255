"""Which implementation of the update passes is used: plain XLA or Pallas kernels."""

import contextlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

Tier = Literal["auto", "xla", "pallas"]

# JAX keeps the value in the key of each compilation: a change of it never meets a body
# that was compiled before, and it is local to a thread.
_tier = jax.make_user_context(default_value="auto")


def dispatch(tier: Tier) -> contextlib.AbstractContextManager[None]:
    """Choose the implementation of the update passes within a ``with`` block.

    It counts where an update is traced, and is part of the key of each compilation: the
    same compiled step under another tier is compiled anew. States and results are those
    of "xla", up to rounding.

    Args:
      tier: "pallas" for the kernels, on GPU (by Triton) and TPU, where a pass has one
        that fits its shapes. "xla" for none. "auto", the default, for what is known to
        be the faster: "xla" on every device so far, as no kernel was timed on one yet.
        XLA cannot partition a kernel over several devices: there, choose "pallas"
        within a `jax.shard_map` only.

    Returns:
      A context manager.

    Raises:
      ValueError: for another tier.

    >>> import jax, jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.mlorc_scale_by_adam(rank=2)
    >>> params = {"w": jnp.ones((64, 96))}
    >>> with lro.kernels.dispatch("xla"):
    ...     updates, state = jax.jit(tx.update)(params, tx.init(params))
    """
    if tier not in get_args(Tier):
        names = ", ".join(map(repr, get_args(Tier)))
        raise ValueError(f"`tier` must be one of {names}, got {tier!r}.")
    return _tier(tier)


def interpreted(platform: str) -> contextlib.AbstractContextManager[None]:
    """The kernels of "cuda" or "tpu", interpreted on any device: for tests."""
    return _tier(f"interpret {platform}")


def active() -> bool:
    """Whether kernels are wanted in what is being traced.

    Modules of kernels are imported only then: Pallas takes its time to import, and need
    not be there otherwise.
    """
    return _tier.value not in ("auto", "xla")


def by_platform(run: Callable[..., Any], *arrays: Any) -> list[Any]:
    """The list of ``run(platform, interpret, *arrays)`` for what is compiled for."""

    def on(platform, interpret=False):
        return lambda *arrays: list(run(platform, interpret, *arrays))

    _, _, platform = _tier.value.partition("interpret ")
    if platform:
        return on(platform, True)(*arrays)
    # Elsewhere kernels are not silently left out: Pallas says what is wrong.
    tpu = on("tpu")
    return jax.lax.platform_dependent(*arrays, cuda=on("cuda"), tpu=tpu, default=tpu)
