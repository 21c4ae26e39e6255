"""Levanter trains with low-rank methods, in named arrays: docs/trainers.md."""

import dataclasses

import draccus
import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from levanter.optim.config import OptimizerConfig
from levanter.trainer_state import TrainerState
from page import run_sections

import lowrank_optax as lro

RANK = 4
Embed, Heads, HeadSize, Mlp, Layers, Vocab = hax.make_axes(
    embed=16, heads=4, head_size=4, mlp=48, layers=3, vocab=32
)


class Block(eqx.Module):
    q: hax.nn.Linear
    up: hax.nn.Linear
    down: hax.nn.Linear

    @staticmethod
    def init(*, key):
        keys = jax.random.split(key, 3)
        linear = hax.nn.Linear.init
        return Block(
            linear(Embed, (Heads, HeadSize), key=keys[0], use_bias=False),
            linear(Embed, Mlp, key=keys[1], out_first=False),
            linear(Mlp, Embed, key=keys[2]),
        )


class Model(eqx.Module):
    embed: hax.nn.Embedding
    layers: hax.nn.Stacked
    lm_head: hax.nn.Linear

    @staticmethod
    def init(key):
        keys = jax.random.split(key, Layers.size)
        return Model(
            hax.nn.Embedding.init(Vocab, Embed, key=key),
            hax.nn.Stacked.init(Layers, Block)(key=keys),
            hax.nn.Linear.init(Embed, Vocab, key=key, use_bias=False),
        )


@pytest.fixture(scope="module")
def page():
    return run_sections("trainers.md", "What trainers ask for", "Levanter")


@pytest.fixture(scope="module")
def model():
    return Model.init(jax.random.key(0))


def test_the_axes_of_linears_are_those_that_they_name(page, model):
    axes = page["linear_axes"](model)
    block = axes.layers.stacked
    assert block.q["weight"] == lro.MatrixAxes((3,), (1, 2))
    assert block.up["weight"] == lro.MatrixAxes((1,), (2,))
    assert block.down["weight"] == lro.MatrixAxes((2,), (1,))
    assert axes.lm_head is None and axes.embed.weight is None


@dataclasses.dataclass
class Command:
    optimizer: OptimizerConfig


def test_the_command_line_chooses_it_and_a_trainer_takes_its_steps(page, model):
    args = ["--optimizer.type", "galore", "--optimizer.rank", str(RANK)]
    config = draccus.parse(Command, args=args).optimizer
    tx = config.build(10)
    state = TrainerState.init(tx, model, key=jax.random.key(1), is_trainable=True)
    stepped, _ = eqx.filter_jit(lambda s: s.take_step(model, key=s.training_key))(state)

    plain = lro.galore_adamw(
        config.lr_scheduler(10),
        RANK,
        weight_decay=config.weight_decay,
        mask=config.build_weight_decay_mask(),
        matrices=page["linear_axes"](model),
    )
    params = page["arrays"](model)
    updates, _ = plain.update(params, plain.init(params), params)
    expected = optax.apply_updates(params, updates)
    found = page["arrays"](stepped.model)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_states_have_the_names_of_their_axes_and_lie_by_them(page, model):
    tx = page["named"](lambda axes: lro.galore_adamw(1e-2, RANK, matrices=axes))
    by = {"embed": "data"}
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    with hax.axis_mapping(by), jax.set_mesh(mesh):
        placed = hax.shard(model, by)
        state = hax.named_jit(tx.init, axis_resources=by)(placed)
        step = hax.named_jit(tx.update, axis_resources=by)
        updates, state = step(placed, state, placed)
    assert jax.tree.structure(updates) == jax.tree.structure(model)
    projected = state[0]
    basis = projected.basis.layers.stacked.down.weight  # on the side of the embedding
    mu = projected.inner_state.mu
    assert basis.axis_names == ("layers", "embed", "rank2")
    assert mu.layers.stacked.down.weight.axis_names == ("layers", "rank1", "embed")
    assert mu.embed.weight.axis_names == ("vocab", "embed")
    for x in (basis, mu.layers.stacked.down.weight, mu.embed.weight):
        size = {shard.data.size for shard in x.array.addressable_shards}
        assert size == {x.array.size // 2}
    assert jnp.all(jnp.isfinite(updates.layers.stacked.q.weight.array))
