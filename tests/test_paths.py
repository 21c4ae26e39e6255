"""A parameter is known by its path, whatever holds it and however that reads."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowrank_optax as lro
from lowrank_optax._src.leaves import context
from lowrank_optax._src.leaves.paths import labels


class Attention(NamedTuple):
    """Fields that are names of moments, and of what a box holds, too."""

    q: jax.Array
    v: jax.Array
    value: jax.Array


class Model(nnx.Module):
    def __init__(self, value, v, q):
        self.attn = nnx.Dict(value=nnx.Param(value), v=nnx.Param(v), q=nnx.Param(q))


# In the order in which each holds its leaves.
HOLDERS = {
    "dict": lambda q, v, value: {"attn": {"q": q, "v": v, "value": value}},
    "named tuple": lambda q, v, value: {"attn": Attention(q, v, value)},
    "outermost": Attention,
    "nnx": lambda q, v, value: nnx.state(Model(value, v, q)),
    "slashes": lambda q, v, value: {"a/b": {"q": q}, "a": {"b": {"q": v}, "c": value}},
}
NAMES = {
    "outermost": ["q", "v", "value"],
    "slashes": ["a/b/q", "a/c", "'a/b'/q"],
}


def names(holder):
    return NAMES.get(holder, ["attn/q", "attn/v", "attn/value"])


def leaves(rank):
    """A matrix of this rank, one of rank 1 and one of rank 2."""
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.standard_normal((m, r)) @ rng.standard_normal((r, 12)))
        for m, r in zip((10, 8, 9), (rank, 1, 2), strict=True)
    ]


def ordered(holder, values):
    """Values given for q, v, value in the order of the tree's leaves."""
    return jax.tree.leaves(HOLDERS[holder](*values))


@pytest.mark.parametrize("holder", HOLDERS)
def test_metrics_and_tables_have_an_entry_for_each_matrix(holder):
    params = HOLDERS[holder](*leaves(3))
    tx = lro.adaptive_rank(optax.scale_by_adam(), max_rank=4, max_residual_energy=1e-6)
    _, state = jax.jit(tx.update)(params, tx.init(params))
    kwargs = dict(tx=tx, grads=params, earlier=state, moments=True)
    metrics = lro.diagnostics.state_metrics(state, **kwargs)
    for name in names(holder):
        expected = {f"{m}/{name}" for m in ("rank", "captured_energy", "overlap")}
        assert expected | {f"stable_rank/mu/{name}"} <= set(metrics)
    ranks = [int(metrics[f"rank/{name}"]) for name in sorted(names(holder))]
    by_leaf = dict(zip(flat_names(params), ordered(holder, [3, 1, 2]), strict=True))
    assert ranks == [by_leaf[name] for name in sorted(names(holder))]
    rows = {row.path: row for row in lro.describe(tx, params)}
    shapes = ordered(holder, leaves(3))
    assert list(rows) == flat_names(params)
    for row, x in zip(rows.values(), shapes, strict=True):
        assert row.shape == x.shape and row.state_bytes > 4 * 4 * sum(x.shape)


def flat_names(params):
    return [row.path for row in lro.describe(optax.sgd(1.0), params)]


@pytest.mark.parametrize("holder", HOLDERS)
def test_shrinking_frees_the_unused_columns_of_each_matrix(holder):
    params = HOLDERS[holder](*leaves(3))
    tx = lro.adaptive_rank(optax.scale_by_adam(), max_rank=4, max_residual_energy=1e-6)
    _, state = jax.jit(tx.update)(params, tx.init(params))
    after, cut = lro.rank.shrink(tx, state, params, multiple_of=1)
    widths = [x.shape[-1] for x in jax.tree.leaves(cut.basis)]
    assert widths == ordered(holder, [3, 1, 2])
    old, _ = jax.jit(tx.update)(params, state)
    new, _ = jax.jit(after.update)(params, cut)
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("holder", HOLDERS)
def test_adapters_hold_the_difference_of_each_matrix(holder):
    base = HOLDERS[holder](*leaves(3))
    tuned = HOLDERS[holder](*(x + i for i, x in enumerate(leaves(3), start=1)))
    adapters = lro.adapters.extract_lora(tuned, base)
    assert list(adapters) == flat_names(base)
    sizes = ordered(holder, [1, 2, 3])
    for adapter, x in zip(adapters.values(), sizes, strict=True):
        np.testing.assert_allclose(adapter.b @ adapter.a, x, rtol=1e-3)


METHODS = {
    "projected": lro.project_gradients(
        optax.identity(), rank=2, subspace=lro.RandomOrthonormal()
    ),
    "factors": lro.mlorc_compress(optax.trace(0.9), rank=2),
    "by a rule": lro.mlorc_scale_by_lion(rank=2),
}


@pytest.mark.parametrize("method", METHODS)
def test_random_numbers_of_paths_that_read_alike_differ(method):
    tx = METHODS[method]
    x = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
    params = {"a/b": {"w": x}, "a": {"b/w": x, "b": {"w": x}}}
    _, state = tx.update(params, tx.init(params))
    _, alone = tx.update({"a": {"b": {"w": x}}}, tx.init({"a": {"b": {"w": x}}}))
    found = [np.asarray(x).ravel() for x in jax.tree.leaves(state) if x.ndim == 2]
    seen = [np.asarray(x).ravel() for x in jax.tree.leaves(alone) if x.ndim == 2]
    kinds = len(found) // 3
    assert kinds == len(seen) > 0

    def distance(a, b):
        return np.inf if a.size != b.size else np.linalg.norm(a - b) / np.linalg.norm(a)

    for i, part in enumerate(found):
        assert all(distance(part, other) > 0.1 for other in found[:i])
    for part in seen:  # whatever stands beside
        assert min(distance(part, other) for other in found) < 1e-5


def test_paths_that_read_alike_are_told_apart_by_quotes():
    paths = [("a/b",), ("a", "b"), ("c", "d/e"), ("f",)]
    assert labels(paths) == ["'a/b'", "a/b", "c/d/e", "f"]


def test_a_limit_within_another_is_the_smaller_one():
    one, other = ("a", "w"), ("b",)
    with context.limited_ranks({one: 3, other: 5}), context.limited_ranks({one: 7}):
        assert dict(context.limits()) == {one: 3, other: 5}
        with context.limited_ranks({one: 2}):
            assert dict(context.limits()) == {one: 2, other: 5}
    assert context.limits() == ()
