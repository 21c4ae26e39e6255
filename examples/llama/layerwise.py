"""LLaMA taken apart for steps that update each layer inside of the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lowrank_optax as lro
from examples.common.mesh import Placement
from examples.llama.config import LlamaConfig
from examples.llama.loss import Text, whole_rows
from examples.llama.model import Layer, Llama, positions, rotary_table, within


def step_of(
    config: LlamaConfig,
    clip: float | None,
    text_of: Callable[[Any], Text] = whole_rows,
    placement: Placement | None = None,
) -> Callable[[optax.GradientTransformation], Callable[..., Any]]:
    """What makes a training step of an optimizer.

    The step is ``(params, opt_state, batch) -> (params, opt_state, record)``. A layer
    is six blocks, so that the gradients of few of its weights exist at a time, and the
    scores of the attention for one row at a time on each device.

    Args:
      config: of the model, with `scan_layers`.
      clip: the largest norm of the gradient; None for any.
      text_of: what is in a batch.
      placement: over which devices its rows are split, if over several.
    """
    parts = 1 if placement is None else placement.parts
    shapes = nnx.eval_shape(lambda: Llama(config))
    graph, one_graph = nnx.graphdef(shapes), nnx.graphdef(shapes.layers)
    stack = nnx.to_pure_dict(nnx.state(shapes.layers, nnx.Param))

    def layer(w: Any) -> Layer:
        return nnx.merge(one_graph, w)

    def whole(outer: Any) -> Llama:
        return nnx.merge(graph, {**outer, "layers": stack})  # which is not looked at

    def split(x: jax.Array, axis: int = 0) -> jax.Array:
        """Held to lie as the batch does, which XLA does not see inside of the loops."""
        return x if placement is None else placement.split(x, axis)

    def embed(outer: Any, text: Text) -> jax.Array:
        return split(whole(outer).embed_tokens(text.ids))

    def project(w: Any, x: jax.Array, text: Text) -> tuple[jax.Array, ...]:
        table = rotary_table(config, positions(x.shape[1], text.segments))
        return x, *layer(w).self_attn.heads(layer(w).input_layernorm(x), table)

    def attend(w: Any, given: tuple[jax.Array, ...], text: Text) -> Any:
        @jax.checkpoint
        def row_of_each(rows: Any) -> jax.Array:
            qkv, segments = jax.tree.map(split, rows)
            return split(within(segments)(*qkv))

        def turns(a: jax.Array) -> jax.Array:
            return split(a.reshape(parts, -1, *a.shape[1:]).swapaxes(0, 1), 1)

        x, *qkv = given
        mixed = jax.lax.map(row_of_each, jax.tree.map(turns, (qkv, text.segments)))
        mixed = split(mixed, 1).swapaxes(0, 1)
        return x, split(mixed.reshape(-1, *mixed.shape[2:]))

    def join(w: Any, given: tuple[jax.Array, ...], text: Text) -> jax.Array:
        x, mixed = given
        return split(x + layer(w).self_attn.joined(mixed))

    def gate(w: Any, x: jax.Array, text: Text) -> tuple[jax.Array, ...]:
        normed = layer(w).post_attention_layernorm(x)
        return x, normed, layer(w).mlp.gate_proj(normed)

    def widen(w: Any, given: tuple[jax.Array, ...], text: Text) -> Any:
        x, normed, gate = given
        return x, jax.nn.silu(gate) * layer(w).mlp.up_proj(normed)

    def narrow(w: Any, given: tuple[jax.Array, ...], text: Text) -> jax.Array:
        x, hidden = given
        return split(x + layer(w).mlp.down_proj(hidden))

    def head(outer: Any, x: jax.Array, text: Text) -> jax.Array:
        return text.mean_loss(whole(outer).logits(x))

    def make(tx: optax.GradientTransformation) -> Callable[..., Any]:
        blocks = [project, attend, join, gate, widen, narrow]
        update = lro.layerwise.value_and_update(tx, embed, blocks, head, clip=clip)

        def step(params: Any, opt_state: Any, batch: Any) -> Any:
            loss, grad_norm, params, opt_state = update(
                params, opt_state, text_of(batch)
            )
            return params, opt_state, {"loss": loss, "grad_norm": grad_norm}

        return step

    return make


def stacked(params: Any) -> Any:
    """The parameters with the layers as one, as under `scan_layers`."""
    layers = [params["layers"][i] for i in range(len(params["layers"]))]
    return {**params, "layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def separate(params: Any) -> Any:
    """What `stacked` was made of."""
    stack = params["layers"]
    depth = len(jax.tree.leaves(stack)[0])
    layers = {i: jax.tree.map(lambda x, i=i: x[i], stack) for i in range(depth)}
    return {**params, "layers": layers}
