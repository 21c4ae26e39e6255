"""Devices that exchange projected gradients step as those that exchange all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from page import run_sections
from running import assert_close, random_grads, random_like

import lowrank_optax as lro
from benchmarks.accelerators import hlo, meshes
from examples.llama.config import LlamaConfig
from examples.llama.model import Llama
from examples.llama.pretrain import init_and_loss

SHAPES = {"tall": (48, 16), "wide": (16, 40), "stack": (3, 16, 24), "bias": (16,)}
MATRICES = lro.MatrixAxes()
RANK, EVERY, STEPS = 4, 3, 5
MOMENTUM = optax.scale_by_adam()


_PARTS = {"rank": RANK, "update_every": EVERY, "matrices": MATRICES}


def project(**parts):
    return lro.galore_project(MOMENTUM, **_PARTS | parts)


OPTIMIZERS = {
    "galore": project(),
    "exact": project(subspace=lro.TopSingular("gram_eigh")),
    "rotated": lro.project_gradients(
        MOMENTUM,
        rank=RANK,
        refresh=lro.Staggered(EVERY),
        transfer=lro.Rotate(),
        matrices=MATRICES,
    ),
    "drawn": lro.flora_project(optax.trace(0.9), rank=RANK, matrices=MATRICES),
    "by drift": lro.q_galore_project(MOMENTUM, **_PARTS),
    "in bytes": lro.galore_adamw_8bit(0.1, **_PARTS),
    "chain": lro.galore_adamw(0.1, weight_decay=0.1, **_PARTS),
    "accumulated": lro.accumulate_gradients(project(), 2),
}


def mesh_of():
    return jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))


def local(tx, check_vma=True):
    """Its update where each device has one of two gradients."""

    def update(grads, state, params):
        return tx.update(jax.tree.map(lambda g: g[0], grads), state, params)

    specs = dict(in_specs=(P("x"), P(), P()), out_specs=P())
    return jax.shard_map(update, mesh=mesh_of(), check_vma=check_vma, **specs)


def averaged(tx):
    """The same with whole gradients exchanged before it."""

    def update(grads, state, params):
        return tx.update(jax.lax.pmean(grads, "x"), state, params)

    return tx._replace(update=update)


def gradients(params):
    ones, others = (random_grads(params, STEPS, seed) for seed in (1, 50))
    pairs = zip(ones, others, strict=True)
    return [jax.tree.map(lambda *g: jnp.stack(g), *pair) for pair in pairs]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_steps_are_those_of_the_mean_gradient(name):
    tx, params = OPTIMIZERS[name], random_like(SHAPES, 0)
    ours = jax.jit(local(lro.average_gradients(tx, "x")))
    theirs = jax.jit(local(averaged(tx)))
    state = other = lro.average_gradients(tx, "x").init(params)
    for grads in gradients(params):
        updates, state = ours(grads, state, params)
        expected, other = theirs(grads, other, params)
        assert_close(updates, expected, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))


@pytest.mark.parametrize("way", ["pmap", "vmap", "unchecked"])
def test_any_axis_with_a_name_will_do(way):
    tx, params = project(), random_like(SHAPES, 0)
    mean = lro.average_gradients(tx, "x")
    state = tx.init(params)
    if way == "unchecked":
        update = jax.jit(local(mean, check_vma=False))
    else:
        over = jax.pmap if way == "pmap" else jax.vmap
        over = functools.partial(over, axis_name="x", in_axes=(0, None, None))
        both = over(lambda g, s, p: mean.update(g, s, p))

        def update(grads, state, params):
            result = both(grads, state, params)
            for x in jax.tree.leaves(result):
                np.testing.assert_array_equal(x[0], x[1])
            return jax.tree.map(lambda x: x[0], result)

    plain = jax.jit(tx.update)
    for grads in gradients(params)[: EVERY + 1]:
        whole = jax.tree.map(lambda g: g.mean(0), grads)
        expected, want = plain(whole, state, params)
        updates, state = update(grads, state, params)
        assert_close(updates, expected, rtol=1e-4, atol=1e-5)
        assert_close(state.step, want.step)


@pytest.mark.parametrize("measure", ["share", "norm"])
def test_a_rule_that_looks_at_norms_is_shown_their_mean(measure):
    """Equal gradients have equal norms: ranks and refreshes are those of one device."""
    tx = lro.adaptive_rank(
        MOMENTUM, max_rank=RANK, max_interval=EVERY, measure=measure, matrices=MATRICES
    )
    params = random_like(SHAPES, 0)
    ours = jax.jit(local(lro.average_gradients(tx, "x")))
    alone, state = jax.jit(tx.update), tx.init(params)
    other = state
    for g in random_grads(params, STEPS):
        twice = jax.tree.map(lambda x: jnp.stack([x, x]), g)
        updates, state = ours(twice, state, params)
        expected, other = alone(g, other, params)
        assert_close(updates, expected, rtol=1e-4, atol=1e-5)
    assert_close(state.refresh, other.refresh, rtol=1e-4, atol=1e-5)


def exchanged(update, tx, params, refresh):
    """Bytes of a step, with all bases renewed or none."""
    grads = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    lowered = jax.jit(update).lower(grads, tx.init(params), params)
    return meshes.moves(hlo.parse(lowered.compile().as_text()), refresh).bytes


def test_between_refreshes_coefficients_alone_are_exchanged():
    params, tx = random_like({"w": (64, 96), "bias": (96,)}, 0), project()
    whole, thin = 4 * (64 * 96 + 96), 4 * (RANK * 96 + 96)
    for refresh in (False, True):
        assert exchanged(local(averaged(tx)), tx, params, refresh) == whole
    ours = local(lro.average_gradients(tx, "x"))
    assert exchanged(ours, tx, params, False) == thin
    assert exchanged(ours, tx, params, True) == thin + 4 * 64 * 96


def test_a_gradient_that_is_waited_for_is_exchanged_as_one_number():
    # Of leaves that are renewed together; they may wait at every step.
    params, tx = random_like(dict.fromkeys("abc", (64, 96)), 0), project()
    ours = local(lro.average_gradients(tx, "x"))
    thin = exchanged(ours, tx, params, False)
    assert exchanged(ours, tx, params, True) == thin + 3 * 4 * (64 * 96 + 1)


@pytest.mark.long
def test_a_llama_trains_with_the_losses_of_one_device():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    init, loss = init_and_loss(lambda: Llama(config, rngs=nnx.Rngs(0)))
    tx = lro.galore_adamw(0.02, rank=RANK, update_every=EVERY, scale=1.0)
    rows = jax.random.randint(jax.random.key(1), (4, 17), 0, 64)
    title = "Data parallelism in the subspace"
    page = run_sections("devices.md", "State lies as the weights do", title)
    mean = lro.average_gradients(tx, "data")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    step = page["data_parallel"](loss, mean, mesh)

    @jax.jit
    def alone(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for take, own in ((step, mean), (alone, tx)):
        params = init()
        state, found = own.init(params), []
        for _ in range(STEPS):
            params, state, value = take(params, state, rows)
            found.append(float(value))
        losses.append(found)
    assert losses[1][-1] < losses[1][0]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_gradients_that_differ_over_other_axes_too_are_refused():
    mesh = jax.make_mesh((2, 1), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    tx, params = project(), {"w": jnp.ones((16, 24))}

    specs = dict(in_specs=(P(("x", "y")), P(), P()), out_specs=P())

    def trace(axes):
        update = lro.average_gradients(tx, axes).update
        step = jax.shard_map(lambda *x: update(*x)[0], mesh=mesh, **specs)
        jax.eval_shape(step, {"w": jnp.ones((32, 24))}, tx.init(params), params)

    for axes, over in (("x", "'y'"), ("y", "'x'"), ((), r"\('x', 'y'\)")):
        with pytest.raises(ValueError, match=f"'w'.*over the devices of {over}"):
            trace(axes)
    trace(("x", "y"))


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (lro.mlorc_adamw(0.1), "an optimizer of the state CompressState, .* subspace"),
        (lro.fira_adamw(0.1, rank=2), "FiraResidual: .*projected gradient alone"),
        (
            optax.masked(project(), {"tall": True, "wide": False}),
            "the parameter 'wide' outside of it: .* around the parts",
        ),
        (optax.chain(MOMENTUM, project()), "moments of '.*' that come before"),
    ],
)
def test_refused_with_the_reason_and_a_remedy(tx, message):
    params = random_like({"tall": (7, 4), "wide": (4, 7)}, 0)
    tx = lro.average_gradients(tx, "x")
    with pytest.raises(ValueError, match="Cannot use average_gradients with") as e:
        tx.init(params)
    assert e.match(message)
    assert e.match(r"pmean\(grads, \('x',\)\)|around the parts")


def test_a_bad_gradient_of_one_device_spoils_one_step():
    tx, params = project(), random_like(SHAPES, 0)
    update = jax.jit(local(lro.average_gradients(tx, "x")))
    grads, state = gradients(params), tx.init(params)
    bad = jax.tree.map(lambda g: g.at[1].set(jnp.nan), grads[1])
    finite = []
    for g in (grads[0], bad, *grads[2:]):
        updates, state = update(g, state, params)
        finite.append(all(np.all(np.isfinite(x)) for x in jax.tree.leaves(updates)))
    assert finite == [True, False, *[True] * (STEPS - 2)]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
