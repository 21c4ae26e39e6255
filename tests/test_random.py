"""The hashed random numbers: their distribution, independence and places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax._src.linalg import random

KEYS = jax.random.split(jax.random.key(0), 3)


def test_normal_entries_are_normal():
    x = np.asarray(random.normal(KEYS[0], (512, 300), jnp.float32), np.float64)
    # Kolmogorov and Smirnov's distance, below 1.63 / sqrt(n) for 99 samples of 100.
    exact = jax.scipy.special.ndtr(np.sort(x, axis=None))
    ranks = (np.arange(x.size) + 0.5) / x.size
    assert np.max(np.abs(exact - ranks)) < 1.63 / x.size**0.5
    np.testing.assert_allclose([x.mean(), x.var()], [0, 1], atol=0.015)
    # The tails too: of 153,600 entries 9.7 are expected beyond 4.
    assert 1 <= np.sum(np.abs(x) > 4) <= 25
    assert np.isfinite(x).all()


def test_normal_entries_are_independent():
    """Singular values at the edges that independent entries have, and no others."""
    rows, cols = 512, 128
    for key in KEYS:
        x = np.asarray(random.normal(key, (rows, cols), jnp.float32), np.float64)
        values = np.linalg.svd(x, compute_uv=False) / rows**0.5
        ratio = (cols / rows) ** 0.5  # Marchenko and Pastur: 1 +- ratio
        np.testing.assert_allclose(
            values[[0, -1]], [1 + ratio, 1 - ratio], atol=0.06, err_msg=str(key)
        )
        for lag in (1, 2, 8, 64):
            for y in (x[lag:] * x[:-lag], x[:, lag:] * x[:, :-lag]):
                assert abs(y.mean()) < 4 / y.size**0.5, lag


@pytest.mark.parametrize("other", ["next key", "fold"])
def test_keys_give_independent_matrices(other):
    key = KEYS[1] if other == "next key" else jax.random.fold_in(KEYS[0], 1)
    x, y = (
        np.asarray(random.normal(k, (256, 64), jnp.float32)) for k in (KEYS[0], key)
    )
    assert np.linalg.norm(x.T @ y / 256, 2) < 2 * 64**0.5 / 256**0.5 + 0.3
    for turned in (y, y[::-1], y[:, ::-1]):
        assert abs(np.mean(x * turned)) < 4 / x.size**0.5


def test_bits_are_fair():
    words = np.asarray(random.bits(KEYS[0], (400, 500)))
    ones = [np.mean(words >> place & 1) for place in range(32)]
    np.testing.assert_allclose(ones, 0.5, atol=4 * 0.5 / words.size**0.5)


def test_each_matrix_of_a_stack_follows_from_its_own_key():
    whole = random.normal(KEYS, (3, 7, 5), jnp.float32)
    for i, key in enumerate(KEYS):
        np.testing.assert_array_equal(whole[i], random.normal(key, (7, 5), jnp.float32))
        np.testing.assert_array_equal(
            random.bits(KEYS, (3, 7, 5))[i], random.bits(key, (7, 5))
        )
    mapped = jax.vmap(lambda key: random.normal(key, (7, 5), jnp.float32))(KEYS)
    np.testing.assert_array_equal(mapped, whole)


def test_one_key_gives_each_matrix_its_own():
    stack = np.asarray(random.normal(KEYS[0], (4, 40, 30), jnp.float32))
    flat = stack.reshape(4, -1)
    np.testing.assert_allclose(np.corrcoef(flat), np.eye(4), atol=0.12)


def test_any_kind_of_key():
    for key in (jax.random.PRNGKey(3), jax.random.key(3, impl="rbg")):
        x = np.asarray(random.normal(key, (64, 64), jnp.float32))
        assert abs(x.mean()) < 4 / 64 and 0.9 < x.std() < 1.1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=str)
def test_normal_is_never_infinite(monkeypatch, dtype):
    """At the extreme words, where the inverse of the distribution has its poles."""
    words = jnp.array([0, 2**32 - 1, 2**31, 2**31 - 1], jnp.uint32)
    monkeypatch.setattr(random, "bits", lambda key, shape: words)
    x = random.normal(KEYS[0], (4,), dtype)
    assert x.dtype == dtype
    x = np.asarray(x, np.float64)
    assert np.isfinite(x).all()
    np.testing.assert_allclose(x[0], -x[1], rtol=1e-5)
    assert 5 < x[1] < 5.6


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_of_successive_seeds_do_not_share_their_rows(impl):
    first = np.asarray(random.bits(jax.random.key(0, impl=impl), (64, 8)))
    for seed in (1, 2, 3, 4, 32):
        other = np.asarray(random.bits(jax.random.key(seed, impl=impl), (64, 8)))
        assert np.intersect1d(first[:, 0], other[:, 0]).size <= 1, seed
