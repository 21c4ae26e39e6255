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
      tier: "pallas" for the kernels where a pass has one that fits its shapes; GPU
        (Triton) and TPU only. "xla" for none. "auto", the default, for the kernels on a
        single GPU or TPU: XLA cannot partition a kernel over several devices. Within a
        `jax.shard_map`, where it need not, choose "pallas".

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
    """Whether kernels are wanted in what is being traced."""
    if _tier.value == "auto":
        return jax.default_backend() in ("gpu", "tpu") and jax.device_count() == 1
    return _tier.value != "xla"


def by_platform(run: Callable[..., Any], *arrays: Any) -> list[Any]:
    """The list of ``run(platform, interpret, *arrays)`` for what is compiled for.

    ``platform`` is "cuda", "tpu", or "xla" for any other.
    """
    kind, _, platform = _tier.value.partition(" ")

    def on(platform, interpret=False):
        return lambda *arrays: list(run(platform, interpret, *arrays))

    if platform:
        return on(platform, True)(*arrays)
    # Asked for by name, kernels are not silently left out: Pallas says what is wrong.
    other = on("tpu" if kind == "pallas" else "xla")
    return jax.lax.platform_dependent(
        *arrays, cuda=on("cuda"), tpu=on("tpu"), default=other
    )
