"""Every method on parameters of any shapes, dtypes, ranks and sides."""

import inspect
import re
import warnings
import zlib

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from registry import METHODS, RANK
from running import run

import lowrank_optax as lro

# Enough for two refreshes.
STEPS = 5

DTYPES = st.sampled_from([jnp.float32, jnp.bfloat16])
# Vectors, scalars, matrices both ways and square, stacks, and axes of one.
SHAPES = st.lists(st.integers(1, 7), max_size=4).map(tuple)
LEAVES = st.builds(jax.ShapeDtypeStruct, SHAPES, DTYPES)
TREES = st.one_of(
    LEAVES,
    st.lists(LEAVES, min_size=1, max_size=3),
    st.tuples(LEAVES, LEAVES),
    st.dictionaries(
        st.sampled_from(["kernel", "bias", "embedding", "q_proj/weight"]),
        st.one_of(LEAVES, st.dictionaries(st.sampled_from("ab"), LEAVES, min_size=1)),
        min_size=1,
        max_size=3,
    ),
)
# What a factory may be told; each is drawn for those that take it.
ARGUMENTS = {
    "rank": st.integers(1, 6),
    "max_rank": st.integers(1, 6),
    "side": st.sampled_from(["short", "long", "left", "right"]),
    "matrices": st.sampled_from([None, lro.MatrixAxes(), lro.MatrixAxes(0, -1)]),
}
# Sizes of the gradients of a step.
SIZES = st.lists(
    st.sampled_from([0.0, 1e-20, 1.0, 1e10]), min_size=STEPS, max_size=STEPS
)


@st.composite
def arguments(draw, method):
    taken = inspect.signature(method.factory).parameters
    drawn = {k: draw(s) for k, s in ARGUMENTS.items() if k in taken}
    # A method with ranks of one only, or with as many vectors from the top.
    if method.kwargs.get("per") == "tensor" or "leading" in method.kwargs:
        drawn["rank"] = max(RANK, drawn["rank"])
    return drawn


def check(tx, params, grads):
    try:
        state = tx.init(params)
    except ValueError as refusal:
        # Told to take stacks where there is no matrix, or heads that there are not.
        assert re.search("matches no parameter|does not divide", str(refusal))
        hypothesis.reject()
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    chex.assert_trees_all_equal_shapes_and_dtypes(
        state, jax.eval_shape(tx.init, params)
    )
    assert lro.state_bytes(tx, params) == sum(x.nbytes for x in jax.tree.leaves(state))
    updates, last = run(tx, params, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(last, state)
    for update, grad in zip(updates, grads, strict=True):
        chex.assert_trees_all_equal_shapes_and_dtypes(update, grad)
    chex.assert_tree_all_finite((updates, last))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_state_keeps_its_types_and_updates_are_finite(method):
    few = hypothesis.settings.default.max_examples // 10

    # Others for each method, the same at every run.
    @hypothesis.seed(zlib.crc32(method.name.encode()))
    @hypothesis.settings(max_examples=few)
    @hypothesis.given(TREES, arguments(method), SIZES)
    def holds(shapes, drawn, sizes):
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
        grads = [
            jax.tree.map(
                lambda x, size=size: jnp.asarray(
                    size * rng.standard_normal(x.shape), x.dtype
                ),
                params,
            )
            for size in sizes
        ]
        with warnings.catch_warnings():
            # That a matrix saves no memory, or none is there at all.
            warnings.simplefilter("ignore")
            check(method.make(**drawn), params, grads)

    holds()
