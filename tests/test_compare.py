"""States compared with a transformation: what differs is named, and what to do."""

import jax
import jax.numpy as jnp
import optax
import pytest
from registry import METHODS, example_params

import lowrank_optax as lro

SHAPES = {"up": (24, 32), "bias": (32,)}
PARAMS = {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in SHAPES.items()}


def state_of(tx, params=PARAMS):
    return jax.eval_shape(tx.init, params)


def as_dicts(tree):
    """A state as a checkpoint's metadata has it."""
    if hasattr(tree, "_asdict"):
        tree = tree._asdict()
    if isinstance(tree, dict):
        return {key: as_dicts(x) for key, x in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [as_dicts(x) for x in tree]
    return tree


def refusal(tx, state, params=PARAMS):
    with pytest.raises(ValueError) as refused:
        lro.check_state(tx, state, params)
    return str(refused.value)


def test_a_state_fits_its_own_transformation_in_any_containers():
    params = example_params()
    for method in METHODS:
        state = state_of(method.tx, params)
        lro.check_state(method.tx, state, params)
        lro.check_state(method.tx, as_dicts(state), params)


GALORE = lro.galore_project(optax.scale_by_adam(), rank=4)


@pytest.mark.parametrize(
    ("rank", "remedy"), [(2, "A larger rank"), (6, "lowrank_optax.rank.fit(tx, state)")]
)
def test_another_rank_is_named_with_parameter_field_and_both_shapes(rank, remedy):
    tx = lro.galore_project(optax.scale_by_adam(), rank=rank)
    for state in (state_of(GALORE), as_dicts(state_of(GALORE))):
        said = refusal(tx, state)
        assert (
            "'basis' of 'up' (24, 32): "
            f"float32 (24, 4), must be float32 (24, {rank})" in said
        )
        assert (
            "'inner_state/mu' of 'up' (24, 32): "
            f"float32 (4, 32), must be float32 ({rank}, 32)" in said
        )
        assert "'bias'" not in said and "count" not in said
        assert remedy in said and ("A larger rank" in said) == (rank == 2)


def test_codes_and_dtypes_are_told_apart_from_ranks():
    params = {"up": jax.ShapeDtypeStruct((64, 256), jnp.float32)}
    said = refusal(lro.adamw_8bit(0.1), state_of(optax.adamw(0.1), params), params)
    assert "mu.index' of 'up' (64, 256): absent, must be uint8 (64, 256)" in said
    assert "as for 8 bits" in said and "r rank made" not in said
    half = optax.scale_by_adam(mu_dtype=jnp.bfloat16)
    said = refusal(optax.scale_by_adam(), state_of(half))
    assert "'mu' of 'up' (24, 32): bfloat16 (24, 32), must be float32 (24, 32)" in said
    assert "of another dtype" in said and "'nu'" not in said


def test_a_state_that_was_shrunk_fits_what_the_advice_makes():
    tx = lro.adaptive_rank(optax.scale_by_adam(), max_rank=4)
    params = {"up": jnp.ones(SHAPES["up"])}
    state = tx.init(params)
    used = state.basis["up"].at[:, :1].set(1.0)
    _, small = lro.rank.shrink(
        tx, state._replace(basis={"up": used}), params, multiple_of=2
    )
    assert "rank.fit(tx, state)" in refusal(tx, small, params)
    lro.check_state(lro.rank.fit(tx, small), small, params)


def test_only_so_many_arrays_are_named():
    params = {f"up{i:02}": PARAMS["up"] for i in range(30)}
    tx = lro.galore_project(optax.scale_by_adam(), rank=2)
    said = refusal(tx, state_of(GALORE, params), params)
    assert len(said.splitlines()) == 1 + 20 + 1 + 1 and "and 70 more" in said
