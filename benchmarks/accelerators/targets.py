"""The devices that programs are compiled for, which need not be there."""

from dataclasses import dataclass
from typing import Literal

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

Platform = Literal["cuda", "tpu"]

# As XLA describes an H100 on which it runs.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
runtime_version { major: 13 }
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclass(frozen=True)
class Target:
    """A device.

    Attributes:
      platform: JAX's name of its kind.
      topology: which devices are asked for; only the first is used.
      bandwidth: of its memory, bytes in a second.
      launch: seconds that a launch takes; what a TPU does is one program.
    """

    platform: Platform
    topology: str
    bandwidth: float
    launch: float = 0.0


TARGETS = {
    "h100": Target("cuda", "1x1x1", 3.35e12, 3e-6),
    "v5e": Target("tpu", "v5e:2x2", 0.82e12),
    "v6e": Target("tpu", "v6e:2x2", 1.64e12),
    "v5p": Target("tpu", "v5p:2x2x1", 2.77e12),
}


def environment(target: str) -> dict[str, str]:
    """The variables of a process that compiles for a target, set before it starts.

    Of "cpu", eight simulated devices.
    """
    variables = {"JAX_PLATFORMS": "cpu"}
    if target == "cpu":
        # Nothing runs there: machine code need not be good.
        flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes"
        return variables | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {flags}=true"
        }
    if TARGETS[target].platform == "cuda":
        # Autotuning would measure kernels on the device.
        return variables | {"XLA_FLAGS": "--xla_gpu_autotune_level=0"}
    return variables | {
        "TPU_SKIP_MDS_QUERY": "1",  # no machine of a cloud is asked what it is
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    }


def devices(target: str, topology: str) -> list[jax.Device]:
    """The devices of a topology, which need not be there."""
    if TARGETS[target].platform == "cuda":
        found = topologies.get_topology_desc(
            target, "cuda", target_config=_H100, topology=topology
        )
    else:
        found = topologies.get_topology_desc(topology, "tpu")
    return list(found.devices)


def sharding(target: str) -> SingleDeviceSharding:
    """Where arrays of a program for a target are: on one device of its kind."""
    return SingleDeviceSharding(devices(target, TARGETS[target].topology)[0])
