"""Adam-mini against its formulas: the blocks of each kind of leaf, alone and inside."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from running import assert_close, random_grads, random_like, relative_error, run

import lowrank_optax as lro
from lowrank_optax._src.leaves.box import ParamBox

STEPS, PERIOD, RANK = 50, 10, 3


def mini(grads, axes, b1=0.9, b2=0.999, eps=1e-8):
    """Adam with one second moment for all indices of these axes."""
    m = v = 0.0
    for t, g in enumerate(map(reference.wide, grads), start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (g**2).mean(axes, keepdims=True)
        assert np.all(v >= 0)
        yield m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


# Leaves, and the axes over which the second moment is averaged: not the longer one.
SHAPES = {
    "wide": ((4, 6), 0),
    "tall": ((6, 4), 1),
    "square": ((5, 5), 0),
    "embed": ((9, 4), 1),
    "lm_head": ((4, 9), 0),
    "stack": ((3, 4, 6), 1),
    "row": ((1, 5), 0),
    "column": ((5, 1), 1),
    "bias": ((6,), ()),
    "scalar": ((), ()),
}


def gradients(shapes, steps):
    """Rows, columns and steps of different sizes."""
    params = {k: jnp.zeros(shape) for k, shape in shapes.items()}
    grads = random_grads(params, steps)
    sizes = [
        jax.tree.map(lambda p: jnp.exp(p), g) for g in random_grads(params, 1, seed=99)
    ]
    return params, [jax.tree.map(jnp.multiply, g, sizes[0]) for g in grads]


def test_every_kind_of_leaf_follows_the_formulas():
    shapes = {k: shape for k, (shape, _) in SHAPES.items()}
    params, grads = gradients(shapes, STEPS)
    updates, state = run(lro.scale_by_adam_mini(), params, grads)
    for name, (shape, axes) in SHAPES.items():
        expected = mini([g[name] for g in grads], axes)
        for u, want in zip(updates, expected, strict=True):
            assert relative_error(u[name], want) < 1e-4
        blocks = np.zeros(shape).mean(axes).size
        assert state.nu[name].size == blocks
        assert np.all(np.asarray(state.nu[name]) > 0)
    adam, _ = run(optax.scale_by_adam(), params, grads[:3])
    assert_close(updates[2]["bias"], adam[2]["bias"])
    assert relative_error(updates[2]["wide"], adam[2]["wide"]) > 1e-2


def test_blocks_can_be_named():
    shapes = {"query": (4, 3, 2), "stack": (3, 4, 6), "free": (4, 6)}
    matrices = {"query": lro.MatrixAxes(rows=(0, 2), cols=1), "free": None}
    matrices["stack"] = lro.MatrixAxes(rows=-1, cols=-2)
    params, grads = gradients(shapes, 3)
    updates, state = run(lro.scale_by_adam_mini(matrices=matrices), params, grads)
    assert {k: x.size for k, x in state.nu.items()} == {
        "query": 3,
        "stack": 12,
        "free": 24,
    }
    for name, axes in {"query": (0, 2), "stack": 2, "free": ()}.items():
        expected = list(mini([g[name] for g in grads], axes))
        assert relative_error(updates[2][name], expected[2]) < 1e-5


@pytest.mark.parametrize("per", ["column", "basis vector"])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=str)
def test_inside_a_subspace_it_follows_the_formulas(shape, per):
    by_vector = lro.MatrixAxes(rows=-1, cols=-2)
    inner = lro.scale_by_adam_mini(matrices=None if per == "column" else by_vector)
    tx = lro.galore_project(inner, rank=RANK, update_every=PERIOD, scale=0.5)
    grads = list(random_like({"g": (STEPS, *shape)}, 0)["g"])
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    turned = shape[0] > shape[1]
    bases, low, updates = [], [], []
    for g in grads:
        u, state = update(g, state)
        updates.append(u.T if turned else u)
        bases.append(reference.wide(state.basis))
        low.append(bases[-1].T @ reference.wide(g.T if turned else g))
    assert state.inner_state.nu.size == (9 if per == "column" else RANK)
    assert len({basis.tobytes() for basis in bases}) == STEPS // PERIOD
    expected = mini(low, 0 if per == "column" else 1)
    for u, basis, want in zip(updates, bases, expected, strict=True):
        assert relative_error(u, 0.5 * basis @ want) < 1e-4


def test_rotation_leaves_the_shared_second_moments():
    # C o C would make r of them out of one.
    g, other = random_like({"g": (2, 6, 9)}, 0)["g"]
    tx = lro.galore_project(
        lro.scale_by_adam_mini(), rank=RANK, update_every=1, transfer=lro.Rotate()
    )
    _, before = run(tx, g, [g])
    _, after = run(tx, g, [other], before)
    overlap = after.basis.T @ before.basis
    assert relative_error(overlap, np.eye(RANK)) > 0.1
    low = after.basis.T @ other
    nu = 0.999 * before.inner_state.nu + 0.001 * (low**2).mean(0)
    assert_close(after.inner_state.nu, nu)
    mu = 0.9 * overlap @ before.inner_state.mu + 0.1 * low
    assert_close(after.inner_state.mu, mu, atol=1e-5)


def test_a_bad_gradient_leaves_a_usable_state():
    g = random_like({"w": (6, 9), "b": (9,)}, 0)
    tx = lro.scale_by_adam_mini()
    tx = tx._replace(update=jax.jit(tx.update))
    _, before = tx.update(g, tx.init(g))
    bad = g | {"w": g["w"].at[0, 0].set(jnp.nan)}
    updates, after = tx.update(bad, before)
    assert_close(after.nu["w"], before.nu["w"])
    assert_close(after.mu["w"], before.mu["w"])
    assert np.all(np.isfinite(updates["b"]))
    zero = jax.tree.map(jnp.zeros_like, g)
    for start in (after, tx.init(g)):
        updates, state = tx.update(zero, start)
        updates, _ = tx.update(g, state)
        for u in updates.values():
            assert np.all(np.isfinite(u)) and np.any(np.asarray(u))


def test_the_state_of_a_stack_is_annotated_on_its_own_axes():
    # nnx.vmap stacks layers in front without telling the annotation.
    layers = ParamBox(jnp.zeros((3, 4, 6)), "w", ("rows", "columns"))
    state = lro.scale_by_adam_mini().init({"w": layers})
    assert state.mu["w"].out_sharding == (None, "rows", "columns")
    assert state.nu["w"].out_sharding == (None, None, "columns")


# Sizes (M-7)

M, N, S, L = 40, 24, 24, 40


def test_state_size():
    params = {"w": jax.ShapeDtypeStruct((M, N), jnp.float32)}
    params["b"] = jax.ShapeDtypeStruct((N,), jnp.float32)
    numbers = M * N + L + 2 * N
    assert lro.state_bytes(lro.scale_by_adam_mini(), params) == 4 * (numbers + 1)
    assert lro.state_bytes(lro.adam_mini(0.1), params) == 4 * (numbers + 1)
    (row,) = lro.describe(lro.galore_adam_mini(0.1, 3), {"w": jnp.ones((16, 24))})
    assert row.rank == 3  # though a row of squares is kept, one a column
    for r in (4, 11):
        numbers = S * r + L * r + L + 2 * N
        tx = lro.galore_adam_mini(0.1, r)
        assert lro.state_bytes(tx, params) == 4 * (numbers + 2)


def test_the_optimizers_are_their_parts():
    params = random_like({"w": (6, 9), "frozen": (6, 9)}, 0)
    grads = random_grads(params, 3)
    shared = dict(b1=0.8, b2=0.9, eps=1e-3)
    decay = dict(weight_decay=0.5, mask={"w": True, "frozen": False})
    inner = lro.scale_by_adam_mini(**shared)
    galore = lro.galore_project(inner, rank=RANK, update_every=2, scale=0.5)
    for tx, method in [
        (lro.adam_mini(0.1, **shared, **decay), inner),
        (
            lro.galore_adam_mini(
                0.1, RANK, update_every=2, scale=0.5, **shared, **decay
            ),
            galore,
        ),
    ]:
        updates, _ = run(tx, params, grads)
        directions, _ = run(method, params, grads)
        for u, d in zip(updates, directions, strict=True):
            assert_close(u["w"], -0.1 * (d["w"] + 0.5 * params["w"]))
            assert_close(u["frozen"], -0.1 * d["frozen"])
