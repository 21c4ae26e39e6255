"""LLaMA's per-layer training step is the ordinary one."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from running import assert_close

import lowrank_optax as lro
from examples.common.methods import matrices
from examples.llama.config import LlamaConfig
from examples.llama.layerwise import step_of
from examples.llama.model import Llama
from examples.llama.rows import Batch

CLIP = 0.5


def packed(rows):
    """Two texts to a row, with a few tokens of each to be predicted."""
    segments = jnp.where(jnp.arange(rows.shape[1]) < 3, 1, 2) * jnp.ones_like(rows)
    return Batch(rows, segments, (rows % 2).astype(jnp.float32))


def test_a_layerwise_step_is_the_ordinary_one():
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        scan_layers=True,
    )
    model = Llama(config)
    graph, params = nnx.graphdef(model), nnx.to_pure_dict(nnx.state(model, nnx.Param))
    # Second moments of nearly zero would make much of a rounding.
    tx = lro.mlorc_adamw(0.01, rank=2, eps=1e-3, matrices=matrices)
    state = tx.init(params)
    # Seven stacks of kernels are matrices, in two factors each, and no others.
    moments = jax.tree.leaves(state[0].inner_state.mu)
    assert len(moments) == len(jax.tree.leaves(params)) + 7

    def loss_of(params, batch):
        ids, targets, segments, weights = batch.text()
        losses = optax.softmax_cross_entropy_with_integer_labels(
            nnx.merge(graph, params)(ids, segments), targets
        )
        return jnp.average(losses, weights=weights)

    @jax.jit
    def ordinary(params, state, batch):
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        clipped, _ = optax.clip_by_global_norm(CLIP).update(grads, optax.EmptyState())
        updates, state = tx.update(clipped, state, params)
        record = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return optax.apply_updates(params, updates), state, record

    layerwise = jax.jit(step_of(config, CLIP, Batch.text)(tx))
    expected, got = (params, state), (params, state)
    for i in range(3):
        rows = jax.random.randint(jax.random.key(i), (2, 6), 0, config.vocab_size)
        *expected, record = ordinary(*expected, packed(rows))
        *got, measured = layerwise(*got, packed(rows))
        assert float(record["grad_norm"]) > CLIP
        assert_close(measured, record, rtol=1e-5, atol=1e-5)
    assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), got[0], params)
    assert min(jax.tree.leaves(moved)) > 0.01
