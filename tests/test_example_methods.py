"""The methods of the examples: two rates for each, and which leaf has which."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from examples.common.methods import METHODS, check_rates
from examples.roberta.tasks import GLUE

SHAPES = {
    "embed": {"embedding": (32, 8)},
    "layers": {"norm": {"scale": (3, 8)}, "q_proj": {"kernel": (3, 8, 12)}},
    "lone": {"o_proj": {"kernel": (12, 8)}},
    "head": {"kernel": (8, 32)},
}
KNOWN = {"heads": (2, 2), "steps": 10}


def names(state):
    """The leaves of which a state holds something."""
    paths = [jax.tree_util.keystr(k) for k, _ in jax.tree.leaves_with_path(state)]
    leaves = ("embed", "norm", "q_proj", "o_proj", "head")
    return {leaf for leaf in leaves if any(f"['{leaf}']" in path for path in paths)}


@pytest.mark.parametrize("name", [k for k, m in METHODS.items() if m.linear is None])
def test_kernels_have_the_one_rate_and_all_else_the_other(name):
    own = METHODS[name]
    tx = own.build(0.1, 2, 5, 0.0, dense=0.2, **KNOWN)
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    state = jax.eval_shape(tx.init, params)
    groups = optax.tree.get(state, "inner_states")
    assert names(groups["matrices"]) == {"q_proj", "o_proj"}
    assert names(groups["dense"]) == {"embed", "norm", "head"}
    # Without another rate, the state is that of the optimizer alone.
    plain = jax.eval_shape(own.build(0.1, 2, 5, 0.0, **KNOWN).init, params)
    assert not optax.tree.get_all_with_path(plain, "inner_states")


def test_rates_are_refused_by_name():
    check_rates(None, None)
    check_rates(1e-3, 1e-2)
    with pytest.raises(ValueError, match="^learning_rate must be above 0, not 0"):
        check_rates(0.0, 1.0)
    with pytest.raises(ValueError, match="dense_learning_rate must be above 0, not -1"):
        check_rates(None, -1.0)


# What the papers take a method apart by


def begun(name, shape, rank=4, every=3):
    """A method's transformation and parameters of one query kernel."""
    tx = METHODS[name].build(0.1, rank, every, 0.0, heads=(2, 2), steps=10)
    return tx, {"layers": {"0": {"q_proj": {"kernel": jnp.zeros(shape)}}}}


def after(name, *grads, every=3):
    """The states of a method along these gradients."""
    tx, params = begun(name, grads[0].shape, every=every)
    update, states = jax.jit(tx.update), [tx.init(params)]
    for grad in grads:
        tree = jax.tree.map(lambda _, grad=grad: jnp.asarray(grad), params)
        states.append(update(tree, states[-1], params)[1])
    return states[1:]


def shapes_of(name, shape, field, rank=4):
    """The arrays of a field of a method's state."""
    tx, params = begun(name, shape, rank)
    found = optax.tree.get_all_with_path(jax.eval_shape(tx.init, params), field)
    return jax.tree.leaves([x for _, x in found])


def the(state, field):
    """The one leaf of a field of a state."""
    found = optax.tree.get_all_with_path(state, field)
    (leaf,) = (leaf for _, x in found for leaf in jax.tree.leaves(x))
    return np.asarray(leaf)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name, moment, other", [
    ("mlorc_m", "mu", "nu"), ("mlorc_v", "nu", "mu")
])  # fmt: skip
def test_mlorc_compresses_one_moment(name, moment, other):
    (full,) = shapes_of(name, (24, 40), other)
    assert full.shape == (24, 40)
    factors = shapes_of(name, (24, 40), moment)
    assert sorted(x.shape for x in factors) == [(4, 40), (24, 4)]


@pytest.mark.parametrize("name", ["i3s_adafactor", "i3s_adam_mini", "i3s_adamw_8bit"])
def test_i3s_draws_among_all_singular_vectors(name):
    # All of one size, so that the leading ones are no likelier than the others.
    u, _ = np.linalg.qr(normal(12, 12))
    grad = u * np.linspace(1.01, 1, 12, dtype=np.float32)[:, None].T @ np.eye(12, 20)
    basis = the(after(name, grad)[-1], "basis")
    shares = np.sum((u.T @ basis) ** 2, axis=1)
    np.testing.assert_allclose(np.sort(shares), [0] * 8 + [1] * 4, atol=1e-3)
    assert shares[:4].sum() < 3.9
    plain = name.replace("i3s", "galore")
    basis = the(after(plain, grad)[-1], "basis")
    np.testing.assert_allclose(np.sum((u[:, :4].T @ basis) ** 2), 4, atol=1e-3)


def test_other_subspaces_take_what_their_names_say():
    # Singular values far apart, the first two far above all others.
    u, _ = np.linalg.qr(normal(12, 12))
    grad = u * np.array([90, 80, *range(10, 0, -1)], np.float32) @ np.eye(12, 20)
    shares = {
        name: np.sum((u.T @ the(after(name, grad)[-1], "basis")) ** 2, axis=1)
        for name in ("hybrid_adamw", "uniform_adamw", "random_adamw")
    }
    np.testing.assert_allclose(shares["hybrid_adamw"][:2], 1, atol=1e-4)
    for name in ("hybrid_adamw", "uniform_adamw"):  # of whole singular vectors
        found = np.sort(shares[name])
        np.testing.assert_allclose(found, [0] * 8 + [1] * 4, atol=1e-3)
        assert np.any(shares[name][4:] > 0.5)
    bases = [
        the(after("random_adamw", x)[-1], "basis")
        for x in (grad, normal(12, 20), np.zeros((12, 20), np.float32))
    ]
    # Drawn without a look at the gradient; only of none is none drawn.
    np.testing.assert_array_equal(bases[0], bases[1])
    assert not np.any(bases[2])


def test_galore_plus_in_bytes_keeps_the_residual_that_its_name_says():
    def of(name, field):
        return shapes_of(name, (64, 96), field, rank=48)

    kept = {"8bit_0.0": 0, "8bit_0.6": 37, "adamw_8bit": 74, "8bit_1.8": 111}
    for name, count in kept.items():
        name = f"galore_plus_{name}"
        assert sum(x.size for x in of(name, "square")) == count
        assert {x.dtype.name for x in of(name, "mu")} == {"uint8", "float32"}


def test_adarankgrad_with_one_of_both_fixed():
    # All of rank one; those from the 21st on have nothing of what the basis is of.
    a, b = normal(20, 1), normal(20, 1, seed=1)
    b -= a * (a.T @ b) / (a.T @ a)
    grads = [(a if i < 20 else b) @ normal(1, 12, seed=i) for i in range(32)]

    def bases(name):
        return [the(x, "basis") for x in after(name, *grads, every=30)]

    def turns(name):
        return next(i for i, x in enumerate(bases(name)) if np.abs(b.T @ x).max() > 0.1)

    assert 20 < turns("adarankgrad_adamw") < turns("adarankgrad_fixed_interval") == 30
    ranks = [np.any(x, axis=0).sum() for x in bases("adarankgrad_fixed_rank")]
    assert ranks == [4] * 32


def test_lion_on_adapters_has_one_moment_and_moves_nothing_else():
    tx = METHODS["lora_lion"].build(0.1, 2, 5, 0.0, heads=(2, 2), steps=10)
    shapes = {"lora": {"lora_a": (8, 2)}, "frozen": (8, 8), "norm": (8,)}
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
    updates, state = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["lora"]["lora_a"], -0.1)
    assert not np.any(updates["frozen"]) and np.all(updates["norm"])
    assert lro.state_bytes(tx, params) == 4 * (16 + 8) + 4


def test_every_method_has_a_rate_for_glue_and_lion_a_small_one():
    preset = GLUE["mrpc"].preset
    assert all(preset.learning_rate(name) > 0 for name in METHODS)
    for lion, like in (("lora_lion", "lora"), ("mlorc_lion", "mlorc_adamw")):
        ratio = preset.learning_rate(lion) / preset.learning_rate(like)
        assert ratio == pytest.approx(1 / 7)


def test_rates_are_those_of_the_comparison():
    page = (Path(__file__).parents[1] / "benchmarks/records/comparison.md").read_text()
    table = page.split("## Equal rank")[1].split("## ")[0]
    rows = [
        [cell.strip() for cell in line.split("|")[1:5]]
        for line in table.splitlines()
        if line.startswith("| ") and "---" not in line
    ][1:]
    assert len(rows) == 19
    for name, _, dense, rate in rows:
        method = METHODS[name]
        found = method.dense_learning_rate, method.learning_rate
        assert found == (float(dense), float(rate)), name
