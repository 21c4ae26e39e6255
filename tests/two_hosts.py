"""A program for two processes of a device each, run by `test_many_devices.py`.

No process has more than a part of an array: ranks are shrunk all the same.
"""

import sys

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro


def main(address, process):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=int(process))
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, P(None, "x"))
    part = np.ones((16, 12), np.float32)
    params = {"kernel": jax.make_array_from_callback((16, 24), place, lambda _: part)}
    tx = lro.adaptive_rank(optax.scale_by_adam(), max_rank=8)
    state = tx.init(params)
    basis = state.basis["kernel"]
    basis = jax.jit(lambda x: x.at[:, :3].set(1.0), out_shardings=basis.sharding)(basis)
    assert not (basis.is_fully_addressable or basis.is_fully_replicated)
    state = state._replace(basis={"kernel": basis})
    tx, small = lro.rank.shrink(tx, state, params, multiple_of=2)
    assert small.basis["kernel"].shape == (24, 4)  # of the long side
    assert small.inner_state.mu["kernel"].shape == (4, 16)
    # As the examples go on: placed anew, and stepped.
    small = jax.device_put(small, lro.state_shardings(tx, params, mesh))
    updates, new = jax.jit(tx.update)(params, small, params)
    assert new.basis["kernel"].shape == (24, 4) and updates["kernel"].shape == (16, 24)


if __name__ == "__main__":
    main(*sys.argv[1:])
