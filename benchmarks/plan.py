"""What `examples.llama.plan` says beside what compiled training steps hold.

    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_gpu_autotune_level=0 python -m benchmarks.plan

Steps of models of full width and few layers are compiled for H100s that need not be
there, and not run. Cases that are in the record are kept.
"""

import dataclasses
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import AxisType, Mesh
from tqdm import tqdm

from benchmarks.accelerators.targets import devices
from benchmarks.layerwise import ordinary
from benchmarks.record import RECORDS, known_figures, line, write_record
from examples.common.files import read_object, write_json
from examples.common.mesh import AXES, Placement, laid
from examples.llama.config import CONFIGS
from examples.llama.layerwise import step_of
from examples.llama.plan import Plan, needs

SEVEN = {"model": "llama_7b", "layers": 2, "method": "adamw"}
FOUR = {**SEVEN, "layers": 4}
LONG = {"batch_size": 16, "seq_len": 2048}
MESH = {"batch_size": 16, "mesh": "fsdp=8", "remat": True}
SMALL = {"model": "llama_350m", "layers": 2, "batch_size": 64, "seq_len": 256}
CASES: list[dict[str, Any]] = [
    {**SEVEN, "batch_size": 4},
    {**SEVEN, "batch_size": 4, "method": "galore_adamw", "rank": 1024},
    {**SMALL, "method": "mlorc_adamw", "rank": 4},
    {**FOUR, "batch_size": 4},
    {**FOUR, "batch_size": 4, "remat": True},
    {**FOUR, **LONG, "remat": True},
    {**FOUR, "batch_size": 4, "layerwise": True},
    {**FOUR, **LONG, "mesh": "fsdp=8"},
    {**FOUR, **LONG, "mesh": "fsdp=4,model=2"},
    {**SEVEN, **MESH},
    {**SMALL, "method": "adamw"},
    {**SMALL, "method": "adamw", "layers": 4},
    {**SMALL, "method": "adamw", "layers": 4, "remat": True},
    {**SMALL, "method": "adamw", "param_dtype": "bfloat16", "dtype": "bfloat16"},
    {**SEVEN, **MESH, "method": "galore_adamw", "rank": 1024},
    {**SEVEN, **MESH, "method": "mlorc_adamw", "rank": 4},
]


@dataclass(frozen=True)
class Settings:
    """The planner's figures beside those of compiled training steps."""

    redo: tuple[int, ...] = ()
    """Cases to compile again, by their numbers."""
    out: Path | None = None
    """Directory of the record; default benchmarks/records."""


def shallow(case: dict[str, Any], directory: Path) -> Plan:
    """The plan of a case, whose `layers` take the place of the model's own."""
    path = directory / f"{case['model']}.json"
    config = read_object(CONFIGS / path.name)
    write_json(path, config | {"num_hidden_layers": case["layers"]})
    rest = {name: value for name, value in case.items() if name != "layers"}
    return Plan(**rest | {"model": str(path)})


def compiled(plan: Plan) -> int:
    """Bytes on a device of the step, compiled for H100s."""
    sizes = plan.placement.mesh.shape
    found = np.array(devices("h100", f"1x1x{math.prod(sizes.values())}"))
    kinds = (AxisType.Auto,) * len(AXES)
    mesh = Mesh(found.reshape(tuple(sizes.values())), AXES, axis_types=kinds)
    where, tx = Placement(mesh), plan.optimizer()
    params = where.shapes(plan.model_shapes())
    state = laid(jax.eval_shape(tx.init, params), where.state(tx, params))
    shape = plan.batch_size, plan.seq_len + 1
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where.rows)
    if plan.layerwise:
        make = step_of(plan.config, 1.0, placement=where)
    else:
        make = ordinary(plan.config)
    given = params, state
    out = *jax.tree.map(lambda x: x.sharding, given), where.replicated
    step = jax.jit(make(tx), donate_argnums=(0, 1), out_shardings=out)
    usage = step.lower(*given, rows).compile().memory_analysis()
    own = usage.output_size_in_bytes - usage.alias_size_in_bytes
    return usage.argument_size_in_bytes + own + usage.temp_size_in_bytes


def main(settings: Settings) -> None:
    known = known_figures("plan", settings.out or RECORDS)
    figures = [x for x in known if x["case"] in CASES]
    again = [CASES[number] for number in settings.redo]
    figures = [x for x in figures if x["case"] not in again]
    there = [x["case"] for x in figures]
    for case in tqdm([x for x in CASES if x not in there]):
        with tempfile.TemporaryDirectory() as directory:
            plan = shallow(case, Path(directory))
            began = time.perf_counter()
            found = {
                "compiled": compiled(plan),
                "seconds": time.perf_counter() - began,
                **dataclasses.asdict(needs(plan)),
            }
        figures.append({"case": case, **found})
        figures.sort(key=lambda x: CASES.index(x["case"]))
        write_record("plan", settings, figures, _table(figures), settings.out)


def _table(figures: list[dict[str, Any]]) -> str:
    lines = [
        "| case | weights GiB | state GiB | planned GiB | compiled GiB | planned /"
        " compiled |",
        "|---|---|---|---|---|---|",
    ]
    for x in figures:
        sizes = [x[name] for name in ("weights", "state", "total", "compiled")]
        case = ", ".join(f"{name} {value}" for name, value in x["case"].items())
        cells = [case, *(f"{size / 2**30:.2f}" for size in sizes)]
        lines.append(line([*cells, f"{x['total'] / x['compiled']:.3f}"]))
    lines.append("")
    if earlier := sum("seconds" not in x for x in figures):
        lines.append(
            f"{earlier} of these were compiled before this script was written, in the"
            " same way, and are known to 0.1 MiB."
        )
    lines.append("Of per-layer updates on a mesh there is no figure.")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Settings))
