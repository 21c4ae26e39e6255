"""The subspaces: orthonormal for any gradient, and those that NumPy's SVD finds."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.extend.core import jaxprs_in_params

import lowrank_optax as lro
from lowrank_optax._src.linalg import random, randomized

KEY = jax.random.key(0)
STEP = jnp.zeros([], jnp.int32)
METHODS = ["svd", "gram_eigh", "rsvd", "subspace_iteration", "warm"]
EXACT = ["svd", "gram_eigh"]


def select(method, grad, old, key=KEY):
    """The basis for a gradient, on its own scale as the engine hands it over."""
    grad = np.asarray(grad, np.float32)
    return np.asarray(_select(lro.TopSingular(method), key, grad, jnp.asarray(old)))


_select = jax.jit(
    lambda subspace, key, grad, old: subspace.select(key, grad, old, STEP),
    static_argnums=0,
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def spectrum(m, n, values, seed=0):
    u = np.linalg.qr(normal(m, len(values), seed=seed))[0]
    v = np.linalg.qr(normal(n, len(values), seed=seed + 1))[0]
    return (u * values) @ v.T


def no_basis(*shape):
    return np.zeros(shape, np.float32)


def check_law(basis):
    """Finite, and columns orthonormal to 1e-5 or exactly zero."""
    assert np.all(np.isfinite(basis))
    basis = basis.astype(np.float64)
    gram = np.swapaxes(basis, -1, -2) @ basis
    unit = np.any(basis != 0, axis=-2)
    eye = np.eye(gram.shape[-1]) * unit[..., None]
    np.testing.assert_allclose(gram, eye, rtol=0, atol=1e-5)


def projector(basis):
    basis = np.asarray(basis, np.float64)
    return basis @ np.swapaxes(basis, -1, -2)


@pytest.mark.parametrize(
    ("method", "starting", "iters"),
    [("rsvd", 1, 1), ("subspace_iteration", 1, 2), ("warm", 2, 1)],
)
def test_each_method_has_its_number_of_power_iterations(method, starting, iters):
    """By the products with the gradient that the traced program has."""
    grad, old = jnp.ones((40, 60)), jnp.zeros((40, 4))
    program = _select.trace(lro.TopSingular(method), KEY, grad, old).jaxpr

    def products(jaxpr):
        for eqn in jaxpr.eqns:
            large = any(v.aval.shape in ((40, 60), (60, 40)) for v in eqn.invars)
            yield eqn.primitive.name == "dot_general" and large
            for inner in jaxprs_in_params(eqn.params):
                yield from products(inner)

    # A sketch, of an old basis first the product with it; two an iteration; and the
    # projection of which the vectors are made.
    assert sum(products(program.jaxpr)) == starting + 2 * iters + 1


@pytest.mark.parametrize("scale", [2.0**-96, 1.0, 2.0**96], ids=["tiny", "1", "huge"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (2, 3, 9, 7)])
@pytest.mark.parametrize("iters", [1, 2])
def test_what_is_projected_on_the_way_is_the_projection(iters, shape, scale):
    """Of the vectors that `TopSingular` and `EnergyRank` take."""
    grad = scale * jnp.asarray(normal(*shape, seed=3), jnp.float32)
    keys = jax.random.split(KEY, shape[:-2]) if len(shape) > 2 else KEY
    find = jax.jit(lambda *x: randomized.leading_singular(*x, 5, iters))
    basis, coeff = (np.asarray(x, np.float64) for x in find(keys, grad))
    selected = lro.linalg.subspace_iteration(keys, grad, 5, iters)
    np.testing.assert_allclose(basis, selected, rtol=0, atol=1e-5)
    expected = np.swapaxes(basis, -1, -2) @ np.asarray(grad, np.float64)
    np.testing.assert_allclose(coeff / scale, expected / scale, rtol=0, atol=2e-5)


CHOOSING = [lro.TopSingular(method) for method in METHODS] + [
    lro.EnergyRank(2, 0.3),
    lro.ImportanceSampled(),
    lro.ImportanceSampled(pool=8),
    lro.Hybrid(2),
    lro.UniformSampled(),
    lro.CrossHead(4),
]


@pytest.mark.parametrize("exponent", [-100, -60, 60, 100])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (2, 9, 8)], ids=str)
@pytest.mark.parametrize("subspace", CHOOSING, ids=str)
def test_the_scale_of_a_gradient_changes_no_basis(subspace, shape, exponent):
    grad = jnp.asarray(normal(*shape, seed=3), jnp.float32)
    old = jnp.asarray(no_basis(*shape[:-1], 4))
    keys = jax.random.split(KEY, shape[:-2]) if len(shape) > 2 else KEY
    expected = _select(subspace, keys, grad, old)
    basis = _select(subspace, keys, 2.0**exponent * grad, old)
    check_law(np.asarray(basis))
    np.testing.assert_allclose(basis, expected, rtol=0, atol=1e-4)


GRADS = {
    "gaussian": normal(12, 20),
    "zero": np.zeros((12, 20)),
    "ones": np.ones((12, 20)),
    "rank 1": np.outer(normal(12), normal(20)),
    "rank 2": normal(12, 2) @ normal(2, 20),
    "equal values": np.eye(12, 20),
    "graded": normal(12, 20) * np.logspace(0, -12, 12)[:, None],
    "one entry": np.eye(12, 20) * (np.arange(20) == 3),
    "outlier": normal(12, 20) + 1e6 * np.eye(12, 20, 5) * (np.arange(20) == 7),
    "tiny": 1e-35 * normal(12, 20),
    "huge": 1e37 * normal(12, 20),
}


def test_top_singular_is_a_subspace():
    assert isinstance(lro.TopSingular(), lro.Subspace)
    assert lro.TopSingular() == lro.TopSingular("rsvd")
    with pytest.raises(ValueError, match="'qr'.*svd, gram_eigh, rsvd"):
        lro.TopSingular("qr")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", GRADS)
def test_bases_are_orthonormal_for_any_gradient(method, name):
    old = np.linalg.qr(normal(12, 4, seed=3))[0].astype(np.float32)
    for start in (no_basis(12, 4), old):
        basis = select(method, GRADS[name], start)
        assert basis.shape == (12, 4) and basis.dtype == np.float32
        check_law(basis)


@pytest.mark.parametrize("method", METHODS)
@hypothesis.settings(max_examples=30)
@hypothesis.given(
    st.integers(0, 10**6), st.integers(0, 12), st.floats(0, 30), st.booleans()
)
def test_bases_are_orthonormal_for_random_gradients(method, seed, rank, grade, started):
    grad = normal(12, rank, seed=seed) @ normal(rank, 20, seed=seed + 1)
    grad = grad * 10.0 ** -np.linspace(0, grade, 20)
    old = np.linalg.qr(normal(12, 4, seed=seed))[0] * started
    check_law(select(method, grad, old.astype(np.float32)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (5, 5)], ids=str)
def test_any_shape_at_full_rank(method, shape):
    rank = min(shape)
    for grad in (normal(*shape), np.zeros(shape), np.ones(shape)):
        check_law(select(method, grad, no_basis(shape[0], rank)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)], ids=str)
def test_bases_span_the_leading_singular_vectors(method, shape):
    grad = spectrum(*shape, 0.6 ** np.arange(24))
    basis = select(method, grad, no_basis(shape[0], 5))
    exact = reference.top_singular(grad, 5)
    atol = 1e-4 if method in EXACT else 5e-3  # sketches see the sixth value, too
    np.testing.assert_allclose(projector(basis), projector(exact), rtol=0, atol=atol)
    cosines = np.abs(np.sum(basis * exact, axis=0))
    np.testing.assert_allclose(cosines, 1, atol=1e-3)  # in descending order


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("decay", [0.7, 0.9])
def test_bases_capture_the_energy(method, decay):
    values = decay ** np.arange(24)
    grad = spectrum(24, 40, values).astype(np.float32)
    shares = []
    for i in range(10):
        basis = select(method, grad, no_basis(24, 5), jax.random.key(i))
        shares.append(np.sum((basis.T @ grad) ** 2) / np.sum(values[:5] ** 2))
    assert np.mean(shares) >= (0.9999 if method in EXACT else 0.98)
    assert np.max(shares) <= 1 + 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_stacked_gradients_are_treated_one_by_one(method):
    grads = np.stack([spectrum(8, 12, 0.4 ** np.arange(8), seed) for seed in range(6)])
    grads = grads.reshape(2, 3, 8, 12)
    bases = select(method, grads, no_basis(2, 3, 8, 3))
    assert bases.shape == (2, 3, 8, 3)
    check_law(bases)
    atol = 1e-4 if method in EXACT else 1e-2
    np.testing.assert_allclose(
        projector(bases), projector(reference.top_singular(grads, 3)), atol=atol
    )


@pytest.mark.parametrize("method", METHODS)
def test_one_unusable_matrix_does_not_spoil_its_neighbours(method):
    good = spectrum(8, 12, 0.4 ** np.arange(8))
    bases = select(method, np.stack([good, 0 * good]), no_basis(2, 8, 3))
    check_law(bases)
    exact = reference.top_singular(good, 3)
    np.testing.assert_allclose(projector(bases[0]), projector(exact), atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_only_sketches_depend_on_the_key(method):
    grad = spectrum(24, 40, 0.95 ** np.arange(24))
    one, two, again = (
        select(method, grad, no_basis(24, 5), jax.random.key(i)) for i in (0, 1, 0)
    )
    np.testing.assert_array_equal(one, again)
    assert np.array_equal(one, two) == (method in EXACT)


def test_warm_bases_improve_with_every_refresh():
    grad = spectrum(40, 48, 0.97 ** np.arange(40))
    best = np.sum((0.97 ** np.arange(6)) ** 2)

    def captured(basis):
        return np.sum((basis.T @ grad) ** 2) / best

    cold = [select("warm", grad, no_basis(40, 6), jax.random.key(i)) for i in range(8)]
    basis, shares = no_basis(40, 6), []
    for i in range(8):
        basis = select("warm", grad, basis, jax.random.key(i))
        shares.append(captured(basis))
    assert shares[-1] > 0.99 > np.mean([captured(b) for b in cold])


def test_warm_starts_are_per_matrix():
    """An expert that has had no gradient yet starts as if it stood alone."""
    grad = spectrum(40, 48, 0.9 ** np.arange(40))
    energy = np.sum((0.9 ** np.arange(16)) ** 2)
    old = np.stack([no_basis(40, 16), select("svd", grad, no_basis(40, 16))])
    bases = select("warm", np.stack([grad, grad]), old)
    check_law(bases)
    shares = np.sum((np.swapaxes(bases, -1, -2) @ grad) ** 2, axis=(-2, -1)) / energy
    assert np.all(shares > 0.95)


def test_a_warm_start_draws_its_columns_by_different_keys(monkeypatch):
    keys, normal = [], random.normal

    def noted(key, *args):
        keys.append(jax.random.key_data(key).tolist())
        return normal(key, *args)

    monkeypatch.setattr(random, "normal", noted)
    subspace = lro.TopSingular("warm")
    old, grad = jnp.zeros((16, 8)), jnp.eye(16)
    with jax.disable_jit():
        subspace.select(jax.random.key(0), grad, old, jnp.array(0))
    assert len(keys) == 2 and keys[0] != keys[1]
