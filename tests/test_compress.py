"""The state-space engine: which moments are stored how, and what that costs."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from running import assert_close, random_grads, random_like, relative_error, run

import lowrank_optax as lro

# On a (5, 8) matrix, so many oversampled columns span everything: exact truncation.
RANK, OVERSAMPLE = 2, 4
CODEC = lro.LowRank(RANK, oversample=OVERSAMPLE)
NONNEGATIVE = lro.LowRank(RANK, nonnegative=True, oversample=OVERSAMPLE)
MOMENTUM = optax.trace(0.9)


def compress(inner=MOMENTUM, codecs=None, **changes):
    return lro.compress_state(inner, codecs or {"trace": CODEC}, **changes)


def on_one_leaf(tx, grads):
    params = {"w": jnp.zeros_like(grads[0])}
    return [u["w"] for u in run(tx, params, [{"w": g} for g in grads])[0]]


def gradients(shape, steps=5, seed=0):
    return list(random_like({"g": (steps, *shape)}, seed)["g"])


# The engine's law: encode(inner(decode(code)))


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (3, 5, 8)], ids=str)
def test_momentum_is_truncated_after_each_step(shape):
    grads = gradients(shape)
    tx = compress(matrices=lro.MatrixAxes() if len(shape) > 2 else None)
    momentum = np.zeros(shape)
    for u, g in zip(on_one_leaf(tx, grads), grads, strict=True):
        momentum = 0.9 * momentum + np.asarray(g)
        assert relative_error(u, momentum) < 1e-5
        momentum = reference.truncate(momentum, RANK)


FULL = {
    "trace": (optax.trace(0.9), {"trace": lro.LowRank(8)}),
    "lion": (optax.scale_by_lion(), {"mu": lro.LowRank(8)}),
    "adam": (
        optax.scale_by_adam(b2=0.9),
        {"mu": lro.LowRank(8), "nu": lro.LowRank(8, nonnegative=True)},
    ),
    "amsgrad": (
        optax.scale_by_amsgrad(b2=0.9),
        {"nu_max": lro.LowRank(8, nonnegative=True)},
    ),
    "chain": (optax.chain(optax.trace(0.9), optax.scale(-1.0)), {"0/trace": CODEC}),
}


@pytest.mark.parametrize("name", ["trace", "lion", "adam", "amsgrad"])
def test_at_full_rank_it_is_the_inner_optimizer(name):
    inner, codecs = FULL[name]
    params = random_like({"w": (5, 8), "b": (8,)}, 0)
    grads = random_grads(params, 6)
    tx = compress(inner, codecs, matrices=lro.MatrixAxes())
    updates, _ = run(tx, params, grads)
    expected, _ = run(inner, params, grads)
    assert_close(updates, expected, rtol=1e-4, atol=1e-5)


def test_without_codecs_nothing_changes():
    params = random_like({"w": (5, 8)}, 0)
    grads = random_grads(params, 3)
    tx = lro.compress_state(optax.scale_by_adam(), {})
    updates, state = run(tx, params, grads)
    expected, inner_state = run(optax.scale_by_adam(), params, grads)
    assert_close((updates, state.inner_state), (expected, inner_state))


def test_an_initial_value_that_no_code_holds():
    tx = compress(optax.scale_by_rss(0.1), {"sum_of_squares": NONNEGATIVE})
    for init in (tx.init, jax.jit(tx.init), functools.partial(jax.eval_shape, tx.init)):
        with pytest.raises(ValueError, match="'sum_of_squares'.*'w'.*starts at 0.1"):
            init({"w": jnp.ones((5, 8))})
    one = optax.GradientTransformation(
        lambda params: optax.TraceState(
            jax.tree.map(lambda x: x.at[2, 3].set(0.1), params)
        ),
        lambda updates, state, params=None: (updates, state),
    )
    with pytest.raises(ValueError, match="'trace'.*'w'.*starts at 0.1"):
        compress(one, {"trace": CODEC}).init({"w": jnp.zeros((5, 8))})


# Which fields


def kinds(state):
    """What stands at the leaf w in each field."""
    return type(state["w"]).__name__


def test_a_name_stands_for_every_field_of_that_name():
    inner = optax.chain(optax.trace(0.9), optax.trace(0.5))
    params = random_like({"w": (5, 8)}, 0)
    both = compress(inner).init(params).inner_state
    assert [kinds(s.trace) for s in both] == ["LowRankCode", "LowRankCode"]
    second = compress(inner, {"1/trace": CODEC}).init(params).inner_state
    assert kinds(second[0].trace) != "LowRankCode"
    assert kinds(second[1].trace) == "LowRankCode"


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (optax.scale_by_adam(), "'trace'.*fields .* are mu, nu.*Name one of these"),
        (optax.scale(1.0), "'trace'.*are none"),
    ],
    ids=["adam", "sgd"],
)
def test_a_field_that_is_not_there(inner, message):
    with pytest.raises(ValueError, match=message):
        compress(inner).init({"w": jnp.ones((5, 8))})


def test_only_matrices_are_compressed():
    params = random_like(
        {"w": (5, 8), "b": (8,), "embed": {"table": (9, 5)}, "stack": (3, 5, 8)}, 0
    )
    matrices = {"w": lro.MatrixAxes(), "stack": lro.MatrixAxes(), "b": None}
    trace = compress(matrices=matrices).init(params).inner_state.trace
    assert jax.tree.map(jnp.shape, trace) == {
        "w": ((5, 2), (2, 8)),
        "b": (8,),
        "embed": {"table": (9, 5)},
        "stack": ((3, 5, 2), (3, 2, 8)),
    }


def test_moments_of_another_shape_are_seen_by_their_own_axes():
    params = random_like({"w": (40, 16)}, 0)
    grads = random_grads(params, 3)
    galore = lro.galore_project(optax.scale_by_adam(), rank=6, update_every=2)
    tx = lro.compress_state(
        galore, {"mu": lro.LowRank(6), "basis": lro.Cast(jnp.bfloat16)}
    )
    state = tx.init(params)
    mu = state.inner_state.inner_state.mu["w"]
    assert (mu.left.shape, mu.right.shape) == ((6, 6), (6, 40))
    # An element-wise codec leaves alone what is small.
    assert state.inner_state.basis["w"].dtype == jnp.float32
    updates, _ = run(tx, params, grads)
    expected, _ = run(galore, params, grads)
    assert_close(updates, expected, rtol=1e-3, atol=1e-4)


def test_cast_takes_every_large_leaf():
    params = random_like(
        {"w": (64, 64), "embed": {"table": (128, 32)}, "b": (64,), "small": (63, 64)}, 0
    )
    tx = lro.compress_state(optax.scale_by_adam(), {"mu": lro.Cast(jnp.bfloat16)})
    grads = random_grads(params, 3)
    updates, state = run(tx, params, grads)
    mu = state.inner_state.mu
    dtypes = jax.tree.map(lambda x: str(x.dtype), mu)
    assert dtypes["w"] == dtypes["embed"]["table"] == (str(jnp.dtype(jnp.bfloat16)),)
    assert dtypes["b"] == dtypes["small"] == "float32"
    whole = lro.state_bytes(optax.scale_by_adam(), params)
    # Two of four bytes for each of the 8192 numbers; and one more counter.
    assert lro.state_bytes(tx, params) == whole - 2 * 8192 + 4
    expected, _ = run(optax.scale_by_adam(), params, grads)
    assert_close(updates, expected, rtol=0, atol=0.02)
    assert not np.array_equal(updates[-1]["w"], expected[-1]["w"])
    assert_close(updates[-1]["small"], expected[-1]["small"])


# How leaves are seen


@pytest.mark.parametrize(
    ("shape", "axes", "flat"),
    [
        ((5, 2, 4), lro.MatrixAxes(rows=0, cols=(1, 2)), (5, 8)),
        ((2, 4, 5), lro.MatrixAxes(rows=(0, 1), cols=2), (8, 5)),
    ],
    ids=["into heads", "out of heads"],
)
def test_a_kernel_with_heads_is_its_reshaped_matrix(shape, axes, flat):
    grads = gradients(shape)
    updates = on_one_leaf(compress(matrices=axes), grads)
    expected = on_one_leaf(compress(), [g.reshape(flat) for g in grads])
    assert_close([u.reshape(flat) for u in updates], expected, atol=1e-5)


def test_the_transposed_leaf_gets_the_transposed_update():
    grads = gradients((5, 8))
    mirrored = on_one_leaf(compress(), [g.T for g in grads])
    assert_close([u.T for u in mirrored], on_one_leaf(compress(), grads), atol=1e-5)


# Safety


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("fields", [("mu",), ("nu",), ("mu", "nu")], ids=str)
def test_the_moments_of_a_leaf_are_accepted_or_kept_together(fields, bad):
    codecs = {"mu": CODEC, "nu": NONNEGATIVE}
    tx = compress(optax.scale_by_adam(), {f: codecs[f] for f in fields})
    params = random_like({"w": (5, 8), "other": (5, 8)}, 0)
    grads = random_grads(params, 2)
    _, old = run(tx, params, grads[:1])
    # The square of 1e30 overflows: the second moment alone is not finite.
    worse = grads[1] | {"w": grads[1]["w"].at[0, 0].set(bad)}
    _, new = run(tx, params, [worse], old)
    _, fine = run(tx, params, grads[1:], old)
    for field in ("mu", "nu"):
        was, now, good = (optax.tree.get(s, field) for s in (old, new, fine))
        assert_close(now["w"], was["w"], rtol=0, atol=0)
        assert_close(now["other"], good["other"], rtol=0, atol=0)


class Sum(NamedTuple):
    momentum: Any


def test_an_optimizer_of_ones_own():
    inner = optax.GradientTransformation(
        lambda params: Sum(jax.tree.map(jnp.zeros_like, params)),
        lambda g, s, p=None: (s.momentum, Sum(jax.tree.map(jnp.add, s.momentum, g))),
    )
    grads = gradients((5, 8))
    tx = compress(inner, {"momentum": CODEC})
    total = np.zeros((5, 8))
    for u, g in zip(on_one_leaf(tx, grads), grads, strict=True):
        np.testing.assert_allclose(u, total, atol=1e-5)
        total = reference.truncate(total + np.asarray(g), RANK)


class Pair(NamedTuple):
    one: jax.Array
    other: jax.Array


def test_seeds():
    # Without oversampling and warm start, the sketch is all chance.
    codec = {"trace": lro.LowRank(2, oversample=0, warm_start=False)}
    grads = gradients((5, 8), steps=2)
    one, same, other = (
        on_one_leaf(compress(codecs=codec, key=k), grads)[1]
        for k in (3, jax.random.key(3), 4)
    )
    assert_close(one, same, rtol=0, atol=0)
    assert not np.allclose(one, other, atol=1e-3)


def test_the_fields_of_a_leaf_round_by_different_chances():
    def update(g, state, params=None):
        return g, Pair(g, g)

    inner = optax.GradientTransformation(lambda params: Pair(params, params), update)
    zero, third = jnp.zeros((64, 64)), jnp.full((64, 64), 1 / 3)
    tx = compress(inner, dict.fromkeys(Pair._fields, lro.Cast(jnp.bfloat16)))
    kept = tx.update(third, tx.init(zero))[1].inner_state
    one, other = (np.asarray(x.value, np.float32) for x in kept)
    up = 1 / 3 < one, 1 / 3 < other
    # Each rounds up by a chance of 1 / 3 or 2 / 3; both alike by 5 / 9.
    assert all(0.3 < np.mean(x) < 0.7 for x in up)
    np.testing.assert_allclose(np.mean(up[0] == up[1]), 5 / 9, atol=0.03)


# Codes of codes


def test_factors_can_be_stored_in_bytes():
    params = random_like({"w": (512, 640), "b": (8,)}, 0)
    grads = random_grads(params, 3)
    mlorc = lro.mlorc_scale_by_adam(8)
    parts = [
        f"{moment}.{part}" for moment in ("mu", "nu") for part in ("left", "right")
    ]
    tx = compress(mlorc, dict.fromkeys(parts, lro.BlockInt8(signed=True)))
    updates, state = run(tx, params, grads)
    numbers = 8 * (512 + 640)
    assert lro.describe(tx, params)[1].state_bytes == 2 * (numbers + 4 * numbers / 256)
    # The right factors start as unit rows of signs, not at zero.
    right = tx.init(params).inner_state.inner_state.mu["w"].right
    decoded = lro.BlockInt8(signed=True).decode(right)
    assert_close(jnp.sum(decoded**2, axis=-1), jnp.ones(8), rtol=0.02)
    expected, _ = run(mlorc, params, grads)
    assert relative_error(updates[0]["w"], expected[0]["w"]) < 1e-5  # from zero
    for u, want in zip(updates, expected, strict=True):
        assert relative_error(u["w"], want["w"]) < 0.1
        assert_close(u["b"], want["b"])


@pytest.mark.parametrize(
    "inner",
    [
        lro.mlorc_compress(optax.scale_by_adam(), rank=2),
        lro.quantize_state(optax.scale_by_adam()),
    ],
    ids=["factors", "bytes"],
)
@pytest.mark.parametrize("transfer", [lro.Rotate(), lro.RotateFirst(), lro.Reset()])
def test_codes_do_not_move_with_a_basis(inner, transfer):
    every = {"rank": 16, "matrices": lro.MatrixAxes()}  # 4,096 numbers a moment
    tx = lro.galore_project(inner, transfer=transfer, **every)
    params = {"w": jnp.ones((16, 256))}
    with pytest.raises(ValueError, match=r"Cannot use R.*requires moments.*(mu|nu)\."):
        tx.update(params, tx.init(params))
