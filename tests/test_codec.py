"""The codecs: their laws, MLorc's clamp, exactness, rounding that does not stick."""

import dataclasses

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import lowrank_optax as lro
from lowrank_optax._src.leaves.choose import view_leaves
from lowrank_optax._src.parts import best_codes, int8_map
from lowrank_optax._src.parts.factors import LowRankCode

KEY = jax.random.key(0)

CODECS = {
    "low rank": lro.LowRank(3),
    "non-negative": lro.LowRank(3, nonnegative=True),
    "algorithm 3": lro.LowRank(3, oversample=0, power_iters=1, warm_start=False),
    "bfloat16": lro.Cast(jnp.bfloat16),
    "float16": lro.Cast(jnp.float16),
}


def view_of(*shape, **kwargs):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    return view_leaves([leaf], lro.MatrixAxes(), side="left", **kwargs)[0]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def spectrum(m, n, values, seed=0):
    u = np.linalg.qr(normal(m, len(values), seed=seed))[0]
    v = np.linalg.qr(normal(n, len(values), seed=seed + 1))[0]
    return ((u * values) @ v.T).astype(np.float32)


def encoded(codec, x, old=None, key=KEY):
    old = codec.init(view_of(*x.shape)) if old is None else old
    return _encode(codec, key, x, old)


# One compilation for a codec and a shape, however many tests have it.
_encode = jax.jit(lambda codec, *args: codec.encode(*args), static_argnums=0)


def through(codec, x, old=None, key=KEY):
    """What a codec makes of a matrix."""
    return np.asarray(codec.decode(encoded(codec, x, old, key)))


# Laws of every codec -----------------------------------------------------------------


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (2, 3, 6, 8), (1, 5), (5, 1)])
def test_laws(name, shape):
    codec = CODECS[name]
    assert isinstance(codec, lro.Codec)
    assert hash(codec) == hash(dataclasses.replace(codec))
    code = codec.init(view_of(*shape))
    assert isinstance(code, tuple) and hasattr(code, "_fields")
    np.testing.assert_array_equal(codec.decode(code), np.zeros(shape, np.float32))

    x = np.abs(normal(*shape))
    new = encoded(codec, x)
    kinds = [jax.tree.map(jax.typeof, c) for c in (code, new)]
    assert kinds[0] == kinds[1]
    decoded = codec.decode(new)
    assert decoded.shape == shape and decoded.dtype == jnp.float32
    assert np.all(np.isfinite(decoded))
    np.testing.assert_array_equal(decoded, through(codec, x))  # the key decides
    if getattr(codec, "nonnegative", False):
        assert np.all(decoded >= 0)

    zero = encoded(codec, np.zeros(shape, np.float32), new)
    np.testing.assert_array_equal(codec.decode(zero), np.zeros(shape, np.float32))
    assert all(np.all(np.isfinite(part)) for part in zero)


# LowRank -----------------------------------------------------------------------------

SKETCHES = {
    "default": {},
    "warm only": {"oversample": 0},
    "gaussian": {"oversample": 0, "warm_start": False},
    "oversampled": {"oversample": 4, "warm_start": False},
    "power": {"oversample": 0, "warm_start": False, "power_iters": 2},
}


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("scale", [1.0, 1e15, 1e-15])
def test_low_rank_is_exact_where_the_rank_suffices(sketch, scale):
    codec = lro.LowRank(4, **SKETCHES[sketch])
    x = np.stack(
        [
            spectrum(24, 16, [5.0, 2.0, 1.0, 0.5]),
            spectrum(24, 16, [5.0], seed=2),
            np.zeros((24, 16), np.float32),
        ]
    )
    # A sketch without spare columns amplifies rounding by its own condition number.
    decoded = through(codec, scale * x)
    np.testing.assert_allclose(decoded, scale * x, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_low_rank_keeps_any_scale(scale):
    codec = lro.LowRank(2)
    x = scale * spectrum(12, 9, [3.0, 1.0])
    code = None
    for _ in range(3):
        code = encoded(codec, x, code)
        np.testing.assert_allclose(codec.decode(code), x, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6)], ids=str)
def test_low_rank_is_exact_at_full_rank(shape):
    x = normal(*shape)
    for rank in (min(shape), 100):
        code = encoded(lro.LowRank(rank), x)
        assert code.left.shape == (shape[0], min(shape))
        np.testing.assert_allclose(lro.LowRank(rank).decode(code), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sketch", SKETCHES)
def test_rank_comes_back_after_zero_and_rank_one(sketch):
    codec = lro.LowRank(4, **SKETCHES[sketch])
    full = spectrum(24, 16, [5.0, 2.0, 1.0, 0.5])
    zero = np.zeros_like(full)
    one = spectrum(24, 16, [3.0], seed=7)
    code = codec.init(view_of(24, 16))
    for i, x in enumerate([zero, zero, one, zero, one, full]):
        code = encoded(codec, x, code, jax.random.fold_in(KEY, i))
        # A zero row would be a column that the next sketch has lost for good.
        norms = np.linalg.norm(code.right, axis=-1)
        np.testing.assert_allclose(norms, 1.0, atol=1e-5)
        np.testing.assert_allclose(codec.decode(code), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)], ids=str)
@pytest.mark.parametrize("name", ["fast", "slow"])
def test_warm_start_approaches_the_best_approximation(shape, name):
    values = (0.6 if name == "fast" else 0.93) ** np.arange(24)
    x = spectrum(*shape, values)
    best = np.linalg.norm(x - reference.truncate(x, 4))
    errors, code = [], None
    codec = lro.LowRank(4)
    for i in range(12):
        code = encoded(codec, x, code, jax.random.fold_in(KEY, i))
        assert code.left.shape[-1] == 4
        errors.append(np.linalg.norm(x - codec.decode(code)) / best)
    assert errors[0] < 2 and errors[-1] < 1.02
    assert min(errors) > 1 - 1e-4  # better than the best would not have rank 4


@pytest.mark.parametrize("second", [1e-1, 1e-2])
def test_a_dominant_direction_does_not_hide_the_others(second):
    # A second moment after its first step, of which the sketch's columns are near
    # parallel: the code must be as good as the exact projector of the same sketch.
    x = spectrum(128, 256, np.r_[1.0, second * 0.7 ** np.arange(19)])
    codec = lro.LowRank(4)
    old = codec.init(view_of(128, 256))

    omega = codec.draw([KEY], [old], None)[0].mT
    q = np.linalg.qr(x @ np.asarray(omega, np.float64))[0]
    expected = np.linalg.norm(x - q @ reference.truncate(q.T @ x, 4))
    found = np.linalg.norm(x - np.asarray(through(codec, x), np.float64))
    assert found < 1.02 * expected


def test_warm_start_tracks_a_turning_matrix():
    """An average of noisy matrices with a slowly turning signal, as moments are."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((32, 4)))[0] for _ in range(2))
    x = np.zeros((32, 32), np.float32)
    codes = {warm: None for warm in (True, False)}
    errors = {True: [], False: []}
    for step in range(40):
        u = np.linalg.qr(u + 0.03 * rng.standard_normal(u.shape))[0]
        x = 0.8 * x + 0.2 * (u @ v.T + 0.03 * rng.standard_normal(x.shape))
        x = x.astype(np.float32)
        best = np.linalg.norm(x - reference.truncate(x, 4))
        for warm in codes:
            codec = lro.LowRank(4, warm_start=warm)
            key = jax.random.fold_in(KEY, step)
            codes[warm] = encoded(codec, x, codes[warm], key)
            errors[warm].append(np.linalg.norm(x - codec.decode(codes[warm])) / best)
    assert np.mean(errors[True]) < 1.2
    assert np.mean(errors[True]) < np.mean(errors[False])


def test_algorithm_3_obeys_the_bound_of_the_rsvd():
    """Lemma A.1 of MLorc holds for the codec: rank 4, oversampling 3."""
    values = np.r_[np.full(4, 20.0), np.full(20, 1.0)]
    x = jnp.asarray(spectrum(32, 24, values))
    codec = lro.LowRank(4, oversample=3, warm_start=False)
    old = codec.init(view_of(32, 24))

    @jax.jit
    def squared_errors(keys):
        def of_one(key):
            return jnp.sum((x - codec.decode(codec.encode(key, x, old))) ** 2)

        return jax.lax.map(of_one, keys)

    errors = squared_errors(jax.random.split(KEY, 1000))
    bound = (1 + 4 / (3 - 1)) * 20
    assert 0.5 * bound <= errors.mean() <= bound


def test_a_warm_start_without_oversampling_draws_nothing():
    x = normal(24, 16)
    codec = lro.LowRank(4, oversample=0)
    both = [through(codec, x, key=jax.random.key(i)) for i in (0, 1)]
    np.testing.assert_array_equal(*both)
    other = [through(lro.LowRank(4), x, key=jax.random.key(i)) for i in (0, 1)]
    assert np.any(other[0] != other[1])


def test_batched_codes_are_independent():
    x = np.stack([spectrum(12, 9, [2.0, 1.0], seed) for seed in (0, 5, 9)])
    x[1] *= 1e-12
    decoded = through(lro.LowRank(2), x)
    for one, exact in zip(decoded, x, strict=True):
        np.testing.assert_allclose(one, exact, rtol=0, atol=2e-5 * np.abs(exact).max())


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"rank": 0}, ValueError, "`rank` must be at least 1, got 0"),
        ({"rank": -2}, ValueError, "`rank` must be at least 1, got -2"),
        ({"rank": 2.0}, TypeError, "`rank` must be a Python int.*2.0"),
        ({"rank": True}, TypeError, "`rank` must be a Python int.*True"),
        ({"rank": 1, "oversample": -1}, ValueError, "`oversample` must not be neg"),
        ({"rank": 1, "power_iters": -1}, ValueError, "`power_iters` must not be neg"),
    ],
    ids=str,
)
def test_low_rank_refuses(kwargs, error, message):
    with pytest.raises(error, match=message):
        lro.LowRank(**kwargs)


# Equation (2) ------------------------------------------------------------------------


def small_integers(*shape):
    return hnp.arrays(np.float32, shape, elements=st.integers(-4, 4).map(float))


@hypothesis.settings(max_examples=60)
@hypothesis.given(small_integers(2, 4, 2), small_integers(2, 2, 3))
def test_negative_entries_become_their_mean_magnitude(left, right):
    # Products of small integers are exact, so that signs and zeros are not in doubt.
    code = LowRankCode(jnp.asarray(left), jnp.asarray(right))
    decoded = np.asarray(lro.LowRank(2, nonnegative=True).decode(code))
    product = left @ right
    np.testing.assert_allclose(decoded, reference.clamp(product), rtol=1e-6, atol=0)
    assert np.all(decoded >= 0)
    np.testing.assert_array_equal(decoded[product >= 0], product[product >= 0])
    np.testing.assert_array_equal(lro.LowRank(2).decode(code), product)


def test_the_clamp_by_hand():
    row = jnp.asarray([[[-1.0, -3.0, 0.0, 5.0]], [[1.0, 0.0, 2.0, 3.0]]])
    code = LowRankCode(jnp.ones((2, 2, 1)), row)
    decoded = lro.LowRank(1, nonnegative=True).decode(code)
    np.testing.assert_array_equal(decoded[0], [[2.0, 2.0, 0.0, 5.0]] * 2)
    np.testing.assert_array_equal(decoded[1], [[1.0, 0.0, 2.0, 3.0]] * 2)


def test_second_moments_stay_nonnegative_over_a_run():
    codec = lro.LowRank(2, nonnegative=True)
    rng = np.random.default_rng(0)
    code = codec.init(view_of(16, 12))
    clamped = 0
    for step in range(30):
        v = codec.decode(code)
        assert np.all(np.asarray(v) >= 0)
        clamped += np.any(np.asarray(code.left @ code.right) < 0)
        gradient = rng.standard_normal((16, 12)) * rng.exponential(size=(16, 1))
        v = np.asarray(0.9 * v + 0.1 * gradient**2, np.float32)
        code = encoded(codec, v, code, jax.random.fold_in(KEY, step))
    assert clamped > 0  # the factors alone would have been negative


# Cast --------------------------------------------------------------------------------


def test_bfloat16_is_rounded_to_a_neighbour_without_bias():
    value = np.float32(1.0 + 0.3 * 2.0**-7)  # bfloat16 has seven explicit bits
    for sign in (1.0, -1.0):
        x = np.full((400, 500), sign * value, np.float32)
        decoded = through(lro.Cast(jnp.bfloat16), x)
        assert set(np.unique(np.abs(decoded))) == {1.0, 1.0 + 2.0**-7}
        up = np.mean(np.abs(decoded) > 1)
        # Four standard deviations of a share of 200,000 draws.
        assert abs(up - 0.3) < 4 * np.sqrt(0.3 * 0.7 / x.size)


def test_bfloat16_is_unbiased_at_any_magnitude():
    x = normal(300, 300) * 10.0 ** np.linspace(-30, 30, 300, dtype=np.float32)
    keys = jax.random.split(KEY, 64)
    codec = lro.Cast(jnp.bfloat16)
    old = codec.init(view_of(*x.shape))
    decode = jax.jit(jax.vmap(lambda key: codec.decode(codec.encode(key, x, old))))
    error = np.asarray(decode(keys) / x - 1)
    assert np.abs(error).max() <= 2.0**-7
    # Per entry at most 2^-8 is one standard deviation.
    assert abs(error.mean()) < 4 * 2.0**-8 / np.sqrt(error.size)
    assert np.abs(error.mean(0)).max() < 6 * 2.0**-8 / np.sqrt(64)


def test_bfloat16_leaves_what_it_can_hold():
    x = normal(20, 30).astype(jnp.bfloat16).astype(np.float32)
    x[0, :4] = [0.0, np.inf, -np.inf, np.nan]
    np.testing.assert_array_equal(through(lro.Cast(jnp.bfloat16), x), x)


def test_bfloat16_rounds_nothing_up_to_infinity():
    # A fifth of the way from its largest number to what would be the next.
    largest = float(jnp.finfo(jnp.bfloat16).max)
    x = np.full((20, 30), largest + 0.2 * 2.0**120, np.float32)
    np.testing.assert_array_equal(through(lro.Cast(jnp.bfloat16), x), largest)
    np.testing.assert_array_equal(through(lro.Cast(jnp.bfloat16), -x), -largest)


def test_other_dtypes_round_to_nearest():
    x = normal(20, 30)
    exact = x.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(through(lro.Cast(jnp.float16), x), exact)


def test_a_decaying_average_decays_in_bfloat16():
    """To nearest, 0.999 x rounds back to x for every x: nothing would ever change."""
    codec = lro.Cast(jnp.bfloat16)
    steps, decay = 2000, 0.999
    start = np.full((64, 64), 1.3, np.float32)

    def step(code, key):
        return codec.encode(key, decay * codec.decode(code), code), None

    code = codec.init(view_of(64, 64))._replace(value=jnp.asarray(start, jnp.bfloat16))
    first = np.asarray(codec.decode(code))
    code, _ = jax.lax.scan(step, code, jax.random.split(KEY, steps))
    truth = first.mean() * decay**steps
    decayed = np.asarray(codec.decode(code))
    assert abs(decayed.mean() / truth - 1) < 0.02
    nearest = jnp.asarray(decay * first, jnp.bfloat16)
    np.testing.assert_array_equal(nearest.astype(jnp.float32), first)


def test_an_average_in_bfloat16_reaches_a_constant():
    codec = lro.Cast(jnp.bfloat16)

    def step(code, key):
        return codec.encode(key, 0.99 * codec.decode(code) + 0.01, code), None

    code = codec.init(view_of(64, 64))
    code, _ = jax.lax.scan(step, code, jax.random.split(KEY, 1000))
    assert abs(codec.decode(code).mean() - 1) < 0.005


@pytest.mark.parametrize("signed", [True, False])
def test_bytes_stand_for_the_nearest_number_of_the_map(signed):
    numbers = int8_map.dynamic_map(signed)
    assert len(set(numbers)) == 256
    every = jnp.arange(256, dtype=jnp.uint8)
    decoded = int8_map.decode(every, signed)
    np.testing.assert_allclose(decoded, numbers, rtol=3e-7, atol=0)
    x = jnp.asarray(numbers[None], jnp.float32)
    largest = int8_map.largest_of(x)
    again = int8_map.nearest(x, largest, signed)
    np.testing.assert_array_equal(again[0], every)
    assert largest == 1
    # All magnitudes, down to what is below the smallest number but not zero.
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 256)) * 10 ** rng.uniform(-9, 0, (64, 256))
    x = np.float32(x if signed else np.abs(x))
    x[0] = 0.0
    largest = int8_map.largest_of(jnp.asarray(x))
    index = int8_map.nearest(jnp.asarray(x), largest, signed)
    size = np.abs(x).max(axis=-1, keepdims=True)
    np.testing.assert_array_equal(largest, size)
    unit = x.astype(np.float64) / np.where(size > 0, size, 1)
    distance = np.abs(unit[..., None] - numbers)
    distance[..., numbers == 0] = np.where(x == 0, 0.0, np.inf)[..., None]  # sign stays
    if signed:
        distance[np.sign(numbers) * np.sign(unit[..., None]) < 0] = np.inf
    got = np.take_along_axis(distance, np.asarray(index)[..., None].astype(int), -1)
    assert np.all(got[..., 0] - distance.min(-1) <= 3e-7 * np.abs(unit))


def test_rows_of_unused_columns_look_where_the_others_do_not():
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(9, 3)))[0].T
    used = jnp.array(rows)[None].at[0, 2].set(0.0)
    norms, old = jnp.ones((1, 3, 1)).at[0, 2].set(0.0), jnp.ones((1, 3, 9)) / 3
    ((found,),) = best_codes._with_spare([used], [norms], [old], [old @ used.mT])
    np.testing.assert_array_equal(found[:2], used[0, :2])
    np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-6)


def test_only_a_type_of_less_range_than_float32_lacks_it():
    assert lro.Cast(jnp.bfloat16).lacks == lro.Cast(jnp.float32).lacks == ()
    assert lro.Cast(jnp.float16).lacks
