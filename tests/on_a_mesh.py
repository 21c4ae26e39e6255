"""Run by `test_meshes.py` on eight simulated devices; prints JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from running import random_like

import lowrank_optax as lro
from benchmarks.accelerators import hlo, meshes
from lowrank_optax._src.linalg import slabs
from lowrank_optax._src.parts.codec import BlockInt8

AXES = ("a", "b")
SHAPES = {"rows": (32, 768), "columns": (32, 768), "both": (768, 32)}
SHAPES |= {"layers": (8, 32, 768)}
SPECS = {k: meshes.SPLITS[k] for k in SHAPES}
MATRICES = lro.MatrixAxes()
_RATE = {"learning_rate": 0.1, "matrices": MATRICES}
# One for each mechanism: exact subspaces, subspaces and factors that turn at every
# step, bytes. Range finders are in `test_sharding.py`.
METHODS = {
    "i3s": lro.i3s_adamw(rank=4, **_RATE),
    "ldadam": lro.ldadamw(rank=12, **_RATE),
    "mlorc": lro.mlorc_adamw(rank=8, **_RATE),
    "bytes": lro.adamw_8bit(0.1),
}
# Of these, a device's part has more numbers than the sketches of eight columns.
WIDE = {"columns": (256, 768), "both": (256, 768)}
SIGNS = lro.mlorc_lion(rank=8, **_RATE)
# Whose bases are renewed at once, and one by one.
RENEWED = {"galore": lro.galore_adamw(rank=8, **_RATE), "i3s": METHODS["i3s"]}
# Single entries that lie on several devices.
ENTRIES = lro.project_gradients(
    optax.scale_by_adam(), rank=8, recovery=lro.SparseResidual(0.05)
)
# Decoded anew at each step: what is made of a code lies where the code does.
CODED = lro.q_galore_project(optax.scale_by_adam(), rank=16, matrices=MATRICES)


def moved(tx, mesh, shapes=SHAPES):
    """What a step moves, of matrices that are named by how they are split."""
    places = {k: NamedSharding(mesh, SPECS[k.split(".")[0]]) for k in shapes}
    params = {
        k: jax.ShapeDtypeStruct(s, jnp.float32, sharding=places[k])
        for k, s in shapes.items()
    }
    module, _, _ = meshes.compiled(tx, params, mesh, "cpu")
    return [vars(meshes.moves(module, due)) for due in (False, True)]


def refreshes(tx, mesh, leaves):
    """What a step moves that renews the bases of so many equal leaves, by split."""
    return {
        split: moved(tx, mesh, {f"{split}.{i}": (64, 768) for i in range(leaves)})[1]
        for split in ("rows", "columns", "both")
    }


def slabs_of(split, mesh):
    """What a loop over some rows of a split matrix moves, and how often it turns."""
    shape = (8, 512, 768) if split == "layers" else (2048, 768)
    x = jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, SPECS[split])
    )

    def add(fixed, renewed):
        return [fixed[0] + renewed[0]]

    run = jax.jit(lambda a, b: slabs.in_slabs(add, [a], [b]), out_shardings=x.sharding)
    module = hlo.parse(run.lower(x, x).compile().as_text())
    inside = [y for c in module.computations.values() for y in c.instructions]
    turns = sum(y.opcode == "while" for y in inside)
    return {"count": meshes.moves(module, False).count, "loops": turns}


def codes(mesh):
    """Of a matrix whose blocks lie on several devices: whether they are as on one."""
    same = {}
    for shape in [(6, 768), (16, 344), (8, 264)]:  # of the last, some are over a row
        x = random_like(shape, 0).at[3, 5].set(jnp.inf)
        there = jax.device_put(x, NamedSharding(mesh, P(None, AXES)))
        codec = BlockInt8(True)

        @jax.jit
        def both(x, codec=codec):
            code = codec.encode(None, x, None)
            return code, codec.decode(code)

        pairs = zip(*map(jax.tree.leaves, (both(x), both(there))), strict=True)
        same[str(shape)] = all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)
    return same


def exact(mesh):
    """The largest angle between subspaces of `gram_eigh` on one device and on all."""
    found = {}
    for split, spec in SPECS.items():
        g = random_like((8, 16, 24) if split == "layers" else (16, 24), 1)
        there = jax.device_put(g, NamedSharding(mesh, spec))
        find = jax.jit(lambda g: lro.linalg.gram_eigh(g, 3)[0])
        overlap = jnp.linalg.svd(find(g).mT @ jax.device_get(find(there)))[1]
        found[split] = float(jnp.max(jnp.abs(1 - overlap)))
    return found


def kernels(mesh):
    """What the kernels say on a mesh."""
    where = NamedSharding(mesh, P(AXES, None))
    grads = {"w": jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=where)}
    said = {}
    for name, tx in {"mlorc": METHODS["mlorc"], "bytes": METHODS["bytes"]}.items():
        state = jax.eval_shape(tx.init, grads)
        try:
            with lro.kernels.dispatch("pallas"):
                jax.jit(tx.update).lower(grads, state, grads)
            said[name] = ""
        except ValueError as error:
            said[name] = str(error)
    return said


def main():
    mesh = meshes.mesh_of("cpu")
    slabs._NUMBERS = 32 * 768  # several turns of a loop
    with lro.split_states("own"):
        own = {name: moved(tx, mesh) for name, tx in METHODS.items()}
    found = {
        "moved": own,
        "moved by all": {
            name: moved(METHODS[name], mesh) for name in ("mlorc", "bytes")
        },
        "wide by all": {
            name: moved(tx, mesh, WIDE)
            for name, tx in (METHODS | {"lion": SIGNS}).items()
            if name in ("mlorc", "lion", "bytes")
        },
        "refreshes": {
            name: [refreshes(tx, mesh, n) for n in (1, 4)]
            for name, tx in RENEWED.items()
        },
        "entries": moved(ENTRIES, mesh, {"both": (256, 768)})[0],
        "coded basis": moved(CODED, mesh, {"both": (512, 1376)}),
        "slabs": {split: slabs_of(split, mesh) for split in SPECS},
        "codes": codes(mesh),
        "exact": exact(mesh),
        "kernels": kernels(mesh),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
