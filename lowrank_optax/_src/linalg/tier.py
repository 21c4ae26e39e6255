"""Whether kernels are wanted, and those of small matrices where they are."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from lowrank_optax._src.linalg.meshes import split_axes

T = TypeVar("T")

# What `kernels.dispatch` chooses, or "interpret " and a platform. JAX keeps the value
# in the key of each compilation: a change of it never meets a body that was compiled
# before, and it is local to a thread.
chosen = jax.make_user_context(default_value="auto")


def on_one(*backends: str) -> bool:
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
    if chosen.value == "auto":
        wanted = on_one("gpu")
    else:
        wanted = chosen.value in ("pallas", "interpret cuda") and not split_axes(small)
    if not wanted or not small.size or small.dtype != jnp.float32:
        return jax.lax.platform_dependent(small, cpu=cpu, default=plain)
    if chosen.value == "interpret cuda":
        return kernel(small, True)
    cuda = functools.partial(_compiled, kernel)
    return jax.lax.platform_dependent(small, cpu=cpu, cuda=cuda, default=plain)


def _compiled(kernel: Callable[[jax.Array, bool], T], small: jax.Array) -> T:
    return kernel(small, False)
