"""Whether a step on a mesh is that of one device: every optimizer, on eight devices.

    python -m benchmarks.equality
    python -m benchmarks.equality --only mlorc --minutes 20

Simulated devices. Each optimizer takes four steps of the same gradients, in which its
basis is renewed twice: on one device, and with weights and state split over a mesh of
2, of 4 x 2 and of 8, whose axes are Auto and Explicit, in functional code and by
`nnx.Optimizer`. An error is the largest over steps and leaves of a difference of
updates, over the norm of the update. Beside them stands the *floor*: the error on one
device of gradients whose last bit was changed at random. It says how far the method
itself carries a rounding error; a mesh, which sums in another order, can do no better.
What is there is kept, and gone on from.
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from benchmarks import faults
from benchmarks.accelerators import meshes
from benchmarks.record import RECORDS, about, known_figures, write_record
from examples.common.report import markdown_table

Arrays = dict[str, jax.Array]

STEPS = 4
# The sizes of the axes, and where rows and columns of the matrices lie.
LAYOUTS = {
    "2": ((2,), P("a", None)),
    "4x2": ((4, 2), P("a", "b")),
    "8": ((8,), P(None, "a")),
}
KINDS = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}


@dataclass(frozen=True)
class Placed:
    """A mesh, and where the leaves lie on it."""

    mesh: Mesh
    spec: P

    @classmethod
    def of(cls, layout: str, kind: str) -> "Placed":
        sizes, spec = LAYOUTS[layout]
        devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
        names = ("a", "b")[: len(sizes)]
        return cls(Mesh(devices, names, axis_types=(KINDS[kind],) * len(names)), spec)

    def at(self, x: Any) -> P:
        return self.spec if x.ndim > 1 else P()

    def put(self, tree: Arrays) -> Arrays:
        return {
            k: jax.device_put(x, NamedSharding(self.mesh, self.at(x)))
            for k, x in tree.items()
        }


def weights() -> Arrays:
    rng = np.random.default_rng(1)
    return {
        k: jnp.asarray(rng.standard_normal(s), jnp.float32)
        for k, s in faults.SHAPES.items()
    }


def alone(tx: optax.GradientTransformation, grads: list[Arrays]) -> list[Arrays]:
    """The updates on one device."""
    params, step = weights(), jax.jit(tx.update)
    state, found = tx.init(params), []
    for own in grads:
        updates, state = step(own, state, params)
        found.append(jax.device_get(updates))
    return found


def functional(
    tx: optax.GradientTransformation, grads: list[Arrays], placed: Placed
) -> list[Arrays]:
    """The updates of weights that lie on a mesh.

    Raises:
      AssertionError: the state has come out in other shapes or types.
    """
    with jax.set_mesh(placed.mesh):
        params = placed.put(weights())
        places = jax.tree.map(lambda x: x.sharding, params)
        shardings = lro.state_shardings(tx, params, placed.mesh)
        state, found = jax.jit(tx.init, out_shardings=shardings)(params), []
        before = jax.tree.map(jax.typeof, state)
        step = jax.jit(tx.update, out_shardings=(places, shardings), donate_argnums=1)
        for own in grads:
            updates, state = step(placed.put(own), state, params)
            found.append(jax.device_get(updates))
        assert jax.tree.map(jax.typeof, state) == before, "the state's types changed"
    return found


def by_nnx(
    tx: optax.GradientTransformation, grads: list[Arrays], placed: Placed
) -> list[Arrays]:
    """The changes of the weights of a model whose annotations say where they lie."""
    with jax.set_mesh(placed.mesh):
        model = nnx.Dict(
            {
                k: nnx.Param(x, out_sharding=tuple(placed.at(x)))
                for k, x in placed.put(weights()).items()
            }
        )
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        like = nnx.state(model, nnx.Param)
        step = nnx.jit(lambda model, optimizer, g: optimizer.update(model, g))
        found = []
        for own in grads:
            # From the same weights as in functional code, so that updates compare.
            nnx.replace_by_pure_dict(like, placed.put(weights()))
            nnx.update(model, like)
            gradients = jax.tree.map(lambda x: x, like)
            nnx.replace_by_pure_dict(gradients, placed.put(own))
            step(model, optimizer, gradients)
            after = jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
            found.append({k: after[k] - np.asarray(x) for k, x in weights().items()})
    return found


def error(found: list[Arrays], want: list[Arrays]) -> float:
    """See the module."""
    return max(
        float(np.linalg.norm(a[k] - b[k]) / max(np.linalg.norm(b[k]), 1e-30))
        for a, b in zip(found, want, strict=True)
        for k in b
    )


def row(
    tx: optax.GradientTransformation, kinds: Sequence[str] = tuple(KINDS)
) -> dict[str, Any]:
    """All that the table says of an optimizer, on meshes of these kinds."""
    grads = faults.gradients(faults.Settings(period=2))[:STEPS]
    want, rng = alone(tx, grads), np.random.default_rng(2)
    other = [
        {
            k: x * jnp.asarray(1 + 2.0**-23 * rng.integers(-1, 2, x.shape), x.dtype)
            for k, x in own.items()
        }
        for own in grads
    ]
    errors = {
        f"{layout}, {kind}, {form}": error(
            run(tx, grads, Placed.of(layout, kind)), want
        )
        for layout in LAYOUTS
        for kind in kinds
        for form, run in (("functional", functional), ("nnx", by_nnx))
    }
    placed = Placed.of("8", "Auto")
    *_, state = lro.memory_report(tx, placed.put(weights()), placed.mesh)
    both = Placed.of("4x2", "Auto")
    module, *_ = meshes.compiled(tx, both.put(weights()), both.mesh, "cpu")
    moved = {
        due: vars(meshes.moves(module, due == "refresh"))
        for due in ("ordinary", "refresh")
    }
    return {
        "floor": error(alone(tx, other), want),
        "errors": errors,
        "state_bytes": state.bytes,
        "state_bytes_of_8": state.bytes_per_device,
        "moved": moved,
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    header = [
        "optimizer",
        "floor",
        *LAYOUTS,
        "state on one of 8",
        "collectives",
        "largest",
    ]
    lines = []
    for name, x in found.items():
        worst = [
            max(e for k, e in x["errors"].items() if k.startswith(f"{layout},"))
            for layout in LAYOUTS
        ]
        moved = x["moved"]["ordinary"], x["moved"]["refresh"]
        lines.append(
            [
                name,
                f"{x['floor']:.0e}",
                *(f"{e:.0e}" for e in worst),
                f"{x['state_bytes_of_8'] / x['state_bytes']:.0%}",
                *(
                    " / ".join(dict.fromkeys(f"{m[what]:,}" for m in moved))
                    for what in ("count", "largest")
                ),
            ]
        )
    return markdown_table(header, lines)


@dataclass(frozen=True)
class Settings:
    """How far steps on eight simulated devices are from those of one."""

    only: str = ""
    """A regular expression for the optimizers' names."""
    minutes: float = 60.0
    """Ends after the row that crosses it; what is there is kept and gone on from."""
    out: Path = RECORDS
    """Directory of the record."""


def main(settings: Settings) -> None:
    """Adds the rows that are missing until the time is up, and writes the record."""
    began = time.monotonic()
    known = known_figures("equality", settings.out)
    # At a rate of one, so that changes of weights near one keep the updates' digits.
    every = faults.optimizers(faults.Settings(period=2), 1.0)
    for name, tx in every.items():
        if name in known or not re.search(settings.only, name):
            continue
        if time.monotonic() - began > 60 * settings.minutes:
            break
        known[name] = row(tx)
        jax.clear_caches()  # else a process has more programs mapped than it may
        print(name, known[name], flush=True)
        settings.out.mkdir(parents=True, exist_ok=True)
        kept = json.dumps({"figures": known})  # until the record is written
        (settings.out / "equality.json").write_text(kept)
    found = {name: known[name] for name in every if name in known}
    missing = [name for name in every if name not in known]
    text = "\n\n".join(
        [
            *([f"**Not complete**: {', '.join(missing)} missing."] if missing else []),
            about(__doc__),
            "State on one of 8: of its bytes, where columns are split over eight "
            "devices; an embedding, which is no matrix, is split too, a bias is not. "
            "Collectives, and the numbers of the largest: of a step on 4 x 2, and of "
            "one that renews all bases; the largest matrix has 4,608 numbers.",
            table(found),
        ]
    )
    write_record("equality", settings, found, text, settings.out)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main(tyro.cli(Settings))
