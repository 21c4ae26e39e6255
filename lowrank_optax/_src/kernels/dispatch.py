"""Which implementation of the update passes is used: plain XLA or Pallas kernels."""

import contextlib
import functools
from collections.abc import Callable
from typing import Literal, TypeVar, get_args

import jax
import jax.numpy as jnp

from lowrank_optax._src.leaves.warn import warn
from lowrank_optax._src.linalg.meshes import split_axes

Tier = Literal["auto", "xla", "pallas"]
T = TypeVar("T")

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
        that fits its shapes, and on GPU for small matrices. "xla" for none. "auto", the
        default, for the kernels where XLA can take them: on one device, and within a
        `jax.shard_map` or `jax.pmap`, as it cannot partition a kernel over several. A
        GPU must be an Ampere or newer, as Triton wants it.
        They move less memory than its loops for a layer of LLaMA-7B, in fewer launches,
        by the counts of the compilers for H100 and TPU v5e. On a mesh, "pallas" can be
        chosen within those two only.

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
    return _tier(tier)


def interpreted(platform: str) -> contextlib.AbstractContextManager[None]:
    """The kernels of "cuda" or "tpu", interpreted on any device: for tests."""
    return _tier(f"interpret {platform}")


def active(grad: jax.Array) -> bool:
    """Whether kernels are wanted for a gradient.

    Modules of kernels are imported only then: Pallas takes its time to import, and need
    not be there otherwise.

    Raises:
      ValueError: if they are where XLA would have to partition them.
    """
    if _tier.value == "auto":
        return _on_one("gpu", "tpu")
    axes = split_axes(grad)
    if _tier.value != "xla" and axes:
        raise ValueError(
            f"Cannot use Pallas kernels for a gradient of shape {grad.shape} on a mesh "
            f"with the axes {', '.join(axes)}: XLA cannot partition a kernel, and "
            "would gather the whole gradient on each device. Update within a "
            "jax.shard_map over these axes, or choose "
            'lowrank_optax.kernels.dispatch("auto") or "xla".'
        )
    return _tier.value != "xla"


def _on_one(*backends: str) -> bool:
    """Whether it is a program of one device that is traced, with nothing to split.

    Shardings of arguments are not known when tracing: a process of several devices may
    split anything, but for what is inside of `jax.shard_map`.
    """
    if jax.default_backend() not in backends:
        return False
    inside = jax.sharding.get_abstract_mesh().are_all_axes_manual
    return (inside or jax.device_count() == 1) and _takes_kernels(
        jax.local_devices()[0]
    )


@functools.cache
def _takes_kernels(device: jax.Device) -> bool:
    """Triton takes GPUs since Ampere: no V100, and no T4."""
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return not major.isdigit() or int(major) >= 8


def by_platform(run: Callable[[str, bool], T], plain: Callable[[], T]) -> T:
    """What ``run(platform, interpret)`` makes, for what is compiled for.

    Args:
      run: makes it by kernels of "cuda" or "tpu", which may be interpreted.
      plain: makes it without kernels, on other platforms.
    """
    _, _, platform = _tier.value.partition("interpret ")
    if platform:
        return run(platform, True)
    kernels = {x: functools.partial(run, x, False) for x in ("cuda", "tpu")}
    # With "pallas", kernels are not silently left out: Pallas says what is wrong.
    default = plain if _tier.value == "auto" else kernels["tpu"]
    return jax.lax.platform_dependent(**kernels, default=default)


def on_gpu(
    kernel: Callable[[jax.Array, bool], T],
    cpu: Callable[[jax.Array], T],
    plain: Callable[[jax.Array], T],
    small: jax.Array,
) -> T:
    """What is made of small matrices, by a kernel for GPU where kernels are wanted.

    Args:
      kernel: takes matrices in float32, and whether it is interpreted.
      cpu, plain: take them without kernels, on CPU and elsewhere.
      small: the matrices. Where XLA would have to partition the kernel, it is not used.
    """
    if _tier.value == "auto":
        wanted = _on_one("gpu")
    else:
        wanted = _tier.value in ("pallas", "interpret cuda") and not split_axes(small)
    if not wanted or not small.size or small.dtype != jnp.float32:
        return jax.lax.platform_dependent(small, cpu=cpu, default=plain)
    if _tier.value == "interpret cuda":
        return kernel(small, True)
    cuda = functools.partial(_compiled, kernel)
    return jax.lax.platform_dependent(small, cpu=cpu, cuda=cuda, default=plain)


def _compiled(kernel: Callable[[jax.Array, bool], T], small: jax.Array) -> T:
    return kernel(small, False)


def warn_of_xla(platform: str, name: str, shape: tuple[int, ...]) -> None:
    """Say that a kernel fits no shape such as this one, if it is this platform's.

    Kernels are traced for all platforms, whatever is compiled for later.
    """
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if platform == here or _tier.value == f"interpret {platform}":
        warn(
            f"The kernel {name} has no tiles that fit the fast memory of {platform} "
            f"for matrices of shape {shape}: plain XLA takes them."
        )
