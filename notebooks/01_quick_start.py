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
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lowrank-optax/lowrank_optax/blob/main/notebooks/01_quick_start.ipynb)
#
# # Quick start
#
# Adam keeps two numbers for every weight. The optimizers here keep a few rows and
# columns of them, and take the place of `optax.adamw` in one line. This notebook
# trains one small model three times, and changes nothing but that line.
#
# The first cell installs the library where it is missing, for the accelerator that it
# finds.

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
# ## A model and its data
#
# The model reads 16 bytes of Python's own standard library and guesses the next one: an
# embedding, two hidden layers, a head. Parameters are a plain dictionary of arrays.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from examples.common.data import stdlib_documents
from examples.common.report import STYLE, smooth

# %matplotlib inline
plt.rcParams.update(STYLE)

WIDTH, CONTEXT = (32, 16) if SMALL else (512, 16)
STEPS, BATCH = (10, 32) if SMALL else (400, 256)

text = "".join(source for _, source in stdlib_documents()[:100])
corpus = np.frombuffer(text.encode(), np.uint8)


def batch(step):
    """Rows of 17 bytes, the same for every optimizer."""
    starts = np.random.default_rng(step).integers(len(corpus) - CONTEXT, size=BATCH)
    return corpus[starts[:, None] + np.arange(CONTEXT + 1)].astype(np.int32)


def init(key):
    def matrix(key, m, n):
        return jax.random.normal(key, (m, n)) / np.sqrt(m)

    keys = jax.random.split(key, 4)
    return {
        "embed": jax.random.normal(keys[0], (256, 32)),
        "first": {"w": matrix(keys[1], 32 * CONTEXT, WIDTH), "b": jnp.zeros(WIDTH)},
        "second": {"w": matrix(keys[2], WIDTH, WIDTH), "b": jnp.zeros(WIDTH)},
        "head": {"w": matrix(keys[3], WIDTH, 256), "b": jnp.zeros(256)},
    }


def loss(params, rows):
    x = params["embed"][rows[:, :-1]].reshape(len(rows), -1)
    for name in ("first", "second"):
        x = jax.nn.gelu(x @ params[name]["w"] + params[name]["b"])
    logits = x @ params["head"]["w"] + params["head"]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, -1]).mean()


params = init(jax.random.key(0))
print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters")

# %% [markdown]
# ## Three optimizers
#
# **MLorc-AdamW** stores both moments of Adam at rank 4. **GaLore-AdamW** runs Adam
# inside a rank-32 subspace of the gradient, which it chooses anew every 50 steps. Both
# are ordinary `optax.GradientTransformation`s: they go into `optax.chain`, under `jit`,
# and take a schedule for a learning rate.

# %%
optimizers = {
    "adamw": optax.adamw(1e-3),
    "mlorc_adamw": lro.mlorc_adamw(1e-3, rank=4),
    "galore_adamw": lro.galore_adamw(1e-2, rank=32, update_every=50),
}

# %% [markdown]
# What an optimizer will keep is known before anything is allocated. `describe` says
# what it makes of each parameter: matrices are treated at low rank; embeddings, heads
# and vectors go through the same optimizer at full rank, and the last column says why.

# %%
print(lro.describe(optimizers["mlorc_adamw"], params))

# %%
sizes = {name: lro.state_bytes(tx, params) for name, tx in optimizers.items()}
for name, size in sizes.items():
    print(f"{name:13} {size:>10,} bytes of state")

# %% [markdown]
# ## Training
#
# The loop is the one you have: gradients, `update`, `apply_updates`.


# %%
def train(tx):
    """The loss of every step."""

    @jax.jit
    def step(params, state, rows):
        value, grads = jax.value_and_grad(loss)(params, rows)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = init(jax.random.key(0))
    state, losses = tx.init(params), []
    for t in range(STEPS):
        params, state, value = step(params, state, batch(t))
        losses.append(float(value))
    return losses


losses = {}
for name, tx in optimizers.items():
    clipped = optax.chain(optax.clip_by_global_norm(1.0), tx)
    losses[name] = train(clipped)
    last = np.mean(losses[name][-STEPS // 10 :])
    print(f"{name:13} {last:.3f} nats per byte over the last tenth of the steps")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
for name, values in losses.items():
    left.plot(smooth(values), label=name)
left.set(xlabel="step", ylabel="loss (nats per byte)", title="training, smoothed")
left.legend()
bars = right.bar(list(sizes), [size / 2**20 for size in sizes.values()])
right.bar_label(bars, fmt="%.2f", padding=2)
right.set(ylabel="optimizer state (MiB)", title="memory")
right.grid(visible=False, axis="x")

# %% [markdown]
# One run with rates from a coarse search ranks no methods. What remains of the state is
# mostly that of the embedding and the head; in a large model these are a small part.
#
# ## Next
#
# - [02 Choosing a method and a rank](02_method_and_rank.ipynb): memory of LLaMA-7B.
# - [03 Fine-tune an encoder](03_fine_tune_an_encoder.ipynb)
# - [04 Pre-train a LLaMA](04_pretrain_llama.ipynb): I3S, and ranks that shrink.
# - [05 Write a method](05_write_a_method.ipynb) in thirty lines.
# - [06 Many devices](06_many_devices.ipynb)
