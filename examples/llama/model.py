"""The LLaMA decoder in Flax NNX, in one file.

Modules carry the names of Hugging Face's checkpoints (`layers.0.self_attn.q_proj`),
so `weights.py` maps one onto the other word by word. Shape letters: B batch, T time,
D model width, N query heads, K key/value heads, H width of a head, V vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from examples.llama.config import LlamaConfig as LlamaConfig

# Of queries (B, T, N, H), keys and values (B, S, K, H): the values' mean by weights,
# (B, T, N, H).
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class RMSNorm(nnx.Module):
    """`scale * x / rms(x)` over the last axis, in float32 whatever `x` is."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        del rngs  # Nothing random here; the signature is every module's.
        self.eps = config.rms_norm_eps
        self.scale = nnx.Param(jnp.ones(config.hidden_size, config.param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def rotary_table(
    config: LlamaConfig, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of RoPE's angles, each `(T, H / 2)` float32.

    Positions `(B, T)`, of each row its own, give `(B, T, H / 2)`.
    """
    half = config.head_width // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[..., None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates `(B, T, heads, H)` by position, pairing entry i with entry i + H / 2."""
    cos, sin = (t[..., None, :] for t in table)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of each position to itself and all before it."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def within(segments: jax.Array | None) -> Attend:
    """Causal attention that stays within runs of equal numbers, of `(B, T)` if any."""
    if segments is None:
        return causal
    mask = segments[:, None, :, None] == segments[:, None, None, :]  # B 1 T S

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)

    return attend


def positions(size: int, segments: jax.Array | None) -> jax.Array:
    """Positions `(T,)` of a row, or `(B, T)` that restart with every run of numbers."""
    if segments is None:
        return jnp.arange(size)
    columns = jnp.arange(size)
    first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    starts = jax.lax.cummax(jnp.where(first, columns, 0), axis=1)
    return columns - starts


def _linear(config: LlamaConfig, size_in: int, size_out: int, rngs: nnx.Rngs):
    return nnx.Linear(
        size_in,
        size_out,
        use_bias=False,
        kernel_init=nnx.initializers.normal(config.initializer_range),
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.width = config.head_width
        queries = config.num_attention_heads * self.width
        keys = config.kv_heads * self.width
        self.q_proj = _linear(config, config.hidden_size, queries, rngs)
        self.k_proj = _linear(config, config.hidden_size, keys, rngs)
        self.v_proj = _linear(config, config.hidden_size, keys, rngs)
        self.o_proj = _linear(config, queries, config.hidden_size, rngs)

    def __call__(
        self,
        x: jax.Array,
        table: tuple[jax.Array, jax.Array],
        attend: Attend = causal,
    ) -> jax.Array:
        return self.joined(attend(*self.heads(x, table)))

    def heads(
        self, x: jax.Array, table: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of each head, rotated by position."""
        heads = (*x.shape[:2], -1, self.width)
        q = rotate(self.q_proj(x).reshape(heads), table)  # B T N H
        k = rotate(self.k_proj(x).reshape(heads), table)  # B T K H
        return q, k, self.v_proj(x).reshape(heads)  # B T K H

    def joined(self, mixed: jax.Array) -> jax.Array:
        """The output of all heads `(B, T, N, H)`."""
        return self.o_proj(mixed.reshape(*mixed.shape[:2], -1))


class FeedForward(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        wide = config.intermediate_size
        self.gate_proj = _linear(config, config.hidden_size, wide, rngs)
        self.up_proj = _linear(config, config.hidden_size, wide, rngs)
        self.down_proj = _linear(config, wide, config.hidden_size, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """One decoder layer: attention and feed-forward, each normed and residual."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config, rngs=rngs)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config, rngs=rngs)
        self.mlp = FeedForward(config, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        table: tuple[jax.Array, jax.Array],
        attend: Attend = causal,
    ) -> jax.Array:
        x = x + self.self_attn(self.input_layernorm(x), table, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nnx.Module):
    """LLaMA: token ids `(B, T)` to next-token logits `(B, T, V)`.

    Matrices are `kernel` of shape (in, out) in `q_proj`, `k_proj`, `v_proj`, `o_proj`,
    `gate_proj`, `up_proj`, `down_proj` and `lm_head`; under `scan_layers` those of the
    layers are `(layers, in, out)`. Equal `rngs` give equal weights in both layouts.

    Args:
      config: what to build.
      rngs: source of the initial weights; `nnx.Rngs(0)` if None.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs | None = None):
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.config = config
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=nnx.initializers.normal(config.initializer_range),
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )
        keys = jax.random.split(rngs.params(), config.num_hidden_layers)

        def layer(key: jax.Array) -> Layer:
            return Layer(config, rngs=nnx.Rngs(key))

        if config.scan_layers:
            self.layers = nnx.vmap(layer)(keys)
        else:
            self.layers = nnx.List([layer(key) for key in keys])
        self.norm = RMSNorm(config, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = _linear(config, config.hidden_size, config.vocab_size, rngs)

    def __call__(
        self, input_ids: jax.Array, segments: jax.Array | None = None
    ) -> jax.Array:
        """Logits `(B, T, V)` in float32 of integer ids `(B, T)`.

        Args:
          input_ids: the tokens.
          segments: `(B, T)` numbers that are equal within a text, where several stand
            one after the other in a row: each is read as if it stood alone. None if
            every row is one text.

        Raises:
          ValueError: the ids are not two-dimensional, or longer than
            `max_position_embeddings`.
        """
        if input_ids.ndim != 2:
            raise ValueError(
                f"input_ids must be (batch, time), got shape {input_ids.shape}."
            )
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"A sequence of {input_ids.shape[1]} tokens exceeds "
                f"max_position_embeddings={self.config.max_position_embeddings}. "
                "Cut it, or raise that field of the config."
            )
        return self.logits(self.decode(self.embed_tokens(input_ids), segments))

    def decode(self, x: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        """Embedded tokens `(B, T, D)` through every layer, same shape."""
        table = rotary_table(self.config, positions(x.shape[1], segments))
        attend = within(segments)

        def apply(graph: nnx.GraphDef, x: jax.Array, state: nnx.State) -> jax.Array:
            return nnx.merge(graph, state)(x, table, attend)

        if self.config.remat:
            # Inside a scan nothing can undo the recomputation, and the barriers
            # against it would only cost time.
            apply = jax.checkpoint(
                apply, static_argnums=0, prevent_cse=not self.config.scan_layers
            )
        if isinstance(self.layers, Layer):
            graph, states = nnx.split(self.layers)
            x, _ = jax.lax.scan(lambda x, s: (apply(graph, x, s), None), x, states)
            return x
        for layer in self.layers:
            graph, state = nnx.split(layer)
            x = apply(graph, x, state)
        return x

    def logits(self, x: jax.Array) -> jax.Array:
        """Norm and head: `(B, T, D)` to `(B, T, V)` float32, accumulated in float32."""
        x = self.norm(x)
        if self.config.tie_word_embeddings:
            kernel = self.embed_tokens.embedding[...].T
        else:
            kernel = self.lm_head.kernel[...]
        kernel = kernel.astype(x.dtype)
        return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
