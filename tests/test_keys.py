"""The keys of matrices are those of the formula, of one leaf and of many at once."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax._src.leaves.keys import leaf_seed, matrix_keys, matrix_keys_each

PATHS = [("a", "w"), ("b", "w"), ("a/b", "w"), ("c",)]
BATCHES = [(), (3,), (2, 2), (1,)]


def by_formula(key, path, step, places, field=""):
    """As the docstring has it, folded one by one."""
    text = "/".join(part.replace("/", "\0") for part in path)
    words = [zlib.crc32(text.encode()), step]
    words += [zlib.crc32(field.encode())] if field else []
    for word in (*words, *places):
        key = jax.random.fold_in(key, np.uint32(word))
    return np.asarray(jax.random.key_data(key))


@pytest.mark.parametrize(
    "key",
    [
        7,
        np.int64(7),
        np.array(7),
        jnp.array(7),
        jax.random.key(7),
        jax.random.PRNGKey(7),
        np.asarray(jax.random.PRNGKey(7)),
    ],
    ids=lambda key: f"{type(key).__name__}-{np.ndim(key)}",
)
@pytest.mark.parametrize("compiled", [False, True])
def test_keys_are_those_of_the_formula(key, compiled):
    seeds, step = [leaf_seed(key, path) for path in PATHS], jnp.int32(11)
    several = jax.jit(lambda t: matrix_keys_each(seeds, t, BATCHES))
    found = several(step) if compiled else matrix_keys_each(seeds, step, BATCHES)
    root = jax.random.key(7, impl="threefry2x32")
    for seed, path, batch, keys in zip(seeds, PATHS, BATCHES, found, strict=True):
        assert keys.shape == batch
        for places in np.ndindex(batch):
            expected = by_formula(root, path, 11, places)
            np.testing.assert_array_equal(jax.random.key_data(keys[places]), expected)
        alone = matrix_keys(seed, step, batch)
        np.testing.assert_array_equal(
            jax.random.key_data(alone), jax.random.key_data(keys)
        )
        named = jax.random.key_data(matrix_keys(seed, step, batch, "mu"))
        last = tuple(n - 1 for n in batch)
        np.testing.assert_array_equal(
            named[last], by_formula(root, path, 11, last, "mu")
        )
    assert matrix_keys_each([], step, []) == []


def test_seeds_may_be_mapped_over():
    def words(seed):
        key = matrix_keys(leaf_seed(seed, PATHS[0]), jnp.int32(3), (2,))
        return jax.random.key_data(key)

    found = jax.vmap(words)(jnp.arange(4))
    for seed in range(4):
        np.testing.assert_array_equal(found[seed], words(seed))


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1])
def test_a_seed_of_too_many_bits_is_refused(seed):
    with pytest.raises(ValueError, match=f"a seed from -2.*63 - 1, got {seed}"):
        leaf_seed(seed, PATHS[0])
    leaf_seed(seed - 1 if seed > 0 else seed + 1, PATHS[0])


def test_the_default_generator_changes_no_key():
    words = [jax.random.key_data(leaf_seed(7, PATHS[0]).key)]
    with jax.default_prng_impl("rbg"):
        words += [
            jax.random.key_data(leaf_seed(seed, PATHS[0]).key)
            for seed in (7, jnp.array(7))
        ]
    assert all(w.shape == (2,) for w in words)
    np.testing.assert_array_equal(words[0], words[1])
    np.testing.assert_array_equal(words[0], words[2])
