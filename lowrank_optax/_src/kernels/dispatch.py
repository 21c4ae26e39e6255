"""Which implementation of the update passes is used: plain XLA or Pallas kernels."""

import contextlib
import functools
from collections.abc import Callable
from typing import Literal, TypeVar, get_args

import jax

from lowrank_optax._src.leaves.warn import warn
from lowrank_optax._src.linalg.meshes import split_axes
from lowrank_optax._src.linalg.tier import chosen, wanted

Tier = Literal["auto", "xla", "pallas"]
T = TypeVar("T")


def dispatch(tier: Tier) -> contextlib.AbstractContextManager[None]:
    """Choose the implementation of the update passes within a ``with`` block.

    It counts where an update is traced, and is part of the key of each compilation: the
    same compiled step under another tier is compiled anew. States and results are those
    of "xla", up to rounding.

    Args:
      tier: "pallas" for the kernels, on GPU (by Triton) and TPU, where a pass has one
        that fits its shapes, and on GPU for small matrices. "xla" for none. "auto", the
        default, for the kernels where XLA can take them: on one device, and within a
        `jax.shard_map` or `jax.pmap`, as it cannot partition a kernel over several; a
        GPU must be an Ampere or newer, as Triton wants it. By the counts of the
        compilers for a layer of LLaMA-7B, they move less memory than its loops, in
        fewer launches, on an H100, and on a TPU v5e those of MLorc. Those of 8-bit Adam
        move as much there, or a fifth more in bfloat16, in a hundredth of the
        operations. On a mesh, "pallas" can be chosen within those two only.

    Returns:
      A context manager.

    Raises:
      ValueError: for another tier; in an update of gradients on a mesh, for "pallas"
        outside of `jax.shard_map`.

    >>> import jax, jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.mlorc_scale_by_adam(rank=2)
    >>> params = {"w": jnp.ones((64, 96))}
    >>> with lro.kernels.dispatch("xla"):
    ...     updates, state = jax.jit(tx.update)(params, tx.init(params))
    """
    if tier not in get_args(Tier):
        names = ", ".join(map(repr, get_args(Tier)))
        raise ValueError(f"`tier` must be one of {names}, got {tier!r}.")
    return chosen(tier)


def interpreted(platform: str) -> contextlib.AbstractContextManager[None]:
    """The kernels of "cuda" or "tpu", interpreted on any device: for tests."""
    return chosen(f"interpret {platform}")


def active(grad: jax.Array) -> bool:
    """Whether kernels are wanted for a gradient.

    Modules of kernels are imported only then: Pallas takes its time to import, and need
    not be there otherwise.

    Raises:
      ValueError: if they are where XLA would have to partition them.
    """
    axes = split_axes(grad)
    if chosen.value not in ("auto", "xla") and axes:
        raise ValueError(
            f"Cannot use Pallas kernels for a gradient of shape {grad.shape} on a mesh "
            f"with the axes {', '.join(axes)}: XLA cannot partition a kernel, and "
            "would gather the whole gradient on each device. Update within a "
            "jax.shard_map over these axes, or choose "
            'lowrank_optax.kernels.dispatch("auto") or "xla".'
        )
    return wanted("gpu", "tpu")


def by_platform(run: Callable[[str, bool], T], plain: Callable[[], T]) -> T:
    """What ``run(platform, interpret)`` makes, for what is compiled for.

    Args:
      run: makes it by kernels of "cuda" or "tpu", which may be interpreted.
      plain: makes it without kernels, on other platforms.
    """
    _, _, platform = chosen.value.partition("interpret ")
    if platform:
        return run(platform, True)
    kernels = {x: functools.partial(run, x, False) for x in ("cuda", "tpu")}
    # With "pallas", kernels are not silently left out: Pallas says what is wrong.
    default = plain if chosen.value == "auto" else kernels["tpu"]
    return jax.lax.platform_dependent(**kernels, default=default)


def warn_of_xla(platform: str, name: str, shape: tuple[int, ...]) -> None:
    """Say that a kernel fits no shape such as this one, if it is this platform's.

    Kernels are traced for all platforms, whatever is compiled for later.
    """
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if platform == here or chosen.value == f"interpret {platform}":
        warn(
            f"The kernel {name} has no tiles that fit the fast memory of {platform} "
            f"for matrices of shape {shape}: plain XLA takes them."
        )
