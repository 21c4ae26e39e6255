"""How far Adam can go."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from lowrank_optax._src.parts.bounds import most_of_adam

DECAYS = [(0.9, 0.999), (0.8, 0.999), (0.0, 0.9), (0.5, 0.5)]


def ratio(b1, b2, grads):
    """``|m| / sqrt(v)`` after these gradients, in float64."""
    m = v = 0.0
    for g in grads:
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    return abs(m) / np.sqrt(v)


@pytest.mark.parametrize("b1, b2", DECAYS)
@hypothesis.given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30))
def test_no_gradients_exceed_it(b1, b2, grads):
    hypothesis.assume(any(abs(g) > 1e-3 for g in grads))
    assert ratio(b1, b2, grads) <= most_of_adam(b1, b2) * (1 + 1e-5)


@pytest.mark.parametrize("b1, b2", DECAYS)
def test_some_gradients_reach_it(b1, b2):
    # Where Cauchy and Schwarz are equal: each gradient b1 / b2 times the one after it.
    grads = (b1 / b2) ** np.arange(400)[::-1]
    np.testing.assert_allclose(ratio(b1, b2, grads), most_of_adam(b1, b2), rtol=1e-3)


def test_there_is_none_where_the_second_moment_forgets_first():
    assert most_of_adam(0.9, 0.8) == np.inf
