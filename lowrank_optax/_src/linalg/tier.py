"""Whether kernels are wanted, and those of small matrices where they are."""

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


def wanted(*backends: str) -> bool:
    """Whether kernels are wanted by what is chosen, or, with "auto", on these backends.

    There, for a program of one device, with nothing to split. Shardings of arguments
    are not known when tracing: a process of several devices may split anything, but for
    what is inside of `jax.shard_map`.
    """
    if chosen.value != "auto":
        return chosen.value != "xla"
    if jax.default_backend() not in backends:
        return False
    inside = jax.sharding.get_abstract_mesh().are_all_axes_manual
    return (inside or jax.device_count() == 1) and _is_new(jax.local_devices()[0])


def _is_new(device: jax.Device) -> bool:
    """Whether Triton takes it: of CUDA's since Ampere, no V100, and no T4."""
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
    kernels = {}
    suits = small.size and small.dtype == jnp.float32 and not split_axes(small)
    if suits and wanted("gpu") and chosen.value != "interpret tpu":
        if chosen.value == "interpret cuda":
            return kernel(small, True)
        kernels["cuda"] = lambda small: kernel(small, False)
    return jax.lax.platform_dependent(small, cpu=cpu, default=plain, **kernels)
