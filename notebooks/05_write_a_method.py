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
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lowrank-optax/lowrank_optax/blob/main/notebooks/05_write_a_method.ipynb)
#
# # Write a method in thirty lines
#
# A method is a choice of parts: a *subspace*, a *refresh* rule, what happens to the
# moments at a refresh (*transfer*), and what is done with the rest of the gradient
# (*recovery*). Trees, dtypes, transposes, seeds, bad gradients and sharding belong to
# the engine. So a new method is a part that is missing. This one takes its basis from
# columns of the gradient itself, drawn by their norms, as sketches in numerical linear
# algebra do. [CONTRIBUTING.md](../CONTRIBUTING.md) has the same recipe.

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
# ## The part
#
# A part is a frozen dataclass; a subspace has one method, `select`. Its law: columns
# that are orthonormal, or zero. The gradient comes as `(*batch, m, n)` in float32, on
# its own scale and with the basis side on the left; the old basis says which rank is
# wanted. With `...` and axes counted from the end, stacks of matrices work too. The
# norms are sums of magnitudes, as squares of a small gradient would be zero.

# %%
import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class SampledRows:
    """The basis is r unit vectors: rows of the gradient, drawn by their norms."""

    def select(self, key, grad, old, step):
        norms = jnp.linalg.norm(grad, ord=1, axis=-1)
        noise = lro.linalg.draw(jax.random.gumbel, key, norms.shape, norms.dtype)
        _, chosen = jax.lax.top_k(jnp.log(norms) + noise, old.shape[-1])
        return jax.nn.one_hot(chosen, grad.shape[-2], axis=-2, dtype=grad.dtype)


def row_project(inner, *, rank, update_every=200, scale=1.0, matrices=None, key=0):
    return lro.project_gradients(
        inner,
        rank=rank,
        subspace=SampledRows(),
        refresh=lro.Every(update_every),
        transfer=lro.Rotate(),
        scale=scale,
        matrices=matrices,
        key=key,
    )


# %% [markdown]
# The largest of `log p + Gumbel noise` are a draw without replacement by weights p:
# that is all the sampling there is. The seed is the parameter's path and the step, so
# that a restart, or another number of hosts, draws the same rows.
#
# ## The law
#
# Orthonormal columns, and no span but that of r rows: exactly r of them are left
# without a residual.

# %%
import numpy as np

rng = np.random.default_rng(0)
RANK, ROWS, COLUMNS = 4, 12, 20
grad = rng.standard_normal((3, ROWS, COLUMNS)).astype(np.float32)  # a stack of three
old = jnp.zeros((3, ROWS, RANK))
basis = np.asarray(SampledRows().select(jax.random.key(1), grad, old, 0), float)

identity = np.broadcast_to(np.eye(RANK), (3, RANK, RANK))
np.testing.assert_allclose(basis.mT @ basis, identity, atol=1e-5)
residual = np.linalg.norm(grad - basis @ (basis.mT @ grad), axis=-1)
spanned = (residual < 1e-4).sum(axis=-1)
print("rows within the span, of each matrix of the stack:", spanned)
assert np.all(spanned == RANK)

# %% [markdown]
# ## The method against a formula
#
# A whole optimizer is tested against the paper's algorithm, written a second time in
# NumPy and float64. Bases are random here, so the formula takes the basis $P$ from the
# state, and follows what is done with it. Between two refreshes that is
#
# $$R = P^\top G,\quad M \leftarrow \beta_1 M + (1-\beta_1) R,\quad
# V \leftarrow \beta_2 V + (1-\beta_2) R \circ R,\quad
# \Delta = \alpha\, P\, \frac{M / (1-\beta_1^t)}{\sqrt{V / (1-\beta_2^t)} + \epsilon}.$$

# %%
SCALE, B1, B2, EPS = 0.25, 0.9, 0.999, 1e-8


def formula(basis, grads):
    """The updates of a run of Adam in the subspace of one basis."""
    m = v = 0.0
    for t, g in enumerate(grads, start=1):
        r = basis.T @ g
        m, v = B1 * m + (1 - B1) * r, B2 * v + (1 - B2) * r**2
        yield SCALE * basis @ (m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + EPS))


tx = row_project(optax.scale_by_adam(B1, B2, EPS), rank=RANK, scale=SCALE)
grads = rng.standard_normal((5, ROWS, COLUMNS)).astype(np.float32)
params = {"w": jnp.zeros((ROWS, COLUMNS))}
state, update, updates = tx.init(params), jax.jit(tx.update), []
for g in grads:
    u, state = update({"w": g}, state, params)
    updates.append(np.asarray(u["w"]))

basis = np.asarray(optax.tree.get(state, "basis")["w"], np.float64)
expected = list(formula(basis, grads.astype(np.float64)))
np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-4)
worst = max(np.abs(u - e).max() for u, e in zip(updates, expected, strict=True))
print(f"five updates differ from the formula by at most {worst:.1e}")

# %% [markdown]
# What it keeps is predicted by a formula too: a basis, m x r, and two moments, r x n.

# %%
numbers = ROWS * RANK + 2 * RANK * COLUMNS
counters = lro.state_bytes(tx, {})
assert lro.state_bytes(tx, params) == 4 * numbers + counters
print(lro.describe(tx, params))

# %% [markdown]
# ## The method at work
#
# The examples' training loop takes any optimizer. Here is the new one beside leading
# and beside random subspaces, at equal rank, on a small LLaMA.

# %%
import sysconfig
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from examples.common.interrupt import StopRequest
from examples.common.loop import METRICS_FILE, Timetable, train
from examples.common.metrics import read_metrics
from examples.common.report import STYLE, smooth
from examples.common.schedule import warmup_cosine
from examples.llama.pretrain import Pretrain, prepare

# %matplotlib inline
plt.rcParams.update(STYLE)

STEPS, EVERY, PROJECTED = (4, 2, 4) if SMALL else (150, 25, 16)
settings = Pretrain(
    model="smoke" if SMALL else "tiny",
    # All sources of the standard library, or those of one small package.
    data=f"path:{sysconfig.get_paths()['stdlib']}/json" if SMALL else "stdlib",
    steps=STEPS,
    batch_size=4 if SMALL else 8,
    seq_len=16 if SMALL else 128,
)
out = Path(tempfile.mkdtemp())
job = prepare(settings, out)


def optimizer(subspace):
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        lro.project_gradients(
            optax.scale_by_adam(),
            rank=PROJECTED,
            subspace=subspace,
            refresh=lro.Every(EVERY),
            transfer=lro.Rotate(),
            scale=0.25,
        ),
        optax.scale_by_learning_rate(warmup_cosine(1e-2, STEPS)),
    )


candidates = {
    "sampled rows": SampledRows(),
    "leading (GaLore)": lro.TopSingular(),
    "random": lro.RandomOrthonormal(),
}
if SMALL:
    candidates = dict(list(candidates.items())[:1])
timetable = Timetable(
    STEPS, log_every=1, eval_every=EVERY, checkpoint_every=STEPS, shrink_every=STEPS
)
records = {}
for name, subspace in candidates.items():
    directory = out / name
    stop, tx = StopRequest(), optimizer(subspace)
    train(job.task, tx, timetable, None, directory, name, stop)
    records[name] = read_metrics(directory / METRICS_FILE)

# %%
figure, (left, right) = plt.subplots(
    1, 2, figsize=(10, 3.8), sharey=True, layout="constrained"
)
for name, rows in records.items():
    trained = [row for row in rows if "loss" in row]
    steps = [row["step"] for row in trained]
    left.plot(steps, smooth([row["loss"] for row in trained]), label=name)
    validated = [row for row in rows if "validation_loss" in row]
    steps = [row["step"] for row in validated]
    losses = [row["validation_loss"] for row in validated]
    right.plot(steps, losses, marker="o", ms=3, label=name)
    print(f"{name:17} validation loss {losses[-1]:.3f}")
left.set(xlabel="step", ylabel="loss (nats per token)", title="training, smoothed")
right.set(xlabel="step", title="validation")
right.legend()
plt.show()

# %% [markdown]
# On so small a model the choice of the subspace hardly shows, and one seed decides
# nothing; that it trains at all is what this run tells.
#
# To bring a method into the library: put the part and the functions into one file of
# `lowrank_optax/_src/methods`, add them to `tests/registry.py`, which runs the common
# tests (`jit`, `scan`, sharding, checkpoints, bad gradients, ...), and to the other
# places that [CONTRIBUTING.md](../CONTRIBUTING.md) lists: a test names what was
# forgotten. A refresh rule, a transfer, a recovery or a codec goes the same way;
# [COMPOSITIONS.md](../COMPOSITIONS.md) says which parts combine.
