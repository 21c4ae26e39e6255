"""Trajectories of the authors' own PyTorch optimizers on fixed gradients.

The files in `data/golden` hold numbers only (its README says which): three matrices,
twelve gradients each, and where the reference went. At every step the displacement from
the start must agree, in relative Frobenius error.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro

GOLDEN = Path(__file__).parent / "data" / "golden"
LEAVES = 3


def galore(meta):
    # The reference computes an exact SVD. Its epsilon, added to the uncorrected root,
    # is small enough for the place not to matter.
    return lro.galore_project(
        optax.scale_by_adam(meta["b1"], meta["b2"], meta["eps"]),
        rank=meta["rank"],
        update_every=meta["update_every"],
        scale=meta["scale"],
        subspace=lro.TopSingular("svd"),
    )


def mlorc_adam(meta):
    return lro.mlorc_scale_by_adam(
        meta["rank"], b1=meta["b1"], b2=meta["b2"], eps=meta["eps"]
    )


def ldadam(meta):
    names = "rank", "b1", "b2", "eps", "rho", "error_feedback"
    return lro.scale_by_ldadam(**{name: meta[name] for name in names})


def mlorc_lion(meta):
    return lro.mlorc_scale_by_lion(meta["rank"], b1=meta["b1"], b2=meta["b2"])


def fira(meta):
    # Whose limiter is on is the reference form, which sees the uncorrected moments.
    limited = meta["limiter"] is not None
    return lro.fira_project(
        optax.scale_by_adam(meta["b1"], meta["b2"], meta["eps"]),
        rank=meta["rank"],
        update_every=meta["update_every"],
        scale=meta["alpha"],
        limiter=meta["limiter"] if limited else float("inf"),
        reference=(meta["b1"], meta["b2"]) if limited else None,
        subspace=lro.TopSingular("svd"),
    )


TRAJECTORIES = {
    "galore_scale0.25_wd0.0_gap5": (galore, 1e-4),
    "galore_scale0.25_wd0.0_gap50": (galore, 1e-4),
    "galore_scale1.0_wd0.1_gap50": (galore, 1e-4),
    "ldadamw_ef0": (ldadam, 1e-4),
    "ldadamw_ef1": (ldadam, 1e-4),
    "mlorc_adamw_lowrank": (mlorc_adam, 1e-3),
    "mlorc_lion_lowrank": (mlorc_lion, 1e-5),
    "fira": (fira, 1e-4),
    "fira_nolimiter": (fira, 1e-4),
}


def test_every_file_is_used():
    assert {path.stem for path in GOLDEN.glob("*.npz")} == set(TRAJECTORIES)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectory(name):
    factory, tolerance = TRAJECTORIES[name]
    with np.load(GOLDEN / f"{name}.npz") as file:
        data = dict(file)
    meta = json.loads(str(data["meta"]))
    names = {f"w{i}": i for i in range(LEAVES)}
    start = {name: data[f"p0_{i}"] for name, i in names.items()}
    params = jax.tree.map(jnp.asarray, start)
    tx = factory(meta)
    update, state = jax.jit(tx.update), tx.init(params)
    for t in range(len(data["g_0"])):
        grads = {name: data[f"g_{i}"][t] for name, i in names.items()}
        directions, state = update(grads, state, params)
        # As the reference does it, which decays the weight that it has just updated.
        decay = 1 - meta["lr"] * meta.get("weight_decay", 0.0)
        params = {w: (params[w] - meta["lr"] * directions[w]) * decay for w in names}
        for w, i in names.items():
            expected = data[f"p_{i}"][t] - start[w]
            error = np.linalg.norm(params[w] - start[w] - expected)
            assert error <= tolerance * np.linalg.norm(expected), (t, i)
