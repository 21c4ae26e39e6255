"""Stacks of thin problems of many leaves: what goes in comes out in its place."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax._src.linalg.thin import (
    Stacks,
    across,
    as_parts,
    each,
    each_of_several,
    places,
)

# Some alone, some of one shape, with and without batch axes.
SHAPES = [(6, 3), (2, 6, 3), (5, 3), (6, 3), (2, 2, 5, 3), (1, 6, 3), (4, 2), (5, 3)]


def arrays(shapes=SHAPES, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


def transformed(function):
    """As it is, compiled with a number that is known, and with one that is not."""
    yield function(None)
    yield jax.jit(lambda: function(None))()
    yield jax.jit(function)(jnp.int32(7))


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_stacks_go_there_and_back():
    given = arrays()

    def round_trip(count):
        stacks = Stacks([(x,) for x in given], count)
        stacked = stacks.stack(given)
        assert [x.shape for x in stacked] == [(5, 6, 3), (6, 5, 3), (1, 4, 2)]
        return stacks.unstack(stacked)

    for found in transformed(round_trip):
        assert_equal(found, given)


def test_on_gpu_no_part_is_taken_at_a_known_place():
    # Of parts at known places, XLA's GPU backend takes each in a launch of its own.
    given = arrays(70 * [(6, 3)])
    (stack,) = Stacks([(x,) for x in given], None).stack(given)

    def parts(stack, count):
        return Stacks([(x,) for x in given], count).unstack([stack])

    # What is lowered for another platform is also run, here.
    allowed = [jax.export.DisabledSafetyCheck.platform()]
    for platform, unknown in (("cuda", 70), ("tpu", 0)):
        exported = jax.export.export(
            jax.jit(parts), platforms=[platform], disabled_checks=allowed
        )(stack, jnp.int32(1))
        text = exported.mlir_module()
        assert text.count("stablehlo.dynamic_slice") == 70
        assert text.count("stablehlo.add") == unknown
        assert "stablehlo.slice" not in text and "stablehlo.while" not in text
        assert_equal(exported.call(stack, jnp.int32(1)), given)


def test_problems_of_several_arrays_are_alike_in_all_of_them():
    left = arrays([(4, 2), (4, 2), (3, 4, 2), (4, 2)])
    right = arrays([(2, 5), (2, 6), (3, 2, 5), (2, 5)], seed=1)
    stacks = Stacks(list(zip(left, right, strict=True)), None)
    assert [x.shape for x in stacks.stack(left)] == [(5, 4, 2), (1, 4, 2)]
    assert [x.shape for x in stacks.stack(right)] == [(5, 2, 5), (1, 2, 6)]
    assert_equal(stacks.unstack(stacks.stack(right)), right)


def test_what_comes_back_may_be_of_another_shape():
    given = arrays()
    stacks = Stacks([(x,) for x in given], None)
    found = stacks.unstack([x.mT @ x for x in stacks.stack(given)])
    for x, y in zip(found, given, strict=True):
        assert x.shape == (*y.shape[:-2], y.shape[-1], y.shape[-1])
        np.testing.assert_allclose(x, y.mT @ y, rtol=1e-5, atol=1e-6)


def test_owners_are_the_problems_that_matrices_come_from():
    stacks = Stacks([(x,) for x in arrays()], None)
    owners = stacks.owners([10, 11, 12, 13, 14, 15, 16, 17])
    expected = [[10, 11, 11, 13, 15], [12, 14, 14, 14, 14, 17], [16]]
    assert [list(x) for x in owners] == expected
    # By the values, in the same places.
    given = [jnp.full(s, float(i)) for i, s in enumerate(SHAPES)]
    for x, owner in zip(stacks.stack(given), stacks.owners(range(8)), strict=True):
        np.testing.assert_array_equal(x[:, 0, 0], owner)


def test_unequal_dtypes_are_never_mixed():
    given = [jnp.ones((4, 2)), jnp.ones((4, 2), jnp.bfloat16), jnp.zeros((4, 2))]
    stacks = Stacks([(x,) for x in given], None)
    assert_equal(stacks.unstack(stacks.stack(given)), given)


@pytest.mark.parametrize("shapes", [[(4, 2)], 2 * [(4, 2)], 3 * [(4, 2)], SHAPES])
def test_each_is_the_function_of_each(shapes):
    problems = [(x, x[..., :1, :]) for x in arrays(shapes)]

    def double(x, row):
        assert x.ndim == row.ndim == 3
        return 2 * x - row

    for found in transformed(lambda count: each(double, problems, count)):
        expected = [2 * x - row for x, row in problems]
        assert_equal(found, expected)


@pytest.mark.parametrize("shapes", [[], [(4, 2)], SHAPES])
def test_each_of_several_makes_several_of_each(shapes):
    problems = [(x, x[..., :1, :]) for x in arrays(shapes)]

    def some(x, row):
        return x - row, 3 * row, jnp.max(x, axis=-1, keepdims=True)

    for found in transformed(lambda count: each_of_several(some, problems, count)):
        assert len(found) == len(problems)
        for mine, problem in zip(found, problems, strict=True):
            assert_equal(mine, some(*problem))


def test_on_gpu_parts_are_of_copies_that_are_kept_apart():
    given = arrays()

    def parts(count):
        return as_parts(given, count)

    allowed = [jax.export.DisabledSafetyCheck.platform()]
    for platform, stacks in (("cuda", 3), ("tpu", 0)):
        exported = jax.export.export(
            jax.jit(parts), platforms=[platform], disabled_checks=allowed
        )(jnp.int32(1))
        text = exported.mlir_module()
        # One of each shape; without a barrier, XLA would read the arrays themselves.
        assert text.count("stablehlo.optimization_barrier") == stacks
        assert_equal(exported.call(jnp.int32(1)), given)


def test_each_calls_once_a_shape():
    calls = []

    def note(x):
        calls.append(x.shape)
        return x

    each(note, [(x,) for x in arrays()], None)
    assert sorted(calls) == [(1, 4, 2), (5, 6, 3), (6, 5, 3)]


def test_across_is_one_call_for_all_matrices_of_a_shape():
    stacks = arrays([(2, 3, 3), (1, 4, 4), (4, 3, 3), (5, 4, 4)])
    calls = []

    def inverse(x):
        calls.append(x.shape)
        return jnp.linalg.inv(x)

    found = across(inverse, iter(stacks))
    assert sorted(calls) == [(6, 3, 3), (6, 4, 4)]
    for x, y in zip(found, stacks, strict=True):
        np.testing.assert_allclose(x @ y, jnp.stack(len(y) * [jnp.eye(y.shape[-1])]),
                                   atol=1e-4)  # fmt: skip
    assert across(inverse, []) == []


def test_gradients_pass_through():
    given = arrays(4 * [(4, 2)])

    def total(given):
        found = each(lambda x: x**2, [(x,) for x in given], None)
        return sum(i * jnp.sum(x) for i, x in enumerate(found))

    slopes = jax.grad(total)(given)
    assert_equal(slopes, [2.0 * i * x for i, x in enumerate(given)])


@pytest.mark.parametrize("count", [0, 1, 10**9, np.iinfo(np.int32).max])
def test_places_are_the_numbers_whatever_the_count(count):
    found = jax.jit(lambda x: places([0, 3, 17, 40], x))(jnp.int32(count))
    assert [int(x) for x in found] == [0, 3, 17, 40]
    assert places([0, 3, 17], None) == [0, 3, 17]
    assert places([0, 3, 17], jnp.int32(count)) == [0, 3, 17]
