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
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lowrank-optax/lowrank_optax/blob/main/notebooks/04_pretrain_llama.ipynb)
#
# # Pre-train a LLaMA: I3S, and ranks that shrink
#
# GaLore projects gradients onto their leading singular vectors. Two papers ask whether
# these are the right ones, and whether there must always be as many:
#
# - **I3S** draws the singular vectors at random, by their singular values, so that the
#   subspaces of a run differ and together cover more.
# - **AdaRankGrad** takes as many as hold a given share of the gradient's energy. That
#   rank falls along a run, and the memory of what is no longer used can be freed.
#
# A small LLaMA is trained on the source text of Python's standard library, with the
# parts of `examples/llama`; `python -m examples.llama.pretrain` runs the same job, up
# to the papers' models and C4.

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
# ## The job
#
# `MODEL` is a name in `examples/llama/configs` (`llama_60m` wants a GPU or a TPU) or a
# Hugging Face `config.json`. `DATA` is `stdlib`, `path:...` or `hf:allenai/c4`.

# %%
import dataclasses
import sysconfig
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from examples.common.interrupt import StopRequest
from examples.common.report import STYLE, loss_curves, markdown_table, memory_bars
from examples.llama import subspaces
from examples.llama.pretrain import SMOKE, Pretrain, prepare

# %matplotlib inline
plt.rcParams.update(STYLE)

MODEL, DATA = "tiny", "stdlib"
METHODS = ("adamw", "i3s_adamw", "adarankgrad_adamw")

settings = Pretrain(
    model=MODEL,
    data=DATA,
    methods=METHODS,
    steps=120,
    rank=32,
    update_every=30,
    eval_every=15,
    shrink_every=40,
)
if SMALL:
    settings = dataclasses.replace(
        SMOKE,
        data=f"path:{sysconfig.get_paths()['stdlib']}/json",
        methods=METHODS[1:2],
        steps=4,
        seq_len=16,
        update_every=2,
    )
job = prepare(settings, Path(tempfile.mkdtemp()))
print(f"{job.model_fact}, {len(job.tokens.train):,} tokens of text")

# %% [markdown]
# ## Training
#
# The example's loop logs, validates, saves checkpoints, and calls `rank.shrink` every
# `shrink_every` steps; it says what that freed.

# %%
runs = [job.run(method, StopRequest()) for method in settings.methods]

# %%
figure, caption = loss_curves(runs)
plt.show()
print(caption)

# %%
header = ["method", "rank", "validation loss", "state (MiB)", "freed (MiB)"]
rows = []
for run in runs:
    freed = sum(record.get("freed_bytes", 0) for record in run.records)
    rank = "" if run.rank is None else str(run.rank)
    state = f"{run.state_bytes / 2**20:.2f}"
    cells = [run.method, rank, f"{run.validation_loss:.3f}"]
    rows.append([*cells, state, f"{freed / 2**20:.2f}"])
print(markdown_table(header, rows))

# %%
figure, caption = memory_bars(runs)
plt.show()
print(caption)

# %% [markdown]
# ## Ranks that shrink
#
# The same by hand. `adaptive_rank` keeps the state at its largest rank and sets unused
# columns of a basis to zero, since arrays under `jit` cannot change their size. How
# many are in use, `diagnostics.state_metrics` tells. `rank.shrink` is for the host,
# between steps: it cuts the arrays and hands back a transformation for them.

# %%
MAX_RANK, STEPS = (16, 4) if SMALL else (64, 60)
task, params = job.task, job.task.init()
tx = lro.adarankgrad_adamw(1e-2, MAX_RANK, max_interval=STEPS // 4)
gradient = jax.jit(jax.grad(task.loss))


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


state, update, used = tx.init(params), jax.jit(tx.update), []
for t in range(STEPS):
    grads = gradient(params, task.batch(t))
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    metrics = lro.diagnostics.state_metrics(state)
    used.append({k: float(v) for k, v in metrics.items() if k.startswith("rank/")})

before = nbytes(state)
tx, state = lro.rank.shrink(tx, state, params, multiple_of=8)
print(f"state: {before:,} bytes, and {nbytes(state):,} after rank.shrink")

# %%
kinds = sorted({path.split("/")[-2] for path in used[0]})
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for kind in kinds:
    mine = [path for path in used[0] if path.split("/")[-2] == kind]
    means = [sum(now[path] for path in mine) / len(mine) for now in used]
    axes.step(range(1, STEPS + 1), means, where="post", label=kind)
axes.set(xlabel="step", ylabel="columns in use", title=f"of a rank of {MAX_RANK}")
axes.legend(ncols=2, fontsize="small")
plt.show()

# %% [markdown]
# Training goes on with the smaller state, compiled anew for its shapes.

# %%
update = jax.jit(tx.update)
updates, state = update(gradient(params, task.batch(STEPS)), state, params)
params = optax.apply_updates(params, updates)
held_out = float(jax.jit(task.loss)(params, task.validation[0]))
print(f"loss on a batch held out: {held_out:.3f}")

# %% [markdown]
# ## How far the subspaces move
#
# `examples/llama/subspaces.py` trains with GaLore and with I3S at equal rank, and
# compares the bases with `diagnostics.subspace_overlap` whenever they are chosen anew:
# 1 for the same subspace, rank / width for random ones.

# %%
RANK = 4 if SMALL else 32
compared = dataclasses.replace(
    settings,
    methods=subspaces.METHODS,
    steps=3 if SMALL else 80,
    update_every=1 if SMALL else 10,
    rank=RANK,
)
job = dataclasses.replace(job, settings=compared)
overlaps, values = [], []
for method in subspaces.METHODS:
    moved, spectrum = subspaces.follow(job, method)
    overlaps += moved
    values += spectrum
subspaces.draw(overlaps, values)
plt.show()

# %%
width = job.config.hidden_size
print(f"random subspaces would overlap by {RANK / width:.2f}")
last = max(row["step"] for row in overlaps)
for method in subspaces.METHODS:
    end = [r for r in overlaps if r["method"] == method and r["step"] > last / 2]
    mean = sum(row["adjacent"] for row in end) / len(end)
    print(f"{method:13} overlap with the subspace before: {mean:.2f}")

# %% [markdown]
# From one choice to the next, GaLore's subspaces have more in common than I3S's, which
# are drawn, and more as the run goes on: what lies outside stays outside for longer.
# I3S adds to the weights in a few more directions, as the last panel shows. In the
# paper's pre-training of LLaMA-60M GaLore's overlap becomes large after the early
# stage, which this run does not go beyond.
#
# One seed, 120 steps and rates from a coarse search do not rank the methods above.
