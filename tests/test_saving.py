"""What saves nothing stays at full rank, and is told."""

import inspect
import warnings

import jax
import jax.numpy as jnp
import pytest
from registry import METHODS

import lowrank_optax as lro
from lowrank_optax import MatrixAxes

PARAMS = {
    "square": jax.ShapeDtypeStruct((64, 64), jnp.float32),
    "lora": jax.ShapeDtypeStruct((32, 4), jnp.float32),
}
RANKED = {
    method.name: (method, name)
    for method in METHODS
    for name in ("rank", "max_rank")
    if name in inspect.signature(method.factory).parameters
}


@pytest.mark.parametrize("name", RANKED)
def test_a_rank_above_both_sides_costs_what_the_dense_optimizer_does(name):
    method, argument = RANKED[name]
    tx = method.make(**{argument: 10**9})
    with pytest.warns(UserWarning, match="this rank saves nothing") as told:
        state = jax.eval_shape(tx.init, PARAMS)
    assert len(told) == 1
    assert "'square' (64, 64)" in str(told[0].message)
    # By its long side a tall matrix takes less at full rank, too.
    side = inspect.signature(method.factory).parameters.get("side")
    long = method.kwargs.get("side", side and side.default) == "long"
    assert ("'lora' (32, 4)" in str(told[0].message)) != long
    dense = lro.state_bytes(method.dense, PARAMS)
    counters = 256
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) <= (
        dense + counters
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        updates, new = jax.eval_shape(tx.update, PARAMS, state, PARAMS)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert updates.keys() == PARAMS.keys()


@pytest.mark.parametrize("name", RANKED)
def test_a_leaf_that_is_named_is_a_matrix_at_any_rank(name):
    method, argument = RANKED[name]
    for matrices in (MatrixAxes(), lro.default_matrices(PARAMS)):
        tx = method.make(**{argument: 10**9}, matrices=matrices)
        views = [row.view for row in lro.describe(tx, PARAMS)]
        assert None not in views


SHAPES = {"w": (64, 64), "lora": (32, 4), "query": (40, 3, 8)}


@pytest.mark.parametrize("rank", [1, 3, 4, 16, 20, 31, 32, 48, 64, 128])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_default_rule_takes_less_than_adam_or_what_adam_does(name, rank, dtype):
    params = {name: jax.ShapeDtypeStruct(SHAPES[name], dtype)}
    m, n = SHAPES[name] if len(SHAPES[name]) == 2 else (40, 24)
    r, adam = min(rank, m, n), 2 * 4 * m * n
    taken = {
        lro.galore_adamw(1e-2, rank): 4 * r * (min(m, n) + 2 * max(m, n)),
        lro.mlorc_adamw(1e-2, rank): 2 * 4 * r * (m + n),
    }
    for tx, size in taken.items():
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            (row,) = lro.describe(tx, params)
        assert row.state_bytes == min(size, adam)
        assert (row.view is None) == bool(told) == (size >= adam)
        assert not told or f"{size} bytes, at full rank {adam}" in str(told[0].message)


def test_layers_alike_are_told_together():
    params = {"layers": [{"w": jnp.ones((8, 8))} for _ in range(12)]}
    with pytest.warns(UserWarning, match=r"'layers/0/w' .* and 11 like it\. Choose"):
        lro.galore_adamw(1e-2).init(params)
