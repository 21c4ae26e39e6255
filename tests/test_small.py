"""Small factorizations in plain arithmetic, against float64 NumPy.

Accelerators run them; on CPU, where LAPACK stands for some, they are called directly.
In three forms: a loop, its steps written out, and GPU's kernels, interpreted.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax._src.linalg import lapack, small, small_gpu

WIDTHS = range(1, small.WIDEST + 1)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def symmetric(k, seed=0):
    a = normal(3, k, k, seed=seed)
    return a + a.mT


def definite(k, seed=0):
    y = normal(3, 2 * k + 3, k, seed=seed)
    return y.mT @ y / y.shape[1]


def grading(k):
    return np.logspace(0, -4, k)


def spectrum(values, seed=0):
    q = np.linalg.qr(normal(3, len(values), len(values), seed=seed))[0]
    a = (q * values) @ q.mT
    return (a + a.mT) / 2


# Each of a width: symmetric matrices on which an eigensolver may fail.
SYMMETRIC = {
    "indefinite": symmetric,
    "definite": definite,
    "graded": lambda k: grading(k)[:, None] * definite(k) * grading(k),
    "graded the other way": lambda k: (
        grading(k)[::-1, None] * definite(k) * grading(k)[::-1]
    ),
    "graded and indefinite": lambda k: grading(k)[:, None] * symmetric(k) * grading(k),
    "rank one": lambda k: normal(3, k, 1) @ normal(3, k, 1).mT,
    "half the rank": lambda k: spectrum(np.arange(k) < (k + 1) // 2),
    "zero": lambda k: np.zeros((3, k, k)),
    "identity": lambda k: np.broadcast_to(np.eye(k), (3, k, k)),
    "all equal": lambda k: spectrum(np.full(k, 2.0)),
    "pairs of equals": lambda k: spectrum(1.0 + np.arange(k) // 2),
    "opposite": lambda k: spectrum((-1.0) ** np.arange(k)),
    "nearly equal": lambda k: spectrum(1 + 1e-6 * np.arange(k)),
    "negative": lambda k: -definite(k),
    "ones": lambda k: np.ones((3, k, k)),
    "descending": lambda k: np.broadcast_to(np.diag(np.arange(k, 0.0, -1)), (3, k, k)),
    "ascending": lambda k: np.broadcast_to(np.diag(np.arange(1.0, k + 1)), (3, k, k)),
    "large": lambda k: 1e15 * symmetric(k),
    "tiny": lambda k: 1e-15 * symmetric(k),
}


KERNEL = "kernel"


@functools.partial(jax.jit, static_argnames="form")
def jacobi_eigh(a, form="loop"):
    if form == KERNEL:
        return small_gpu.jacobi_eigh(jnp.asarray(a), True)
    return small.jacobi_eigh(a, unroll=form == "unrolled")


@functools.partial(jax.jit, static_argnames=("least", "form"))
def inverse_cholesky(gram, least=0.0, form="unrolled"):
    if form == KERNEL:
        return small_gpu.inverse_cholesky(jnp.asarray(gram), least, True)
    return small.inverse_cholesky(gram, least, unroll=form == "unrolled")


def kernel_eigh(a):
    return small_gpu.jacobi_eigh(a, True)


on_all = pytest.mark.parametrize("form", ["loop", KERNEL])


def exactly(matrices):
    """As float32, and as what float64 knows of that."""
    single = np.asarray(matrices, np.float32)
    return single, single.astype(np.float64)


# Eigendecompositions


def check_eigh(matrices, form="loop", atol=3e-6):
    single, wide = exactly(matrices)
    values, vectors = jacobi_eigh(single, form)
    assert values.dtype == vectors.dtype == np.float32
    values, vectors = (np.asarray(x, np.float64) for x in (values, vectors))
    assert values.shape == wide.shape[:-1] and vectors.shape == wide.shape
    assert np.all(np.diff(values, axis=-1) <= 0)
    size = np.linalg.norm(wide, axis=(-2, -1))[:, None]
    exact = np.linalg.eigvalsh(wide)[..., ::-1]
    assert np.all(np.abs(values - exact) <= atol * size)
    eye = np.broadcast_to(np.eye(wide.shape[-1]), wide.shape)
    np.testing.assert_allclose(vectors.mT @ vectors, eye, rtol=0, atol=1e-5)
    error = wide @ vectors - vectors * values[:, None, :]
    assert np.all(np.abs(error) <= 2 * atol * size[..., None])


@on_all
@pytest.mark.parametrize("k", WIDTHS)
def test_eigh(k, form):
    """All cases of a width in one call, as the matrices of a model are."""
    check_eigh(np.concatenate([case(k) for case in SYMMETRIC.values()]), form)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7])
def test_eigh_unrolled(k):
    matrices = np.concatenate([case(k) for case in SYMMETRIC.values()])
    check_eigh(matrices, "unrolled")


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    st.integers(0, 10**6),
    st.sampled_from([(2, "loop"), (5, KERNEL), (16, "loop"), (16, KERNEL)]),
    st.floats(0, 8),
    st.booleans(),
)
def test_eigh_of_any_spectrum(seed, kind, grade, signs):
    k, form = kind
    rng = np.random.default_rng(seed)
    values = 10.0 ** -(grade * rng.uniform(size=k))
    if signs:
        values *= rng.choice([-1.0, 0.0, 1.0], k)
    check_eigh(spectrum(values, seed), form)


@on_all
@pytest.mark.parametrize("k", [3, 8, 16])
def test_small_eigenvalues_of_graded_matrices_have_their_own_precision(k, form):
    single, wide = exactly(grading(k)[:, None] * definite(k) * grading(k))
    values = np.asarray(jacobi_eigh(single, form)[0], np.float64)
    exact = np.linalg.eigvalsh(wide)[..., ::-1]
    assert exact[0, -1] < 1e-6 * exact[0, 0]
    np.testing.assert_allclose(values, exact, rtol=1e-4)


@on_all
@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_eigenvalues_that_are_not_numbers_stay_in_their_matrix(k, form):
    a = np.float32(symmetric(k))
    a[1, 0, k - 1] = a[1, k - 1, 0] = np.nan
    values, vectors = jacobi_eigh(a, form)
    alone = jacobi_eigh(a[::2], form)
    for i in (0, 2):
        np.testing.assert_array_equal(values[i], alone[0][i // 2])
        np.testing.assert_array_equal(vectors[i], alone[1][i // 2])
    assert not np.all(np.isfinite(values[1]))


# Inverses


FORMS = [(k, form) for form in ("loop", KERNEL) for k in WIDTHS]
FORMS += [(k, "unrolled") for k in (1, 2, 3, 5, 8, 16)]


@pytest.mark.parametrize(("k", "form"), FORMS)
def test_inverses_whiten(k, form):
    single, wide = exactly(np.concatenate([definite(k), 3 * definite(k, seed=5)]))
    t = np.asarray(inverse_cholesky(single, form=form), np.float64)
    eye = np.broadcast_to(np.eye(k), wide.shape)
    np.testing.assert_allclose(t.mT @ wide @ t, eye, rtol=0, atol=1e-4)
    # The inverse itself, to the precision that the condition leaves.
    np.testing.assert_allclose(t @ t.mT, np.linalg.inv(wide), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.tril(t, -1), 0)
    exact = np.linalg.inv(np.linalg.cholesky(wide)).mT
    np.testing.assert_allclose(t, exact, rtol=1e-3, atol=1e-4)


@on_all
@pytest.mark.parametrize("k", [2, 5, 16])
@pytest.mark.parametrize("reverse", [False, True])
def test_inverses_of_graded_matrices(k, reverse, form):
    d = grading(k)[:: -1 if reverse else 1]
    single, wide = exactly(d[:, None] * definite(k) * d)
    t = np.asarray(inverse_cholesky(single, form=form), np.float64)
    # Columns of very unequal size are whitened as well as equal ones.
    eye = np.broadcast_to(np.eye(k), wide.shape)
    np.testing.assert_allclose(t.mT @ wide @ t, eye, rtol=0, atol=2e-4)


@pytest.mark.parametrize("form", ["unrolled", KERNEL])
@pytest.mark.parametrize(("k", "rank"), [*((8, r) for r in (0, 1, 3, 7, 8)), (5, 2)])
def test_what_depends_on_others_is_dropped(k, rank, form):
    y = normal(3, 20, k)
    if rank < k:
        y = normal(3, 20, rank) @ normal(3, rank, k, seed=1)
    single, wide = exactly(y.mT @ y)
    t = np.asarray(inverse_cholesky(single, 1e-2, form), np.float64)
    assert np.all(np.isfinite(t))
    used = np.any(t != 0, axis=-2)
    np.testing.assert_array_equal(used.sum(-1), rank)
    expected = np.eye(k) * used[:, None]
    np.testing.assert_allclose(t.mT @ wide @ t, expected, rtol=0, atol=1e-2)
    # What is kept spans all.
    np.testing.assert_allclose(
        wide @ t @ t.mT @ wide, wide, rtol=0, atol=1e-4 * max(wide.max(), 1)
    )


@pytest.mark.parametrize("form", ["unrolled", KERNEL])
def test_the_first_of_dependent_columns_is_kept(form):
    a = np.float32(np.diag([1.0, 4.0, 0.1, 4.0])[None])
    a[0, 1, 3] = a[0, 3, 1] = 4.0  # the last depends on the second
    t = np.asarray(inverse_cholesky(a, 0.2, form))[0]
    np.testing.assert_allclose(t, np.diag([1, 0.5, 0, 0]), atol=1e-6)


@pytest.mark.parametrize("form", ["unrolled", KERNEL])
@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_inverses_of_zero_are_zero(k, form):
    zero = np.zeros((2, k, k), np.float32)
    np.testing.assert_array_equal(inverse_cholesky(zero, form=form), 0)


@pytest.mark.parametrize("form", ["unrolled", KERNEL])
@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_inverses_that_are_not_numbers_stay_in_their_matrix(k, form):
    a = np.float32(definite(k))
    a[1, k // 2] = a[1, :, k // 2] = np.nan  # as in the Gram matrix of a bad column
    t = np.asarray(inverse_cholesky(a, form=form))
    np.testing.assert_array_equal(t[::2], inverse_cholesky(a[::2], form=form))
    assert not np.all(np.isfinite(t[1] @ a[1]))


@pytest.mark.parametrize(
    "function",
    [
        jacobi_eigh,
        functools.partial(inverse_cholesky, least=0.25),
        functools.partial(jacobi_eigh, form=KERNEL),
        functools.partial(inverse_cholesky, least=0.25, form=KERNEL),
    ],
)
def test_a_matrix_is_factored_alone_as_among_others(function):
    a = np.float32(definite(6))
    together = jax.tree.leaves(function(a))
    for i in range(3):
        alone = jax.tree.leaves(function(a[i : i + 1]))
        for x, y in zip(together, alone, strict=True):
            np.testing.assert_allclose(x[i], y[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [3, 8])
def test_the_kernel_of_inverses_has_the_derivative_of_plain_arithmetic(k):
    a, change = np.float32(definite(k)), np.float32(symmetric(k, seed=3))
    plain, kernel = (
        jax.jvp(lambda x, form=form: inverse_cholesky(x, 1e-2, form), (a,), (change,))
        for form in ("unrolled", KERNEL)
    )
    assert np.any(kernel[1] != 0)
    np.testing.assert_allclose(plain[1], kernel[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("find", [lapack._jacobi_eigh, kernel_eigh])
@pytest.mark.parametrize("case", ["definite", "zero", "ones", "half the rank"])
def test_derivatives_of_eigendecompositions_on_accelerators(case, find):
    a, weight = np.float32(SYMMETRIC[case](4)), jnp.asarray(definite(4, seed=7))

    def measure(find, a):
        """What does not depend on signs, nor on which vectors equal values have."""
        values, vectors = find((a + a.mT) / 2)
        smooth = (vectors * (values / (1 + values**2))[:, None]) @ vectors.mT
        return jnp.sum(weight * smooth)

    found = jax.grad(functools.partial(measure, find))(a)
    expected = jax.grad(functools.partial(measure, lapack._library_eigh))(a)
    assert np.all(np.isfinite(found)) and np.any(found != 0)
    if case == "definite":
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
