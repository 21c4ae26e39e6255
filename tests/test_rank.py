"""Shrinking: fewer bytes, the same trajectory, and a transformation that fits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from running import assert_close, random_like, relative_error, run

import lowrank_optax as lro

# An epsilon that hides what float32 leaves of moments that should be zero.
STEADY = optax.scale_by_adam(eps=1e-3)
SHAPES = {"low": (10, 14), "stack": (2, 12, 8), "bias": (8,)}


def gradients(steps, rank=3, noise=0.0):
    """Of a rank far below the maximum, their subspace turning."""
    rng = np.random.default_rng(0)
    sides = {
        k: [rng.standard_normal((2, *s[:-2], m, 6)) for m in s[-2:]]
        for k, s in SHAPES.items()
        if len(s) > 1
    }
    grads = []
    for t in range(steps):
        g = {"bias": rng.standard_normal(8)}
        for name, ends in sides.items():
            a, b = (np.cos(t / 20) * x[0] + np.sin(t / 20) * x[1] for x in ends)
            g[name] = a * (np.arange(6) < rank) * 0.7 ** np.arange(6) @ b.mT
            g[name] += noise * rng.standard_normal(g[name].shape)
        grads.append({k: jnp.asarray(x, jnp.float32) for k, x in g.items()})
    return grads


def adaptive(inner=STEADY, **changes):
    settings = dict(max_rank=8, max_residual_energy=0.02, max_interval=4)
    settings["matrices"] = lro.MatrixAxes()
    return lro.adaptive_rank(inner, **settings | changes)


def nbytes(state):
    return sum(x.nbytes for x in jax.tree.leaves(state))


def alike(parameters):
    return jax.tree.map(jnp.zeros_like, parameters)


INNERS = {
    "adam": lambda: adaptive(),
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0),
        adaptive(recovery=lro.FiraResidual()),
        optax.scale(-0.1),
    ),
}


@pytest.mark.parametrize("name", INNERS)
def test_the_trajectory_is_that_of_the_masked_state(name):
    tx, grads = INNERS[name](), gradients(12)
    _, state = run(tx, grads[0], grads[:6])
    want, last = run(tx, grads[0], grads[6:], state)
    small_tx, small = lro.rank.shrink(tx, state, grads[0], multiple_of=2)
    assert nbytes(small) < 0.8 * nbytes(state)
    got, small = run(small_tx, grads[0], grads[6:], small)
    for u, v in zip(got, want, strict=True):
        for leaf in u:
            assert relative_error(u[leaf], v[leaf]) < 1e-5
    ranks = lro.diagnostics.state_metrics(small)
    assert ranks["rank/low"] == lro.diagnostics.state_metrics(last)["rank/low"] <= 4


def test_bases_and_moments_are_cut_leaf_by_leaf():
    tx, grads = adaptive(), gradients(2)
    grads[1]["low"] = grads[1]["low"][:, :1] * jnp.ones((1, 14))  # of rank 1
    _, state = run(tx, grads[1], grads[1:])
    new, small = lro.rank.shrink(tx, state, grads[0], multiple_of=2)
    used = int(np.any(np.asarray(state.basis["stack"]) != 0, axis=(0, 1)).sum())
    multiple = used + used % 2
    assert used < 8 and multiple != 2
    chex.assert_shape(small.basis["low"], (14, 2))
    chex.assert_shape(small.inner_state.nu["low"], (2, 10))
    chex.assert_shape(small.basis["stack"], (2, 12, multiple))
    chex.assert_shape(small.inner_state.mu["stack"], (2, multiple, 8))
    chex.assert_shape(small.inner_state.mu["bias"], (8,))
    assert_close(small.basis["low"], state.basis["low"][:, :2], rtol=0, atol=0)
    numbers = 14 * 2 + 2 * 2 * 10 + 2 * (12 + 2 * 8) * multiple + 2 * 8
    counters, scalars = 2, 3 * 3  # of the one matrix and each of the stack
    assert nbytes(small) == 4 * (numbers + counters + scalars)
    # What the new transformation makes is what the new state is.
    chex.assert_trees_all_equal_shapes_and_dtypes(new.init(grads[0]), small)
    assert lro.state_bytes(new, grads[0]) == nbytes(small)
    assert lro.describe(new, grads[0])[1].rank == 2


@pytest.mark.parametrize("wider", [0, 1])
def test_of_two_bases_of_a_leaf_the_wider_one_decides(wider):
    # What the first leaves out reaches the second.
    parts = [adaptive(recovery=lro.FiraResidual()), adaptive(max_residual_energy=0.9)]
    if wider == 1:
        parts = [adaptive(max_residual_energy=0.9, recovery=lro.FiraResidual())]
        parts += [adaptive()]
    tx, grads = optax.chain(*parts), gradients(2)
    _, state = run(tx, grads[0], grads)
    used = [int(np.any(np.asarray(s.basis["low"]) != 0, axis=0).sum()) for s in state]
    assert used[wider] > used[1 - wider] >= 1
    new, small = lro.rank.shrink(tx, state, grads[0], multiple_of=1)
    assert [s.basis["low"].shape[-1] for s in small] == 2 * [used[wider]]
    for made in (new, lro.rank.fit(tx, small)):
        chex.assert_trees_all_equal_shapes(made.init(grads[0]), small)


def test_shrinking_goes_on_from_where_it_was():
    tx, grads = adaptive(), gradients(8)
    _, state = run(tx, grads[0], grads[:5])
    once, state = lro.rank.shrink(tx, state, grads[0], multiple_of=3)
    assert state.basis["low"].shape[-1] == 3
    again, same = lro.rank.shrink(once, state, grads[0], multiple_of=3)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(same), strict=True):
        assert x is y
    narrow = [
        {k: g[k] if k == "bias" else g[k][..., :1] * g[k][..., :1, :] for k in g}
        for g in grads
    ]
    _, state = run(again, grads[0], narrow, state)
    assert lro.diagnostics.state_metrics(state)["rank/low"] == 1
    _, state = lro.rank.shrink(again, state, grads[0], multiple_of=1)
    assert state.basis["low"].shape == (14, 1)


def test_what_compiles_its_init_is_shrunk_too():
    tx, grads = adaptive(), gradients(12)
    compiled = optax.GradientTransformationExtraArgs(jax.jit(tx.init), tx.update)
    params = alike(grads[0])
    state = compiled.init(params)
    for g in grads:
        _, state = jax.jit(tx.update)(g, state, params)
    _, wanted = lro.rank.shrink(tx, state, params, multiple_of=1)
    for _ in range(2):  # which JAX might answer from memory
        small, found = lro.rank.shrink(compiled, state, params, multiple_of=1)
        assert nbytes(found) == nbytes(wanted) < nbytes(state)
        chex.assert_trees_all_equal_shapes(small.init(params), found)
        assert lro.describe(compiled, params) == lro.describe(tx, params)


def test_a_rank_that_would_grow_is_held_at_what_is_left():
    tx, grads = adaptive(), gradients(6)
    _, state = run(tx, grads[0], grads[:2])
    tx, state = lro.rank.shrink(tx, state, grads[0], multiple_of=1)
    left = state.basis["low"].shape[-1]
    assert left < 6
    updates, state = run(tx, grads[0], gradients(6, rank=6, noise=1.0)[2:], state)
    assert lro.diagnostics.state_metrics(state)["rank/low"] == left
    assert np.linalg.matrix_rank(updates[-1]["low"]) == left


def test_what_has_not_started_keeps_its_rank():
    tx, params = adaptive(), alike(gradients(1)[0])
    state = tx.init(params)
    _, same = lro.rank.shrink(tx, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(same, state)


def test_moments_that_would_change_their_form_keep_their_rank():
    # Of fewer than 4,096 numbers, a moment is not stored in bytes.
    params = {"wide": jnp.ones((8, 600)), "wider": jnp.ones((8, 4096))}
    params = jax.tree.map(lambda p: p + random_like({"w": p}, 0)["w"], params)
    tx = lro.quantize_state(adaptive(side="short", max_residual_energy=0.9))
    state = tx.init(params)
    update = jax.jit(tx.update)
    _, state = update(params, state)
    new, small = lro.rank.shrink(tx, state, params, multiple_of=1)
    assert small.inner_state.basis["wide"].shape == (8, 8)
    assert small.inner_state.basis["wider"].shape[-1] < 8
    updates, _ = jax.jit(new.update)(params, small)
    assert_close(updates, update(params, state)[0])


def test_optimizers_without_bases_stay_as_they_are():
    params = {"w": jnp.ones((6, 8))}
    tx = optax.adam(0.1)
    state = tx.init(params)
    new, same = lro.rank.shrink(tx, state, params)
    assert all(
        x is y
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(same), strict=True)
    )
    assert_close(new.update(params, same)[0], tx.update(params, state)[0])


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (2.5, TypeError)])
def test_multiples_are_ints_of_at_least_one(value, error):
    tx, params = adaptive(), gradients(1)[0]
    with pytest.raises(error, match="`multiple_of`"):
        lro.rank.shrink(tx, tx.init(params), params, multiple_of=value)


def test_by_default_ranks_are_cut_to_multiples_of_eight():
    params = {"w": jnp.ones((24, 40))}  # of rank one
    tx = lro.adaptive_rank(optax.scale_by_adam(), max_rank=20)
    state = tx.update(params, tx.init(params))[1]
    _, small = lro.rank.shrink(tx, state, params)
    assert state.basis["w"].shape[-1] == 20 and small.basis["w"].shape[-1] == 8
