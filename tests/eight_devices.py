"""A program for eight simulated devices, run by `test_many_devices.py`.

States are split by all axes of a mesh, updated there and equal to those of one device;
saved by Orbax while they are trained on, and restored onto fewer devices; and shrunk.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from page import run_sections
from running import assert_close, random_grads, random_like, run

import lowrank_optax as lro
from benchmarks import equality, faults

MATRICES = lro.MatrixAxes()
SHAPES = {"up": (16, 24), "layers": (2, 24, 16), "bias": (16,)}
SPECS = {"up": P("a", "b"), "layers": P("b", "a", None), "bias": P(("a", "b"))}
PARAMS = random_like(SHAPES, 0)
GRADS = random_grads(PARAMS, 2)
# A subspace, factors, codes: what lies in another way.
METHODS = {
    "galore": lro.galore_project(
        optax.scale_by_adam(), rank=2, update_every=1, matrices=MATRICES
    ),
    # Heads that devices share, and single entries.
    "heads": lro.project_gradients(
        optax.scale_by_adam(),
        rank=4,
        subspace=lro.CrossHead(8),
        side="left",
        refresh=lro.Every(1),
        transfer=lro.Rotate(),
        recovery=lro.SparseResidual(0.1, warmup=1),
        matrices=MATRICES,
    ),
    "mlorc": lro.mlorc_scale_by_lion(2, matrices=MATRICES),
    "adafactor": lro.scale_by_adafactor(),
}


def mesh_of(*shape, kind=AxisType.Auto):
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(shape, ("a", "b"), axis_types=(kind,) * 2, devices=devices)


def place(tree, mesh):
    return {
        k: jax.device_put(x, NamedSharding(mesh, SPECS[k])) for k, x in tree.items()
    }


def abstract(tx, params, mesh):
    """What the state is, and where."""
    shapes = jax.eval_shape(tx.init, jax.tree.map(np.asarray, params))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        lro.state_shardings(tx, params, mesh),
    )


def check_places(state, shardings):
    for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        # A counter that was not created in a compiled program is on one device.
        assert not x.ndim or x.sharding.is_equivalent_to(s, x.ndim), (
            x.shape,
            x.sharding,
            s,
        )


def steps_are_those_of_one_device(name, kind):
    tx, mesh = METHODS[name], mesh_of(4, 2, kind=kind)
    want, _ = run(tx, PARAMS, GRADS)
    with jax.set_mesh(mesh):
        params = place(PARAMS, mesh)
        places = jax.tree.map(lambda x: x.sharding, params)
        shardings = lro.state_shardings(tx, params, mesh)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        types = jax.tree.map(jax.typeof, state)
        step = jax.jit(
            tx.update,
            in_shardings=(places, shardings, places),
            out_shardings=(places, shardings),
            donate_argnums=1,
        )
        for grads, expected in zip(GRADS, want, strict=True):
            updates, state = step(place(grads, mesh), state, params)
            assert_close(updates, expected, rtol=1e-3, atol=1e-4)
        assert jax.tree.map(jax.typeof, state) == types
        check_places(state, shardings)
    # Eagerly, everything comes out where it belongs too.
    check_places(tx.init(params), shardings)


def nnx_steps_are_those_of_one_device(name):
    tx, mesh = METHODS[name], mesh_of(4, 2)
    want, _ = run(tx, PARAMS, GRADS)
    with jax.set_mesh(mesh):
        model = nnx.Dict(
            {
                k: nnx.Param(x, out_sharding=tuple(SPECS[k]))
                for k, x in place(PARAMS, mesh).items()
            }
        )
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        shardings = lro.state_shardings(tx, place(PARAMS, mesh), mesh)
        check_places(nnx.as_pure(optimizer.opt_state), shardings)
        with lro.split_states("own"):
            other = nnx.Optimizer(model, tx, wrt=nnx.Param)
            places = lro.state_shardings(tx, place(PARAMS, mesh), mesh)
        check_places(nnx.as_pure(other.opt_state), places)
        assert places != shardings
        grads = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(grads, place(GRADS[0], mesh))
        before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))(
            model, optimizer, grads
        )
        after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    change = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), after, before)
    assert_close(change, want[0], rtol=1e-3, atol=1e-4)


def a_checkpoint_goes_onto_fewer_devices(folder):
    tx, mesh = METHODS["galore"], mesh_of(4, 2)
    params = place(PARAMS, mesh)
    shardings = lro.state_shardings(tx, params, mesh)
    places = jax.tree.map(lambda x: x.sharding, params)
    step = jax.jit(tx.update, out_shardings=(places, shardings), donate_argnums=1)
    _, state = step(place(GRADS[0], mesh), tx.init(params), params)
    saved = jax.tree.map(np.array, state)
    with ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "state", args=ocp.args.StandardSave(state))
        # While it is written, the arrays are given away.
        old = state
        want, state = step(place(GRADS[1], mesh), state, params)
        assert all(x.is_deleted() for x in jax.tree.leaves(old) if x.ndim)
        checkpointer.wait_until_finished()
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder / "state").item_metadata.tree
        lro.check_state(tx, metadata, PARAMS)
        for shape in ((2, 2), (1, 1)):
            mesh = mesh_of(*shape)
            params = place(PARAMS, mesh)
            like = abstract(tx, params, mesh)
            restored = checkpointer.restore(folder / "state", like)
            jax.tree.map(np.testing.assert_array_equal, restored, saved)
            check_places(restored, jax.tree.map(lambda x: x.sharding, like))
            updates, _ = jax.jit(tx.update)(place(GRADS[1], mesh), restored, params)
            assert_close(updates, jax.device_get(want), rtol=1e-3, atol=1e-4)


def a_split_state_shrinks_as_a_whole_one():
    tx = lro.adaptive_rank(
        optax.scale_by_adam(), max_rank=8, max_residual_energy=0.02, matrices=MATRICES
    )
    params = {"w": PARAMS["up"]}
    grads = {"w": jnp.ones((16, 1)) * jnp.arange(1.0, 25)}  # of rank 1
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    _, want = lro.rank.shrink(tx, state, params, multiple_of=2)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(4, 2, kind=kind)
        with jax.set_mesh(mesh):
            weight = NamedSharding(mesh, P("a", "b"))
            split = jax.device_put(params, weight)
            shardings = lro.state_shardings(tx, split, mesh)
            small_tx, small = lro.rank.shrink(
                tx, jax.device_put(state, shardings), split, multiple_of=2
            )
            check_places(small, lro.state_shardings(small_tx, split, mesh))
        jax.tree.map(np.testing.assert_array_equal, small, want)


def the_recipes_take_the_same_steps():
    names = run_sections("devices.md", "State lies as the weights do", "Recipes")
    reports = {k: names["trained"](*x)[1] for k, x in names["recipes"].items()}
    shares = {
        name: [row.bytes / row.bytes_per_device for row in rows]
        for name, rows in reports.items()
    }
    assert shares["DP"] == [1, 1, 1]
    # All but the norm and its moments is split, in two copies or in one.
    for name, parts in {"FSDP": 8, "TP": 8, "FSDP and TP": 8, "HSDP": 4}.items():
        assert all(0.8 * parts < share < parts for share in shares[name]), shares
    want = names["losses"].pop("DP")
    assert want[-1] < 0.9 * want[0]
    for losses in names["losses"].values():
        np.testing.assert_allclose(losses, want, rtol=1e-5)
    assert names["nnx_losses"][-1] < names["nnx_losses"][0]
    state = jax.tree.leaves(names["optimizer"].opt_state)
    assert all(len(x.sharding.device_set) == 8 for x in state if x.ndim)
    assert all(x.addressable_shards[0].data.size == x.size / 8 for x in state if x.ndim)


def a_record_of_equality_has_what_a_mesh_does():
    found = equality.row(
        lro.galore_project(optax.scale_by_adam(), rank=4), kinds=["Explicit"]
    )
    assert max(found["errors"].values()) < 1e-4 and 0 < found["floor"] < 1e-4
    assert found["moved"]["refresh"]["count"] > found["moved"]["ordinary"]["count"] > 0
    assert found["state_bytes_of_8"] < found["state_bytes"] / 6
    # What a method does on one device, spoiled, is not it.
    grads = faults.gradients(faults.Settings(period=2))[: equality.STEPS]
    one = equality.alone(METHODS["mlorc"], grads)
    other = equality.alone(
        METHODS["mlorc"], [jax.tree.map(jnp.negative, g) for g in grads]
    )
    assert equality.error(other, one) > 1


if __name__ == "__main__":
    assert jax.device_count() == 8
    the_recipes_take_the_same_steps()
    a_record_of_equality_has_what_a_mesh_does()
    for name in METHODS:
        steps_are_those_of_one_device(name, AxisType.Auto)
    steps_are_those_of_one_device("galore", AxisType.Explicit)
    nnx_steps_are_those_of_one_device("galore")
    a_checkpoint_goes_onto_fewer_devices(pathlib.Path(sys.argv[1]))
    a_split_state_shrinks_as_a_whole_one()
