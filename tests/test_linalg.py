"""The factorizations: their laws on worst cases, against float64 NumPy, transformed."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_optax import linalg
from lowrank_optax._src.linalg import (
    Lying,
    eigh,
    gram,
    inverse_root,
    lapack,
    lifted,
    power_of_two,
    svd,
    unit_scale,
    whitening,
)
from lowrank_optax._src.linalg.products import sums_from_end
from lowrank_optax._src.linalg.random import fixed_signs


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def spectrum(m, n, values, seed=0):
    """A matrix with these singular values and random singular vectors."""
    u = np.linalg.qr(normal(m, len(values), seed=seed))[0]
    v = np.linalg.qr(normal(n, len(values), seed=seed + 1))[0]
    return (u * values) @ v.T


# Columns on which orthonormalizers fail: each must obey the laws to the last digit.
WORST = {
    "gaussian": normal(40, 8),
    "square": normal(9, 9),
    "one entry": np.array([[-3.0]]),
    "zero entry": np.zeros((1, 1)),
    "zero": np.zeros((40, 8)),
    "square of zeros": np.zeros((6, 6)),
    "ones": np.ones((40, 8)),
    "square of ones": np.ones((9, 9)),
    "rank 1": np.outer(normal(40), normal(8)),
    "rank 2 of 8": normal(40, 2) @ normal(2, 8),
    "rank 3 of 8": normal(40, 3) @ normal(3, 8),
    "repeated columns": np.repeat(normal(40, 4), 2, axis=1),
    "nearly repeated": np.repeat(normal(40, 4), 2, axis=1) + 1e-6 * normal(40, 8),
    "zero columns": normal(40, 8) * (np.arange(8) > 4),
    "condition 1e4": spectrum(40, 8, np.logspace(0, -4, 8)),
    "condition 1e12": spectrum(40, 8, np.logspace(0, -12, 8)),
    "graded columns": normal(40, 8) * np.logspace(0, -12, 8),
    "graded rows": normal(40, 8) * np.logspace(0, -12, 40)[:, None],
    "hilbert": 1.0 / (1.0 + np.arange(40)[:, None] + np.arange(8)),
    "unit vectors": np.eye(40, 8),
    "scale 1e35": 1e35 * normal(40, 8),
    "scale 1e-30": 1e-30 * normal(40, 8),
    "mixed scales": normal(40, 8) * np.repeat([1e15, 1.0, 1e-15, 1e15], 2),
    "many columns": normal(300, 20) @ normal(20, 60),
}
WORST = {name: a.astype(np.float32) for name, a in WORST.items()}


@st.composite
def columns(draw):
    """A few columns of any rank, grading and scale."""
    m, r = draw(st.sampled_from([(1, 1), (7, 1), (6, 6), (40, 8)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rank = draw(st.integers(0, r))
    a = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, r))
    a = a * 10.0 ** -np.linspace(0, draw(st.floats(0, 12)), r)
    return (a * 10.0 ** draw(st.floats(-24, 35))).astype(np.float32)


def unit(a):
    """In float64, divided by the largest entry: squares neither over- nor underflow."""
    a = np.asarray(a, np.float64)
    return a / (np.abs(a).max() or 1.0)


def check_orthonormal(q, atol=1e-5):
    q = np.asarray(q, np.float64)
    gram = np.swapaxes(q, -1, -2) @ q
    np.testing.assert_allclose(
        gram, np.broadcast_to(np.eye(q.shape[-1]), gram.shape), rtol=0, atol=atol
    )


def projector(q):
    q = np.asarray(q, np.float64)
    return q @ np.swapaxes(q, -1, -2)


def check_orthonormalize(a, q):
    assert q.dtype == jnp.float32 and q.shape == a.shape
    check_orthonormal(q)
    # Each column by its own scale: a tiny column is a direction like any other.
    a = np.stack([unit(column) for column in a.T], axis=1)
    left_out = np.linalg.norm(a - projector(q) @ a, axis=0)
    assert np.all(left_out <= 1e-5 * np.linalg.norm(a, axis=0))


def check_range_basis(a, q):
    assert q.dtype == jnp.float32 and q.shape == a.shape
    used = np.any(np.asarray(q) != 0, axis=0)
    check_orthonormal(q[:, used])
    a = unit(a)
    left_out = np.linalg.norm(a - projector(q) @ a)
    assert left_out <= 1e-5 * np.linalg.norm(a)


# Compiled once a shape, as in every use of them inside an update.
orthonormalize = jax.jit(linalg.orthonormalize)
range_basis = jax.jit(linalg.range_basis)
gram_eigh = jax.jit(linalg.gram_eigh, static_argnums=1)
range_finder = jax.jit(linalg.range_finder, static_argnums=(2, 3))
subspace_iteration = jax.jit(linalg.subspace_iteration, static_argnums=(2, 3, 4))
randomized_svd = jax.jit(linalg.randomized_svd, static_argnums=(2, 3, 4))
over_keys = {
    f: jax.vmap(f, in_axes=(0,) + (None,) * 4)
    for f in (range_finder, subspace_iteration, randomized_svd)
}


@pytest.mark.parametrize("name", WORST)
def test_orthonormalize_completes_the_worst_columns(name):
    check_orthonormalize(WORST[name], orthonormalize(WORST[name]))


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 2), (4, 4), (10, 10)], ids=str)
def test_orthonormalize_completes_nothing_at_all(shape):
    a = np.zeros(shape, np.float32)
    check_orthonormalize(a, orthonormalize(a))


def test_the_completing_directions_are_independent():
    # A fixed matrix of random signs is singular for one small shape in four.
    directions = np.asarray(fixed_signs(64, 64), np.float64)
    np.testing.assert_array_equal(fixed_signs(7, 3), directions[:7, :3])
    for rows in range(1, 65):
        assert np.linalg.cond(directions[:rows, :rows]) <= 50 * rows, rows


@hypothesis.settings(max_examples=100)
@hypothesis.given(columns())
def test_orthonormalize_completes_any_columns(a):
    check_orthonormalize(a, orthonormalize(a))


@pytest.mark.parametrize("name", WORST)
def test_range_basis_spans_the_worst_columns(name):
    check_range_basis(WORST[name], range_basis(WORST[name]))


@hypothesis.settings(max_examples=100)
@hypothesis.given(columns())
def test_range_basis_spans_any_columns(a):
    check_range_basis(a, range_basis(a))


@pytest.mark.parametrize(
    "name, rank",
    {
        "zero entry": 0,
        "zero": 0,
        "ones": 1,
        "rank 1": 1,
        "rank 2 of 8": 2,
        "rank 3 of 8": 3,
        "zero columns": 3,
        "repeated columns": 4,
        "condition 1e4": 8,
        "gaussian": 8,
        "square": 9,
        "many columns": 20,
    }.items(),
)
def test_range_basis_invents_no_direction(name, rank):
    q = np.asarray(range_basis(WORST[name]))
    assert np.count_nonzero(np.any(q != 0, axis=0)) == rank


def test_leading_columns_span_the_leading_columns():
    a = normal(30, 6).astype(np.float32)
    q, exact = orthonormalize(a), np.linalg.qr(a.astype(np.float64))[0]
    for k in range(1, 7):
        np.testing.assert_allclose(
            projector(q[:, :k]), projector(exact[:, :k]), rtol=0, atol=2e-5
        )


@jax.jit
def lifted_and_whitened(y):
    """The columns of a stack of matrices after one round and after both."""
    y = lifted(y)
    return y, jnp.matmul(y, whitening(gram(y)), precision="highest")


def check_whitened(lift, q):
    """As orthonormal as a Gram matrix tells; which columns are not zero."""
    unit = np.linalg.norm(q, axis=0) > 0.5
    new = np.diag(np.linalg.qr(lift[:, unit])[1]) ** 2
    tolerance = 5e-6 / np.min(new, initial=1.0)
    assert tolerance < 6e-4
    np.testing.assert_allclose(q.T @ q, np.diag(1.0 * unit), rtol=0, atol=tolerance)
    return unit


@pytest.mark.parametrize("name", WORST)
def test_lifting_and_whitening_make_columns_orthonormal_or_zero(name):
    scaled, _ = unit_scale(WORST[name])
    lift, q = (np.asarray(x[0], np.float64) for x in lifted_and_whitened(scaled[None]))
    y = np.asarray(scaled, np.float64)
    assert np.all(np.isfinite(lift))
    unit = check_whitened(lift, q)
    assert np.all(q[:, ~unit] == 0)
    # Of a column nothing is left out but what is small beside it, or beside the
    # largest: 1e-11 of its square, which is the rounding error of float32.
    left_out, size = (np.linalg.norm(x, axis=0) for x in (y - q @ (q.T @ y), y))
    assert np.all(left_out <= 5e-4 * size + 4e-6 * size.max())


@hypothesis.settings(max_examples=100)
@hypothesis.given(columns())
def test_lifting_and_whitening_span_any_columns(a):
    scaled, _ = unit_scale(a)
    lift, q = (np.asarray(x[0], np.float64) for x in lifted_and_whitened(scaled[None]))
    check_whitened(lift, q)
    y = np.asarray(scaled, np.float64)
    left_out, size = (np.linalg.norm(x, axis=0) for x in (y - q @ (q.T @ y), y))
    assert np.all(left_out <= 5e-4 * size + 4e-6 * size.max())


@pytest.mark.parametrize("name", ["rank 2 of 8", "rank 3 of 8", "zero", "many columns"])
def test_whitening_invents_no_direction(name):
    scaled, _ = unit_scale(WORST[name])
    q = np.asarray(lifted_and_whitened(scaled[None])[1][0])
    rank = {"rank 2 of 8": 2, "rank 3 of 8": 3, "zero": 0, "many columns": 20}[name]
    assert np.count_nonzero(np.any(q != 0, axis=0)) == rank


@pytest.mark.parametrize("k", [1, 4, 20])
def test_what_is_not_a_number_does_not_get_lost_in_a_sketch(k):
    y = normal(2, 40, k).astype(np.float32)
    y[0, 3, k // 2] = np.nan
    q = np.asarray(lifted_and_whitened(y)[1])
    assert not np.all(np.isfinite(q[0])) and np.all(np.isfinite(q[1]))


@pytest.mark.parametrize("name", ["gaussian", "square", "condition 1e4"])
def test_orthonormalize_has_a_reverse_mode_derivative(name):
    with jax.enable_x64(True):
        a = jnp.asarray(WORST[name], jnp.float64)
        weights = jnp.asarray(normal(*a.shape, seed=5))

        def total(a):
            return jnp.sum(weights * linalg.orthonormalize(a) ** 2)

        slope = jax.jit(jax.grad(total))(a)
        towards = jnp.asarray(normal(*a.shape, seed=6))
        towards *= 1e-6 * jnp.linalg.svd(a, compute_uv=False)[..., -1]
        change = (total(a + towards) - total(a - towards)) / 2
        np.testing.assert_allclose(jnp.sum(slope * towards), change, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["gaussian", "ones", "rank 2 of 8", "zero", "zero columns"]
)
def test_a_derivative_of_orthonormalize_is_finite_in_float32(name):
    slope = jax.jit(jax.grad(lambda a: jnp.sum(linalg.orthonormalize(a)[..., 0])))
    assert np.all(np.isfinite(slope(WORST[name])))


@pytest.mark.parametrize("function", [orthonormalize, range_basis])
def test_bfloat16_columns_are_treated_in_float32(function):
    a = jnp.asarray(normal(40, 8), jnp.bfloat16)
    q = function(a)
    assert q.dtype == jnp.float32
    np.testing.assert_array_equal(q, function(a.astype(jnp.float32)))


@pytest.mark.parametrize("function", [orthonormalize, range_basis])
def test_float64_stays(function):
    with jax.enable_x64(True):
        q = function(jnp.asarray(normal(40, 8), jnp.float64))
        assert q.dtype == jnp.float64
        check_orthonormal(q, 1e-12)


def test_every_float_has_a_power_of_two_of_its_size():
    exponents = np.arange(-126, 128)
    for mantissa in (1.0, 1.999):
        x = np.ldexp(np.float32(mantissa), exponents).astype(np.float32)
        inverse, scale = map(np.asarray, power_of_two(jnp.asarray(x)))
        np.testing.assert_array_equal(inverse * scale, 1.0)
        np.testing.assert_array_equal(np.frexp(scale)[0], 0.5)  # powers of two
        # The inverse of the largest two would be no normal float.
        wanted = np.ldexp(np.float32(mantissa), np.maximum(exponents - 125, 0) - 1)
        np.testing.assert_array_equal(x * inverse, wanted)


def test_more_columns_than_rows_cannot_be_orthonormal():
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\).*at most 3 columns"):
        linalg.orthonormalize(jnp.ones((2, 3, 4)))
    # The range of a wide matrix has a basis all the same.
    a = normal(3, 5).astype(np.float32)
    check_range_basis(a, range_basis(a))


KEYS = jax.random.split(jax.random.key(0), 50)

SHAPES = [(48, 32), (32, 48)]
SPECTRA = {
    "fast": 0.7 ** np.arange(32),
    "slow": 0.95 ** np.arange(32),
    "harmonic": 1.0 / np.arange(1, 33),
    "root": np.arange(1, 33) ** -0.5,
}


@pytest.mark.parametrize("scale", [1.0, 1e35, 1e-30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram_eigh_matches_the_svd(shape, scale):
    a = (scale * spectrum(*shape, SPECTRA["fast"])).astype(np.float32)
    u, s, _ = np.linalg.svd(a.astype(np.float64), full_matrices=False)
    vectors, values = gram_eigh(a)
    assert vectors.shape == u.shape and values.shape == s.shape
    check_orthonormal(vectors)
    # Squaring costs half of the digits: 3e-4 of the largest is noise.
    np.testing.assert_allclose(values, s, rtol=1e-3, atol=3e-4 * s[0])
    assert np.all(np.diff(values) <= 0) and np.all(values >= 0)
    np.testing.assert_allclose(values[:8], s[:8], rtol=1e-4)
    np.testing.assert_allclose(
        projector(vectors[:, :8]), projector(u[:, :8]), rtol=0, atol=1e-4
    )
    for one, exact in zip(np.asarray(vectors[:, :8]).T, u[:, :8].T, strict=True):
        assert abs(one @ exact) > 1 - 1e-5


GRADED = {
    "one far above": lambda k, ratio: np.r_[1, ratio * 0.8 ** np.arange(k - 1)],
    "one far above equals": lambda k, ratio: np.r_[1, np.full(k - 1, ratio)],
    "of all sizes": lambda k, ratio: ratio ** np.linspace(0, 1, k),
    "of low rank": lambda k, ratio: np.r_[1, ratio, ratio / 2, np.zeros(k - 3)],
}


@pytest.mark.parametrize("ratio", [1e-2, 1e-3, 3e-4, 1e-4, 1e-5])
@pytest.mark.parametrize("name", GRADED)
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (10, 16), (160, 200)], ids=str)
def test_gram_eigh_tells_small_values_from_noise(shape, name, ratio):
    """Half of the digits are lost in one Gram matrix: 3e-4 of the largest."""
    a = spectrum(*shape, GRADED[name](min(shape), ratio)).astype(np.float32)
    u, s, _ = np.linalg.svd(a.astype(np.float64), full_matrices=False)
    vectors, values = gram_eigh(a)
    check_orthonormal(vectors)
    np.testing.assert_allclose(values, s, rtol=1e-5, atol=5e-6 * s[0])
    np.testing.assert_allclose(values[s > 1e-4], s[s > 1e-4], rtol=5e-4)
    assert np.all(np.diff(values) <= 0) and np.all(values >= 0)
    # Of all but the largest, the next ones hold what any as many can.
    rest = a - s[0] * np.outer(u[:, 0], u[:, 0] @ a / s[0])
    held = np.linalg.norm(np.asarray(vectors[:, :8], np.float64).T @ rest)
    assert held > (1 - 1e-3) * np.linalg.norm(s[1:8])


def test_gram_eigh_truncates_and_survives_zero():
    a = spectrum(9, 6, 0.5 ** np.arange(6)).astype(np.float32)
    vectors, values = gram_eigh(a, 2)
    assert vectors.shape == (9, 2) and values.shape == (2,)
    np.testing.assert_allclose(values, [1.0, 0.5], rtol=1e-5)
    assert gram_eigh(a, 100)[0].shape == (9, 6)
    for shape in ((9, 6), (6, 9)):
        vectors, values = gram_eigh(jnp.zeros(shape))
        check_orthonormal(vectors)
        np.testing.assert_array_equal(values, 0.0)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)], ids=str)
def test_range_finder_finds_a_low_rank_range(shape):
    a = spectrum(*shape, 0.5 ** np.arange(4)).astype(np.float32)
    q = range_finder(jax.random.key(0), a, 6)
    assert q.shape == (shape[0], 6)
    check_orthonormal(q)
    np.testing.assert_allclose(projector(q) @ a, a, rtol=0, atol=1e-5)
    assert range_finder(jax.random.key(0), a, 99).shape == (shape[0], 16)


@pytest.mark.parametrize(
    "dtype, scales",
    [("float32", (1e-30, 1e30)), ("float64", (1e-280, 1e-60, 1e160, 1e280))],
)
def test_range_finder_works_at_any_scale(dtype, scales):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 40)))[0] for n in (40, 60))
    a = (u * 10.0 ** -np.linspace(0, 6, 40)) @ v.T
    with jax.enable_x64(dtype == "float64"):
        for scale in scales:
            scaled = jnp.asarray(scale * a, dtype)
            q = np.asarray(linalg.range_finder(jax.random.key(0), scaled, 12, 2))
            outside = u[:, :4] - q @ (q.T @ u[:, :4])
            assert np.linalg.norm(outside, 2) < 1e-4, scale


def test_range_finder_starts_warm():
    a = spectrum(24, 16, SPECTRA["root"][:16]).astype(np.float32)
    u, _, vt = np.linalg.svd(a.astype(np.float64))
    start = jnp.asarray(vt[:3].T, jnp.float32)
    both = [range_finder(jax.random.key(i), a, 3, 0, start) for i in (0, 1)]
    np.testing.assert_array_equal(*both)
    np.testing.assert_allclose(
        projector(both[0]), projector(u[:, :3]), rtol=0, atol=1e-5
    )
    scaled = start * jnp.asarray([1e6, 1.0, 1e-6])
    same = [range_finder(jax.random.key(0), a, 5, 1, x) for x in (start, scaled)]
    np.testing.assert_allclose(*map(projector, same), rtol=0, atol=1e-4)
    more = range_finder(jax.random.key(0), a, 5, 0, start)
    np.testing.assert_allclose(projector(more) @ u[:, :3], u[:, :3], rtol=0, atol=1e-5)
    check_orthonormal(more)


def test_power_iterations_approach_the_best_subspace():
    a = spectrum(48, 32, SPECTRA["slow"]).astype(np.float32)
    s = np.linalg.svd(a.astype(np.float64), compute_uv=False)
    errors = []
    for q in (0, 1, 4):
        basis = over_keys[range_finder](KEYS, a, 8, q, None)
        left_out = np.linalg.norm(a - projector(basis) @ a, axis=(-2, -1))
        errors.append(left_out.mean() / np.linalg.norm(s[8:]))
    assert errors[0] > 1.15 > errors[1] > 1.02 > errors[2] >= 1 - 1e-5


def test_power_iterations_keep_small_directions():
    # (A A^T)^4 A without re-conditioning would lose what is below 1e-7 of the largest.
    a = spectrum(24, 16, np.logspace(0, -3, 6)).astype(np.float32)
    q = range_finder(jax.random.key(0), a, 6, 4)
    u = np.linalg.svd(a.astype(np.float64))[0][:, :6]
    np.testing.assert_allclose(projector(q), projector(u), rtol=0, atol=5e-3)


@pytest.mark.parametrize("scale", [1.0, 1e35, 1e-30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_randomized_svd_matches_the_svd(shape, scale):
    a = (scale * spectrum(*shape, SPECTRA["fast"])).astype(np.float32)
    wide = a.astype(np.float64)
    exact = np.linalg.svd(wide, full_matrices=False)
    best = (exact[0][:, :4] * exact[1][:4]) @ exact[2][:4]
    u, s, vt = randomized_svd(jax.random.key(0), a, 4, 8, 2)
    assert u.shape == (shape[0], 4) and s.shape == (4,) and vt.shape == (4, shape[1])
    check_orthonormal(u)
    check_orthonormal(vt.T)
    np.testing.assert_allclose(s, exact[1][:4], rtol=1e-4)
    u, s, vt = (np.asarray(x, np.float64) for x in (u, s, vt))
    np.testing.assert_allclose(u * s @ vt, best, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("rank", [1, 3, 99])
def test_randomized_svd_recovers_low_rank_exactly(rank):
    a = spectrum(12, 9, [3.0, 2.0, 1.0][: min(rank, 3)]).astype(np.float32)
    u, s, vt = randomized_svd(jax.random.key(1), a, rank, 0, 0)
    assert s.shape == (min(rank, 9),)
    np.testing.assert_allclose(u * s @ vt, a, rtol=0, atol=1e-5)


def test_randomized_svd_of_zero_is_zero():
    u, s, vt = randomized_svd(jax.random.key(0), jnp.zeros((6, 5)), 3)
    np.testing.assert_array_equal(s, 0.0)
    check_orthonormal(u)
    check_orthonormal(vt.T)


# Halko et al. 2011, Theorem 10.5 (Lemma A.1 of MLorc). A flat tail under a large head
# is where the bound is nearly attained: there a sketch one column short would break it.
@pytest.mark.parametrize("rank, oversample", [(2, 2), (4, 3), (8, 5)])
def test_expected_error_obeys_halko_bound(rank, oversample):
    keys = jax.random.split(jax.random.key(0), 2000)

    @jax.jit
    def squared_errors(a):
        def of_one(key):
            q = linalg.range_finder(key, a, rank + oversample)
            u, s, vt = linalg.randomized_svd(key, a, rank, oversample, 0)
            return jnp.sum((a - q @ (q.T @ a)) ** 2), jnp.sum((a - u * s @ vt) ** 2)

        # One by one: batches of thousands have been seen to hang XLA's CPU threads.
        return jax.lax.map(of_one, keys)

    for below in (np.ones(40 - rank), 0.9 ** np.arange(40 - rank)):
        values = np.r_[np.full(rank, 50.0), below]
        errors = squared_errors(spectrum(48, 40, values).astype(np.float32))
        bound = (1 + rank / (oversample - 1)) * np.sum(below**2)
        # Before the truncation to `rank` and, by the same proof, after it. The bound is
        # on the squared error, hence by Jensen on the error as the lemma has it.
        for mean in (errors[0].mean(), errors[1].mean()):
            assert 0.5 * bound <= mean <= bound


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_captured_energy_is_that_of_the_svd(shape, name):
    a = spectrum(*shape, SPECTRA[name]).astype(np.float32)
    s = np.linalg.svd(a.astype(np.float64), compute_uv=False)
    svd = over_keys[randomized_svd](KEYS, a, 4, 8, 2)[0]
    iterated = over_keys[subspace_iteration](KEYS, a, 4, 2, 8)
    for basis in (svd, iterated):
        check_orthonormal(basis)
        energy = np.sum((np.swapaxes(basis, -1, -2) @ a) ** 2, axis=(-2, -1))
        share = energy / np.sum(s[:4] ** 2)
        assert share.mean() >= 0.99 and share.min() >= 0.97
        assert share.max() <= 1 + 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_subspace_iteration_orders_singular_vectors(shape):
    a = spectrum(*shape, SPECTRA["fast"]).astype(np.float32)
    u = np.linalg.svd(a.astype(np.float64))[0]
    q = subspace_iteration(jax.random.key(0), a, 4)
    assert q.shape == (shape[0], 4)
    cosines = np.abs(np.sum(np.asarray(q) * u[:, :4], axis=0))
    np.testing.assert_allclose(cosines, 1.0, atol=1e-4)
    assert subspace_iteration(jax.random.key(0), a, 99).shape[-1] == 32


def test_subspace_iteration_starts_from_an_older_basis():
    a = spectrum(40, 30, SPECTRA["slow"][:30]).astype(np.float32)
    u = np.linalg.svd(a.astype(np.float64))[0][:, :4]
    near = jnp.asarray(np.linalg.qr(u + 0.02 * normal(40, 4, seed=5))[0], jnp.float32)

    def error(start):
        find = jax.vmap(lambda k: subspace_iteration(k, a, 4, 1, 0, start))
        q = find(KEYS)
        return np.linalg.norm(projector(q) - projector(u), axis=(-2, -1)).mean()

    assert error(near) < 0.1 < 0.5 < error(None)


FUNCTIONS = {
    "orthonormalize": lambda key, a: linalg.orthonormalize(a),
    "range_basis": lambda key, a: linalg.range_basis(a),
    "gram_eigh": lambda key, a: linalg.gram_eigh(a)[0],
    "range_finder": lambda key, a: linalg.range_finder(key, a, 3),
    "randomized_svd": lambda key, a: linalg.randomized_svd(key, a, 3)[0],
    "subspace_iteration": lambda key, a: linalg.subspace_iteration(key, a, 3),
}
RANDOM = ("range_finder", "randomized_svd", "subspace_iteration")


@pytest.fixture(scope="module")
def stack():
    """Two matrices of rank 3 with well separated values: unique singular vectors."""
    pair = [spectrum(12, 5, [4.0, 2.0, 1.0], seed) for seed in (0, 1)]
    return jnp.asarray(np.stack(pair), jnp.float32)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transformations_change_nothing(name, stack):
    function = FUNCTIONS[name]
    keys = jax.random.split(jax.random.key(0), 2)
    eager = jnp.stack([function(k, a) for k, a in zip(keys, stack, strict=True)])
    assert jax.device_count() == 2
    for transform in (lambda f: jax.vmap(jax.jit(f)), jax.pmap):
        result = transform(function)(keys, stack)
        if name in ("orthonormalize", "gram_eigh"):  # what lies beyond rank 3 is noise
            result, eager = result[..., :3], eager[..., :3]
        # The condition of a sketch without columns to spare costs digits.
        atol = 2e-4 if name == "range_finder" else 1e-5
        np.testing.assert_allclose(result, eager, rtol=0, atol=atol)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batched_equals_loop(name, stack):
    function = jax.jit(FUNCTIONS[name])
    batch = jnp.stack([stack, 3.0 * stack, stack[::-1]])  # (3, 2, 12, 5)
    result = function(jax.random.key(0), batch)
    assert result.shape[:3] == (3, 2, 12)
    loop = np.stack([[function(jax.random.key(0), a) for a in two] for two in batch])
    if name in RANDOM:  # another sketch, whose condition costs digits; one subspace
        result, loop = 0.1 * projector(result), 0.1 * projector(loop)
    elif name != "range_basis":
        result, loop = result[..., :3], loop[..., :3]
    np.testing.assert_allclose(result, loop, rtol=0, atol=1e-5)


@pytest.mark.parametrize("function", [eigh, svd, inverse_root])
def test_a_stack_is_factored_one_by_one_on_cpu(function):
    """As many stacks at a time as there are threads would wait for ever in jaxlib."""
    x = jnp.eye(5) + 0 * jnp.ones((3, 5, 5))
    compiled = jax.jit(function).lower(x).compile().as_text()
    calls = [line for line in compiled.splitlines() if "lapack_" in line]
    assert calls and not any("[3,5,5]" in line for line in calls)
    one = jax.tree.leaves(function(x[0]))
    stack = jax.tree.leaves(function(x[None]))
    for a, b in zip(one, stack, strict=True):
        np.testing.assert_allclose(b[0, 1], a, atol=1e-6)


@pytest.mark.parametrize("k", [1, 5, 16, 17, 24])
def test_eigenvalues_descend(k):
    x = normal(2, 3, k, k)
    x = (x + np.swapaxes(x, -1, -2)).astype(np.float32)
    values, vectors = map(np.asarray, jax.jit(eigh)(x))
    assert values.shape == (2, 3, k) and vectors.shape == (2, 3, k, k)
    exact = np.linalg.eigvalsh(x.astype(np.float64))[..., ::-1]
    np.testing.assert_allclose(values, exact, rtol=0, atol=1e-5 * k)
    check_orthonormal(vectors)
    np.testing.assert_allclose(x @ vectors, vectors * values[..., None, :], atol=1e-4)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_small_factorizations_call_no_library_on_accelerators(platform):
    def program(*functions):
        traced = jax.jit(lambda x: [f(x) for f in functions]).trace(jnp.eye(16)[None])
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "custom_call" not in program(eigh, inverse_root, whitening, lifted)


@pytest.mark.parametrize("function", [eigh, inverse_root])
def test_accelerators_factor_a_stack_of_wider_ones_at_once(function):
    x = jnp.zeros((3, 24, 24))
    lowered = jax.jit(function).trace(x).lower(lowering_platforms=("tpu",))
    assert "stablehlo.while" not in lowered.as_text()


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_a_matrix_is_multiplied_as_it_lies(turned, batch):
    a = normal(*batch, 7, 5).astype(np.float32)
    w, q = (normal(*batch, n, 3, seed=n).astype(np.float32) for n in (5, 7))
    w = np.swapaxes(w, -1, -2)
    x = Lying(jnp.asarray(np.swapaxes(a, -1, -2) if turned else a), turned)
    for transform in (lambda f: f, jax.jit):
        y, z = transform(x.sketch)(w), transform(x.project)(q)
        np.testing.assert_allclose(y, a @ np.swapaxes(w, -1, -2), rtol=0, atol=1e-5)
        np.testing.assert_allclose(z, np.swapaxes(q, -1, -2) @ a, rtol=0, atol=1e-5)
    assert x.of(x.array).turned == turned
    np.testing.assert_allclose(x.of(2 * x.array).sketch(w), 2 * y, atol=1e-5)


@pytest.mark.parametrize("turned", [False, True])
def test_no_large_matrix_is_transposed(turned):
    x = jnp.ones((64, 48))
    w, q = (jnp.ones((n, 3)) for n in ((64, 48) if turned else (48, 64)))
    program = jax.jit(
        lambda x, w, q: (Lying(x, turned).sketch(w.T), Lying(x, turned).project(q))
    ).lower(x, w, q)
    lines = [y for y in program.as_text().splitlines() if "transpose" in y]
    assert not any("48x64" in y or "64x48" in y for y in lines)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_a_stack_is_factored_on_every_platform(platform):
    stack = jnp.stack([jnp.eye(24)] * 3)
    for function in (lapack.eigh, lapack.svd):
        traced = jax.jit(lambda a, function=function: function(a)).trace(stack)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        # One by one on a CPU, whose threads would wait for one another.
        assert ("stablehlo.while" in text or platform != "cpu") and "24x24" in text


def test_sums_from_the_end_are_of_each_row():
    x = np.array([[3.0, 1e-9, 2e-9], [1.0, 2.0, 4.0]])
    found = sums_from_end(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, np.cumsum(x[:, ::-1], 1)[:, ::-1], rtol=1e-6)
