"""The methods of the examples: two rates for each, and which leaf has which."""

import jax
import jax.numpy as jnp
import optax
import pytest

from examples.common.methods import METHODS, check_rates

SHAPES = {
    "embed": {"embedding": (32, 8)},
    "layers": {"norm": {"scale": (3, 8)}, "q_proj": {"kernel": (3, 8, 12)}},
    "lone": {"o_proj": {"kernel": (12, 8)}},
    "head": {"kernel": (8, 32)},
}
KNOWN = {"heads": (2, 2), "steps": 10}


def names(state):
    """The leaves of which a state holds something."""
    paths = [jax.tree_util.keystr(k) for k, _ in jax.tree.leaves_with_path(state)]
    leaves = ("embed", "norm", "q_proj", "o_proj", "head")
    return {leaf for leaf in leaves if any(f"['{leaf}']" in path for path in paths)}


@pytest.mark.parametrize("name", [k for k, m in METHODS.items() if m.linear is None])
def test_kernels_have_the_one_rate_and_all_else_the_other(name):
    own = METHODS[name]
    tx = own.build(0.1, 2, 5, 0.0, dense=0.2, **KNOWN)
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    state = jax.eval_shape(tx.init, params)
    groups = optax.tree.get(state, "inner_states")
    assert names(groups["matrices"]) == {"q_proj", "o_proj"}
    assert names(groups["dense"]) == {"embed", "norm", "head"}
    # Without another rate, the state is that of the optimizer alone.
    plain = jax.eval_shape(own.build(0.1, 2, 5, 0.0, **KNOWN).init, params)
    assert not optax.tree.get_all_with_path(plain, "inner_states")


def test_rates_are_refused_by_name():
    check_rates(None, None)
    check_rates(1e-3, 1e-2)
    with pytest.raises(ValueError, match="^learning_rate must be above 0, not 0"):
        check_rates(0.0, 1.0)
    with pytest.raises(ValueError, match="dense_learning_rate must be above 0, not -1"):
        check_rates(None, -1.0)
