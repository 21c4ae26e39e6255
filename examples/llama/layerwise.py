"""LLaMA taken apart for steps that update each layer inside of the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lowrank_optax as lro
from examples.llama.config import LlamaConfig
from examples.llama.model import Layer, Llama, causal, rotary_table


def step_of(
    config: LlamaConfig, clip: float | None
) -> Callable[[optax.GradientTransformation], Callable[..., Any]]:
    """What makes a training step of an optimizer.

    The step is ``(params, opt_state, rows) -> (params, opt_state, record)``, where each
    row of tokens `(B, T + 1)` is read but for its last token and predicted but for its
    first. A layer is six blocks, so that the gradients of few of its weights exist at
    a time, and the scores of the attention for one row at a time.

    Args:
      config: of the model, with `scan_layers`.
      clip: the largest norm of the gradient; None for any.
    """
    shapes = nnx.eval_shape(lambda: Llama(config))
    graph, one_graph = nnx.graphdef(shapes), nnx.graphdef(shapes.layers)
    stack = nnx.to_pure_dict(nnx.state(shapes.layers, nnx.Param))

    def layer(w: Any) -> Layer:
        return nnx.merge(one_graph, w)

    def whole(outer: Any) -> Llama:
        return nnx.merge(graph, {**outer, "layers": stack})  # which is not looked at

    def embed(outer: Any, rows: jax.Array) -> jax.Array:
        return whole(outer).embed_tokens(rows[:, :-1])

    def project(w: Any, x: jax.Array, rows: jax.Array) -> tuple[jax.Array, ...]:
        table = rotary_table(config, jnp.arange(x.shape[1]))
        return x, *layer(w).self_attn.heads(layer(w).input_layernorm(x), table)

    def attend(w: Any, given: tuple[jax.Array, ...], rows: jax.Array) -> Any:
        @jax.checkpoint
        def one_row(qkv: tuple[jax.Array, ...]) -> jax.Array:
            return causal(*(x[None] for x in qkv))[0]

        x, *qkv = given
        return x, jax.lax.map(one_row, tuple(qkv))

    def join(w: Any, given: tuple[jax.Array, ...], rows: jax.Array) -> jax.Array:
        x, mixed = given
        return x + layer(w).self_attn.joined(mixed)

    def gate(w: Any, x: jax.Array, rows: jax.Array) -> tuple[jax.Array, ...]:
        normed = layer(w).post_attention_layernorm(x)
        return x, normed, layer(w).mlp.gate_proj(normed)

    def widen(w: Any, given: tuple[jax.Array, ...], rows: jax.Array) -> Any:
        x, normed, gate = given
        return x, jax.nn.silu(gate) * layer(w).mlp.up_proj(normed)

    def narrow(w: Any, given: tuple[jax.Array, ...], rows: jax.Array) -> jax.Array:
        x, hidden = given
        return x + layer(w).mlp.down_proj(hidden)

    def head(outer: Any, x: jax.Array, rows: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            whole(outer).logits(x), rows[:, 1:]
        )
        return losses.mean()

    def make(tx: optax.GradientTransformation) -> Callable[..., Any]:
        blocks = [project, attend, join, gate, widen, narrow]
        update = lro.layerwise.value_and_update(tx, embed, blocks, head, clip=clip)

        def step(params: Any, opt_state: Any, rows: jax.Array) -> Any:
            loss, grad_norm, params, opt_state = update(params, opt_state, rows)
            return params, opt_state, {"loss": loss, "grad_norm": grad_norm}

        return step

    return make
