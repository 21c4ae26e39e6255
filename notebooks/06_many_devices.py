# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lowrank-optax/lowrank_optax/blob/main/notebooks/06_many_devices.ipynb)
#
# # Many devices
#
# Low-rank state is split by all axes of the mesh that split the weight it belongs to:
# the long axis of a basis, a factor or a projected moment has them all. This notebook
# shows where each array goes, what an update moves between devices, and what is left on
# each. Where there is one device only, eight are simulated on the CPU.

# %%
import os
import shutil
import subprocess
import sys
from glob import glob
from importlib.util import find_spec

if find_spec("lowrank_optax") is None or find_spec("examples") is None:  # as on Colab
    extras = "examples"
    if shutil.which("nvidia-smi"):
        extras += ",cuda"
    elif glob("/dev/accel*") or glob("/dev/vfio/[0-9]*"):
        extras += ",tpu"
    url, clone = "https://github.com/lowrank-optax/lowrank_optax", "lowrank-optax"
    if not os.path.exists(clone):
        subprocess.run(["git", "clone", "-q", "--depth=1", url, clone], check=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "-e", f"{clone}[{extras}]"]
    subprocess.run(pip, check=True)
    sys.path.insert(0, clone)

import jax
import optax

import lowrank_optax as lro

SMALL = os.environ.get("LOWRANK_OPTAX_SMALL") == "1"  # do less of everything
# Of the CPU alone, and before the first use of any device.
jax.config.update("jax_num_cpu_devices", 8)
devices = jax.devices() if jax.device_count() > 1 else jax.devices("cpu")
print(f"lowrank_optax {lro.__version__}, jax {jax.__version__}, optax", end=" ")
print(f"{optax.__version__}; {len(devices)} x {devices[0].device_kind}")

# %% [markdown]
# ## A sharded model
#
# A mesh of two axes: what faces the model's width is split along `data`, what faces the
# hidden layer along `model`. Batches are split along `data` too.

# %%
import math
import re

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.common.report import STYLE, markdown_table
from examples.llama.config import CONFIGS, LlamaConfig
from examples.llama.model import Llama

# %matplotlib inline
plt.rcParams.update(STYLE)

SHAPE = (len(devices) // 2, 2)
mesh = jax.make_mesh(
    SHAPE,
    ("data", "model"),
    axis_types=(AxisType.Auto, AxisType.Auto),
    devices=devices[: math.prod(SHAPE)],
)
WIDTH, STEPS, RANK = (64, 3, 4) if SMALL else (256, 60, 8)
BATCH = 16 if SMALL else 256


def init(key):
    up, down = jax.random.split(key)
    return {
        "up": jax.random.normal(up, (WIDTH, 4 * WIDTH)) / WIDTH**0.5,
        "down": jax.random.normal(down, (4 * WIDTH, WIDTH)) / WIDTH**0.5 / 2,
        "bias": jnp.zeros(WIDTH),
    }


specs = {"up": P("data", "model"), "down": P("model", "data"), "bias": P("data")}
layout = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
params = jax.device_put(init(jax.random.key(0)), layout)
for name, x in params.items():
    local = x.addressable_shards[0].data.shape
    print(f"{name:5} {x.shape} as {specs[name]}: {local} on each device")

# %% [markdown]
# ## Where the state goes
#
# `state_shardings` gives a tree like `tx.init(params)`, for `out_shardings`. It needs
# shapes and shardings of the parameters only.

# %%
OPTIMIZERS = {
    "adamw": optax.adamw(1e-3),
    "galore_adamw": lro.galore_adamw(1e-2, rank=RANK, update_every=20),
    "mlorc_adamw": lro.mlorc_adamw(1e-3, rank=RANK),
}
for name, tx in OPTIMIZERS.items():
    places = lro.state_shardings(tx, params, mesh)
    state = jax.jit(tx.init, out_shardings=places)(params)
    print(f"\n{name}")
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        keys = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if "up" in keys:
            keys = [key for key in keys if key not in ("0", "inner_state")]
            print(f"  {'/'.join(keys):12} {x.shape!s:12} {x.sharding.spec}")

# %% [markdown]
# The moments of AdamW are split as the weight is. GaLore's basis and moments and the
# two factors of MLorc are split along their long axis by both axes of the mesh, that of
# the weight's own axis first. With Flax NNX nothing of this is needed: the annotations
# of the parameters are enough.
#
# ## What an update moves
#
# In the compiled program of an update every transfer between devices is an instruction.
# A program that gathered the gradient would have one with a result as large as the
# matrix. GaLore with an exact SVD, which cannot be taken of pieces, shows that it would
# be seen.

# %%
COLLECTIVE = re.compile(
    r"= (?P<result>[^=]*?) (?P<operation>all-gather|all-reduce|all-to-all|"
    r"collective-permute|reduce-scatter)(?:-start)?\("
)


def transfers(tx):
    """Each operation with the number of elements of its largest result."""
    places = lro.state_shardings(tx, params, mesh)
    state = jax.jit(tx.init, out_shardings=places)(params)
    update = jax.jit(tx.update, out_shardings=(layout, places))
    program = update.lower(params, state, params).compile().as_text()
    found = {}
    for match in COLLECTIVE.finditer(program or ""):
        shapes = re.findall(r"\[([\d,]*)\]", match["result"])
        sizes = [math.prod(map(int, filter(None, x.split(",")))) for x in shapes]
        operation = match["operation"]
        found[operation] = max(found.get(operation, 0), *sizes)
    return found


exact = lro.galore_project(
    optax.scale_by_adam(), rank=RANK, subspace=lro.TopSingular("svd")
)
matrix = params["up"].size
moved = {name: transfers(tx) for name, tx in {**OPTIMIZERS, "exact SVD": exact}.items()}
header = ["", "operation", "largest result", "share of the matrix"]
table = [
    [name, operation, f"{size:,}", f"{size / matrix:.1%}"]
    for name, found in moved.items()
    for operation, size in found.items()
]
print(markdown_table(header, table))

largest = {name: max(found.values(), default=0) for name, found in moved.items()}
assert largest["galore_adamw"] < matrix and largest["mlorc_adamw"] < matrix
assert moved["exact SVD"]["all-gather"] == matrix

# %%
figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
bars = axes.barh(list(largest), [100 * size / matrix for size in largest.values()])
axes.bar_label(bars, fmt="%.1f", padding=3)
axes.set(xlabel="largest transfer of an update (% of the matrix)", xlim=(0, 110))
axes.invert_yaxis()
axes.grid(visible=False, axis="y")
plt.show()

# %% [markdown]
# GaLore's refresh is in the same program, so it moves no more either: its randomized
# factorization sums sketches of a few columns. AdamW moves nothing, as it works element
# by element.
#
# ## Training
#
# The whole step, forward and backward too, on the mesh, and for comparison on one
# device. The mesh only changes the order of sums.

# %%
teacher = init(jax.random.key(1))


def forward(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"] + params["bias"]


def loss(params, x):
    return jnp.mean((forward(params, x) - forward(teacher, x)) ** 2)


def train(tx, layout, places, rows):
    """The loss of every step, from parameters, state and batches placed as told."""

    def step(params, state, x):
        value, grads = jax.value_and_grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(layout, places, None))
    params = jax.device_put(init(jax.random.key(0)), layout)
    state = jax.jit(tx.init, out_shardings=places)(params)
    losses = []
    for t in range(STEPS):
        x = np.random.default_rng(t).standard_normal((BATCH, WIDTH), np.float32)
        params, state, value = step(params, state, jax.device_put(x, rows))
        losses.append(float(value))
    return losses, state


alone = jax.sharding.SingleDeviceSharding(devices[0])
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
states = {}
for index, name in enumerate(["galore_adamw"] if SMALL else OPTIMIZERS):
    tx = OPTIMIZERS[name]
    places = lro.state_shardings(tx, params, mesh)
    rows = NamedSharding(mesh, P("data"))
    losses, states[name] = train(tx, layout, places, rows)
    single, _ = train(tx, alone, alone, alone)
    gap = max(abs(a - b) / b for a, b in zip(losses, single, strict=True))
    print(f"{name:13} losses on the mesh and on one device differ by {gap:.0e} of them")
    steps, color = range(1, STEPS + 1), f"C{index}"
    axes.plot(steps, losses, color=color, lw=3, alpha=0.4, label=f"{name}, mesh")
    axes.plot(steps, single, color=color, ls="--", label=f"{name}, one device")
axes.set(xlabel="step", ylabel="mean squared error")
axes.legend()
plt.show()

# %% [markdown]
# ## Memory of each device
#
# `memory_report` with a mesh adds up the shards of the fullest device; here is what it
# predicts beside what the arrays of the run above really hold.

# %%
for name, state in states.items():
    *_, predicted = lro.memory_report(OPTIMIZERS[name], params, mesh)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    print(f"{name:13} {predicted.bytes:>9,} bytes of state, per device", end=" ")
    print(f"{predicted.bytes_per_device:>9,} predicted and {held:,} held")
    assert held == predicted.bytes_per_device

# %% [markdown]
# And LLaMA-7B, from shapes alone, over more and more devices that split the rows of
# each matrix; and GaLore's state split by no more than its own axis of the weight, as
# `lro.split_states("own")` chooses.

# %%
MODEL = "smoke" if SMALL else "llama_7b"
config = LlamaConfig.from_json(CONFIGS / f"{MODEL}.json")
shapes = jax.eval_shape(
    lambda: nnx.to_pure_dict(nnx.state(Llama(config, rngs=nnx.Rngs(0)), nnx.Param))
)
COUNTS = [n for n in (1, 2, 4, 8) if n <= len(devices)]


def gib_per_device(tx, count, by):
    """Weights, gradients and state, the rows of matrices split into so many parts."""
    mesh = jax.make_mesh(
        (count,), ("fsdp",), axis_types=(AxisType.Auto,), devices=devices[:count]
    )

    def place(x):
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, P("fsdp"))
        )

    with lro.split_states(by):
        report = lro.memory_report(tx, jax.tree.map(place, shapes), mesh)
    return sum(row.bytes_per_device for row in report) / 2**30


galore, mlorc = lro.galore_adamw(1e-2, rank=1024), lro.mlorc_adamw(1e-3, rank=4)
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for name, tx, by in (
    ("adamw", optax.adamw(1e-3), "all"),
    ("galore_adamw, rank 1024, own axes", galore, "own"),
    ("galore_adamw, rank 1024", galore, "all"),
    ("mlorc_adamw, rank 4", mlorc, "all"),
):
    gib = [gib_per_device(tx, n, by) for n in COUNTS]
    axes.plot(COUNTS, gib, marker="o", label=f"{name}: {gib[-1]:.1f} GiB")
axes.set(xlabel="devices", ylabel="GiB on each device", xscale="log", yscale="log")
axes.set(title=f"{MODEL}: weights, gradients, state in float32")
axes.set_xticks(COUNTS, map(str, COUNTS))
axes.set_yticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
axes.minorticks_off()
axes.legend(title=f"on {COUNTS[-1]} devices:", loc="lower left", fontsize="small")
plt.show()

# %% [markdown]
# Where only rows are split, one of two thin arrays has no axis of its own to be split
# by, and stays whole on each device. At rank 4 that is nothing. At rank 1024 it is what
# remains: with enough devices AdamW, whose moments are split to the last, keeps less on
# each. Split by all axes of the weight, GaLore's state shrinks as the weights do.
