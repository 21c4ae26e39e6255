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
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lowrank-optax/lowrank_optax/blob/main/notebooks/03_fine_tune_an_encoder.ipynb)
#
# # Fine-tune an encoder
#
# Several optimizers fine-tune one encoder on one task, with the parts of
# `examples/roberta`; the command `python -m examples.roberta.glue` runs the same job.
# Nothing is downloaded unless you ask for it: the encoder is made here, by masked
# language modelling of docstrings, and the task is to tell which package of Python's
# standard library a snippet is from.

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
# ## Model, task and methods
#
# For the real thing, name a Hugging Face directory or hub name, and a task of GLUE:
# `MODEL, TASK, DATA = "FacebookAI/roberta-base", "mrpc", "auto"`, where `DATA` may be a
# directory with the task's files.

# %%
import dataclasses
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from examples.common.interrupt import StopRequest
from examples.common.report import STYLE, markdown_table, memory_bars
from examples.common.seeds import curves, scores
from examples.roberta.glue import prepare
from examples.roberta.report import constant_score
from examples.roberta.settings import SMOKE, Glue

# %matplotlib inline
plt.rcParams.update(STYLE)

MODEL, TASK, DATA = "small", "stdlib", "auto"
METHODS = ("adamw", "mlorc_adamw", "galore_adamw", "ldadamw", "lora", "scratch")

settings = Glue(
    model=MODEL,
    task=TASK,
    data=DATA,
    methods=METHODS,
    rank=8,
    epochs=3,
    train_examples=2000,
    validation_examples=400,
    pretrain_steps=400,
)
if SMALL:
    settings = dataclasses.replace(
        SMOKE,
        methods=METHODS[:1],
        train_examples=32,
        validation_examples=16,
        max_length=16,
        pretrain_steps=2,
    )
job = prepare(settings, Path(tempfile.mkdtemp()))
data = job.facts["data"]
print(f"{job.settings.chosen_task.title}: {', '.join(data['labels'])}")
print(
    f"{data['train_examples']:,} examples to train on, in {job.steps} steps;", end=" "
)
print(f"{data['validation_examples']:,} from other files to validate on")
print(f"the best constant answer has an accuracy of {constant_score(job):.1%}")

# %% [markdown]
# The job builds each optimizer with a warm-up, a linear decay and a clip of the
# gradient's norm. `describe` says what it makes of the classifier: the encoder's
# matrices are treated at low rank, embeddings and the fresh head in full.

# %%
tx = job.optimizer(METHODS[1], job.settings.rates(METHODS[1])[0])
shapes = job.shapes(METHODS[1])
rows = lro.describe(tx, shapes)
print(*str(rows).splitlines()[:1], sep="\n")
for row, line in zip(rows, str(rows).splitlines()[1:], strict=True):
    if "layers/0" in row.path or "layers" not in row.path:
        print(line.rstrip())

# %% [markdown]
# ## Pre-training, then a run of each method
#
# `lora` trains adapters and the head only; `scratch` is AdamW from random weights, to
# show what the pre-trained ones are worth. Each method has the learning rate that the
# example chose for it.

# %%
stop = StopRequest()
weights = job.load(stop)
trained = {method: job.run(method, weights, stop) for method in job.settings.methods}

# %%
header = ["method", "rank", "learning rate", "accuracy (%)", "trained", "state (MiB)"]
table = []
for method, found in trained.items():
    (run,) = found.runs.values()
    cells = [method, "" if run.rank is None else str(run.rank)]
    cells += [f"{run.learning_rate:g}", f"{100 * job.best(run)[job.score]:.1f}"]
    cells += [f"{run.trained_parameters:,}", f"{run.state_bytes / 2**20:.2f}"]
    table.append(cells)
print(markdown_table(header, table))

# %% [markdown]
# ## Scores, curves, memory

# %%
groups = {method: list(found.runs.values()) for method, found in trained.items()}
percents = {
    method: [100 * job.best(run)[job.score] for run in runs]
    for method, runs in groups.items()
}
task = job.settings.chosen_task
scores(percents, task.published, f"validation {job.score} (%)")
plt.show()

# %%
curves(groups, job.score, f"validation {job.score}")
plt.show()

# %%
memory_bars([runs[0] for runs in groups.values()])
plt.show()

# %% [markdown]
# These runs are kept short, so that a CPU does them while you read: a few minutes for
# all of it. Full fine-tuning and the low-rank optimizers already gain over the best
# constant answer and over random weights; LoRA, which leaves the weak embeddings as
# they are, learns more slowly. `Glue()` without arguments has the command's own
# settings, three times the work; with a pre-trained `MODEL` the same steps go much
# further. One seed tells methods apart only roughly: with `seeds=(0, 1, 2)` the plots
# show their spread.
#
# ## The fine-tuned model
#
# The best weights of every run were saved in Hugging Face's format, beside the
# tokenizer; `load_classifier` reads such a directory, `transformers` does too. Which
# packages does the first of the methods find hard to tell?

# %%
import numpy as np
from flax import nnx

from examples.roberta.weights import load_classifier

first = job.settings.methods[0]
best = next(job.out.glob(f"{first}/*/best"))
model = load_classifier(best, job.config.labels).model(nnx.Rngs(0))
predict = nnx.jit(lambda model, *inputs: model(*inputs).argmax(axis=-1))

(part,) = job.validation.values()
hits = {label: [] for label in data["labels"]}
for rows in part.validation_rows(job.batch_size):
    batch = part.batch(rows, job.batch_size)
    inputs = [batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")]
    found = np.asarray(predict(model, *inputs))[: len(rows)]
    for row, label in zip(rows, found, strict=True):
        name = data["labels"][part.labels[row]]
        hits[name].append(label == part.labels[row])

names = sorted(hits, key=lambda name: np.mean(hits[name] or 0))
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
bars = axes.barh(names, [100 * np.mean(hits[name] or 0) for name in names])
axes.bar_label(bars, [f"of {len(hits[name])}" for name in names], padding=3)
axes.set(xlabel="found (%)", title=f"{first}: validation examples of each class")
axes.set(xlim=(0, 108))
axes.grid(visible=False, axis="y")
plt.show()
