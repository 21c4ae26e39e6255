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
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lowrank-optax/lowrank_optax/blob/main/notebooks/02_method_and_rank.ipynb)
#
# # Choosing a method and a rank
#
# Two questions decide it. How much memory is there? And how much of a gradient, or of a
# moment, does a rank keep? The first is answered for LLaMA-7B without allocating a
# single one of its arrays, the second by measuring a small LLaMA while it trains.

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
print(f"lowrank_optax {lro.__version__}, jax {jax.__version__}, optax", end=" ")
print(f"{optax.__version__}; {jax.device_count()} x {jax.devices()[0].device_kind}")

# %% [markdown]
# ## What a 7B model needs
#
# `jax.eval_shape` runs the model's construction on shapes alone. Everything that tells
# memory here takes such abstract parameters.

# %%
import sysconfig
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from examples.common.methods import METHODS
from examples.common.report import STYLE
from examples.llama.config import CONFIGS, LlamaConfig
from examples.llama.model import Llama
from examples.llama.pretrain import Pretrain, prepare
from examples.llama.subspaces import mean_by_type

# %matplotlib inline
plt.rcParams.update(STYLE)

MODEL = "llama_60m" if SMALL else "llama_7b"
config = LlamaConfig.from_json(CONFIGS / f"{MODEL}.json")


def weights():
    return nnx.to_pure_dict(nnx.state(Llama(config, rngs=nnx.Rngs(0)), nnx.Param))


shapes = jax.eval_shape(weights)
GIB = 2**30
print(f"{MODEL}: {sum(x.size for x in jax.tree.leaves(shapes)):,} parameters")

# %% [markdown]
# `memory_report` adds up weights, gradients and state. Activations are not in it: they
# depend on the batch, and are the same for every method.

# %%
WIDTH = config.hidden_size
planned = {
    "adamw": optax.adamw(1e-3),
    f"galore_adamw, rank {WIDTH // 4}": lro.galore_adamw(1e-2, rank=WIDTH // 4),
    "mlorc_adamw, rank 4": lro.mlorc_adamw(1e-3, rank=4),
}
for name, tx in planned.items():
    print(name)
    for row in lro.memory_report(tx, shapes):
        print(f"  {row.what:16} {row.bytes / GIB:7.2f} GiB")

# %% [markdown]
# ## Memory against rank
#
# `state_bytes` is exact: it is the size of `tx.init(params)`, counters included. The
# floor that all lines run into is the full-rank state of embedding, head and norms.

# %%
RANKS = [4, 64] if SMALL else [4, 16, 64, 256, 1024]
NAMES = ["mlorc_adamw", "galore_adamw", "apollo_adamw", "galore_adamw_8bit"]


def optimizer(name, rank):
    heads = (config.num_attention_heads, config.kv_heads)
    return METHODS[name].build(1e-3, rank, 200, 0.0, heads=heads, steps=1000)


def state_gib(name, rank=None):
    return lro.state_bytes(optimizer(name, rank), shapes) / GIB


figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
full = state_gib("adamw")
axes.axhline(full, color="gray", ls="--")
axes.annotate("adamw", (RANKS[0], full), (0, -12), textcoords="offset points")
for name in NAMES[:2] if SMALL else NAMES:
    axes.plot(RANKS, [state_gib(name, r) for r in RANKS], marker="o", label=name)
axes.set(xlabel="rank", ylabel="optimizer state (GiB)", xscale="log", yscale="log")
axes.set(title=f"{MODEL}, float32 state")
axes.set_xticks(RANKS, map(str, RANKS))
axes.minorticks_off()
axes.set_yticks([1, 3, 10, 30], ["1", "3", "10", "30"])
axes.legend()
plt.show()

# %% [markdown]
# The other way around: the largest rank that fits into a budget. State grows linearly
# with the rank, so two sizes tell all others. MLorc pays for a rank in both moments and
# on both sides of a matrix, GaLore for a basis and for moments in the subspace.

# %%
BUDGET = 0.3 if SMALL else 12.0  # GiB of optimizer state

for name in NAMES[:2]:
    one, two = state_gib(name, 1), state_gib(name, 2)
    rank = 1 + int((BUDGET - one) / (two - one))
    size = state_gib(name, rank)
    print(f"{name:13} rank {rank} fits into {BUDGET} GiB: it takes {size:.3f}")

# %% [markdown]
# ## Memory of every method
#
# Each at rank 128, but for APOLLO-Mini, which is of rank 1, and those without a rank.
# Gray is what a method pays for embeddings, head and norms.

# %%
from examples.common.methods import matrix_state_bytes

OPTIMIZERS = [name for name, method in METHODS.items() if method.linear is None]
names = ["adamw", "galore_adamw"] if SMALL else OPTIMIZERS
ranks = [{None: None, 1: 1}.get(METHODS[name].rank, 128) for name in names]
built = [optimizer(name, rank) for name, rank in zip(names, ranks, strict=True)]
matrices = np.array([matrix_state_bytes(tx, shapes) for tx in built]) / GIB
totals = np.array([lro.state_bytes(tx, shapes) for tx in built]) / GIB
order = np.argsort(-totals)

figure, axes = plt.subplots(figsize=(8, 1.2 + 0.28 * len(names)), layout="constrained")
rows = [names[i] for i in order]
axes.barh(rows, matrices[order], label="matrices")
rest = (totals - matrices)[order]
bars = axes.barh(rows, rest, left=matrices[order], color="lightgray", label="the rest")
axes.bar_label(bars, [f"{total:.1f}" for total in totals[order]], padding=3)
axes.set(xlabel="optimizer state (GiB)", title=f"{MODEL}, rank 128")
axes.grid(visible=False, axis="y")
axes.invert_yaxis()
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# ## What a rank keeps
#
# A small LLaMA is trained on the standard library's sources with plain AdamW, so that
# both moments are there at full size. `captured_energy` is the share of a matrix'
# squared norm that a projection keeps. Here it is measured for the best subspace of
# each rank, of the gradient on a batch that is held out, and of the moments.

# %%
STEPS = 5 if SMALL else 150
stdlib = sysconfig.get_paths()["stdlib"]
settings = Pretrain(
    model="smoke" if SMALL else "tiny",
    methods=("adamw",),
    # All of the library's sources, or those of one small package.
    data=f"path:{stdlib}/json" if SMALL else "stdlib",
    steps=STEPS,
    batch_size=4 if SMALL else 8,
    seq_len=32 if SMALL else 128,
)
job = prepare(settings, Path(tempfile.mkdtemp()))
task, tx = job.task, optax.adamw(3e-3)


@jax.jit
def step(params, state, rows):
    grads = jax.grad(task.loss)(params, rows)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


params = task.init()
state = tx.init(params)
for t in range(STEPS):
    params, state = step(params, state, task.batch(t))
gradient = jax.jit(jax.grad(task.loss))(params, task.validation[0])
first, second = (optax.tree.get(state, field) for field in ("mu", "nu"))

# %%
SHORT = min(32 if SMALL else 128, job.config.hidden_size)
MEASURED = [r for r in (1, 2, 4, 8, 16, 32, 64, 128) if r <= SHORT]


@jax.jit
def captured(matrix):
    """The energy that the best subspace of each measured rank keeps."""
    basis, _ = lro.linalg.gram_eigh(matrix, SHORT)
    return jax.numpy.stack(
        [lro.diagnostics.captured_energy(matrix, basis[:, :r]) for r in MEASURED]
    )


def by_layer(tree):
    """Of every matrix that low-rank methods treat, averaged by the kind of layer."""
    views = lro.default_matrices(params)
    found = jax.tree.map(lambda x, v: None if v is None else captured(x), tree, views)
    return mean_by_type(found)


curves = {
    name: by_layer(tree)
    for name, tree in {
        "gradient": gradient,
        "first moment": first,
        "second moment": second,
    }.items()
}
figure, panels = plt.subplots(
    1, 3, figsize=(11, 3.8), sharey=True, layout="constrained"
)
for axes, (name, layers) in zip(panels, curves.items(), strict=True):
    for layer, values in layers.items():
        axes.plot(MEASURED, values, marker="o", ms=3, label=layer)
    axes.set(xlabel="rank", xscale="log", title=name, ylim=(0, 1.02))
    axes.set_xticks(MEASURED, map(str, MEASURED))
    axes.minorticks_off()
panels[0].set(ylabel="captured energy (share of squared norm)")
panels[-1].legend(fontsize="small")
plt.show()

for name, layers in curves.items():
    mean = np.mean(list(layers.values()), axis=0)
    print(f"{name:13} rank 4 keeps {mean[MEASURED.index(4)]:.0%}", end=", ")
    print(f"rank {SHORT // 4} keeps {mean[MEASURED.index(SHORT // 4)]:.0%}")

# %% [markdown]
# The second moment is nearly of rank one: four directions hold almost all of it. The
# gradient of one small batch needs more, and the first moment, an average over many
# batches, more again. So MLorc, which stores the moments, can do with a rank of 4 where
# gradients change little, as in fine-tuning; in pre-training from scratch a method is
# better off with a quarter of the width, where nothing is lost here.
#
# ## A rule of thumb
#
# | you want | begin with |
# |---|---|
# | full fine-tuning in little memory | `mlorc_adamw`, rank 4, AdamW's learning rate |
# | the least state | `mlorc_lion` or `apollo_adamw` at rank 1, `per="tensor"` |
# | pre-training from scratch | `apollo_adamw` or `fira_adamw`, rank width / 4 |
# | the cheapest step | `galore_adamw`, which leaves out what the projection drops |
# | no rank to choose | `adarankgrad_adamw`: [notebook 04](04_pretrain_llama.ipynb) |
# | bytes instead of floats, at any of it | `quantize_state` around it |
