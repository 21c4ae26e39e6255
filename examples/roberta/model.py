"""RoBERTa and BERT in Flax NNX, in one file: encoder, classifier, masked LM.

The two differ in where positions begin and in their heads. Shape letters: B batch,
T time, D model width, N heads, H width of a head, V vocabulary, C classes.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from examples.roberta.config import EncoderConfig as EncoderConfig


def _linear(config: EncoderConfig, size_in: int, size_out: int, rngs: nnx.Rngs):
    return nnx.Linear(
        size_in,
        size_out,
        kernel_init=nnx.initializers.normal(config.initializer_range),
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


def _embedding(config: EncoderConfig, size: int, rngs: nnx.Rngs):
    return nnx.Embed(
        size,
        config.hidden_size,
        embedding_init=nnx.initializers.normal(config.initializer_range),
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


def _norm(config: EncoderConfig, rngs: nnx.Rngs):
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


def _dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeros a share of the entries and scales up the rest; without a key, `x`."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


def _keys(key: jax.Array | None, count: int) -> list[jax.Array] | list[None]:
    return [None] * count if key is None else list(jax.random.split(key, count))


class Embeddings(nnx.Module):
    """The sum of token, position and type, normed."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.word_embeddings = _embedding(config, config.vocab_size, rngs)
        self.position_embeddings = _embedding(
            config, config.max_position_embeddings, rngs
        )
        self.token_type_embeddings = _embedding(config, config.type_vocab_size, rngs)
        self.norm = _norm(config, rngs)

    def __call__(
        self, input_ids: jax.Array, token_type_ids: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        x = self.norm(x + self.position_embeddings(self.positions(input_ids)))
        return _dropout(x, self.config.hidden_dropout_prob, key)

    def positions(self, input_ids: jax.Array) -> jax.Array:
        """Rows of the table of positions.

        RoBERTa counts the tokens that are no padding, from behind the padding's own
        number, which all padding gets.
        """
        if self.config.model_type == "bert":
            return jnp.arange(input_ids.shape[1])[None]
        token = (input_ids != self.config.pad_token_id).astype(jnp.int32)
        return jnp.cumsum(token, axis=1) * token + self.config.pad_token_id


class Attention(nnx.Module):
    """Self-attention of every token to all that are not masked."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.config = config
        self.query = _linear(config, width, width, rngs)
        self.key = _linear(config, width, width, rngs)
        self.value = _linear(config, width, width, rngs)
        self.dense = _linear(config, width, width, rngs)

    def __call__(
        self, x: jax.Array, mask: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        heads = (*x.shape[:2], self.config.num_attention_heads, -1)
        q, k, v = (m(x).reshape(heads) for m in (self.query, self.key, self.value))
        scores = jnp.einsum(
            "bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32
        ) / jnp.sqrt(q.shape[-1])
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        weights = _dropout(weights, self.config.attention_probs_dropout_prob, key)
        mixed = jnp.einsum("bnqk,bknh->bqnh", weights, v)
        return self.dense(mixed.reshape(x.shape))


class Layer(nnx.Module):
    """One layer: attention and feed-forward, each residual and then normed."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.attention = Attention(config, rngs=rngs)
        self.attention_norm = _norm(config, rngs)
        self.up = _linear(config, config.hidden_size, config.intermediate_size, rngs)
        self.down = _linear(config, config.intermediate_size, config.hidden_size, rngs)
        self.norm = _norm(config, rngs)

    def __call__(
        self, x: jax.Array, mask: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        rate, keys = self.config.hidden_dropout_prob, _keys(key, 3)
        y = self.attention(x, mask, keys[0])
        x = self.attention_norm(x + _dropout(y, rate, keys[1]))
        y = self.down(jax.nn.gelu(self.up(x), approximate=False))
        return self.norm(x + _dropout(y, rate, keys[2]))


class Encoder(nnx.Module):
    """Token ids `(B, T)` to states `(B, T, D)`.

    The matrices are the `kernel`s, (in, out), of `query`, `key`, `value`, `dense`, `up`
    and `down` in each of `layers`.

    Args:
      config: what to build.
      rngs: source of the initial weights.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs)
        self.layers = nnx.List(
            [Layer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """States of integer ids.

        Args:
          input_ids: `(B, T)`.
          attention_mask: `(B, T)`, zero where there is padding; none of it if None.
          token_type_ids: `(B, T)`; all zero if None.
          key: what dropout is drawn from; no dropout if None.

        Raises:
          ValueError: the ids are not two-dimensional, or longer than the model accepts.
        """
        if input_ids.ndim != 2:
            raise ValueError(
                f"input_ids must be (batch, time), got shape {input_ids.shape}."
            )
        if input_ids.shape[1] > self.config.max_length:
            raise ValueError(
                f"A sequence of {input_ids.shape[1]} tokens exceeds the model's "
                f"{self.config.max_length}. Cut it."
            )
        if attention_mask is None:
            attention_mask = jnp.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        first, *rest = _keys(key, 1 + len(self.layers))
        x = self.embeddings(input_ids, token_type_ids, first)
        for layer, own in zip(self.layers, rest, strict=True):
            x = layer(x, attention_mask != 0, own)
        return x


class TwoLayerHead(nnx.Module):
    """RoBERTa's head: a hidden layer between two dropouts, then the classes."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.dense = _linear(config, config.hidden_size, config.hidden_size, rngs)
        self.out_proj = _linear(config, config.hidden_size, len(config.labels), rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        rate, keys = self.config.head_dropout, _keys(key, 2)
        x = jnp.tanh(self.dense(_dropout(x, rate, keys[0])))
        return self.out_proj(_dropout(x, rate, keys[1]))


class Classifier(nnx.Module):
    """An encoder and what reads the classes out of its first state.

    RoBERTa has a head of two layers, BERT a `pooler` and a head of one.

    Args:
      config: what to build; as many classes as it names labels.
      rngs: source of the initial weights.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        if config.model_type == "bert":
            self.pooler = _linear(config, config.hidden_size, config.hidden_size, rngs)
            self.classifier = _linear(
                config, config.hidden_size, len(config.labels), rngs
            )
        else:
            self.classifier = TwoLayerHead(config, rngs=rngs)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits `(B, C)` in float32; arguments as those of `Encoder`."""
        body, head = _keys(key, 2)
        x = self.encoder(input_ids, attention_mask, token_type_ids, key=body)[:, 0]
        if isinstance(self.classifier, TwoLayerHead):
            x = self.classifier(x, head)
        else:
            x = jnp.tanh(self.pooler(x))
            x = self.classifier(_dropout(x, self.config.head_dropout, head))
        return x.astype(jnp.float32)


class MaskedLM(nnx.Module):
    """An encoder that predicts tokens, by the transposed embedding as RoBERTa does.

    Args:
      config: what to build.
      rngs: source of the initial weights.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.encoder = Encoder(config, rngs=rngs)
        self.head = _linear(config, config.hidden_size, config.hidden_size, rngs)
        self.head_norm = _norm(config, rngs)
        self.head_bias = nnx.Param(jnp.zeros(config.vocab_size, config.param_dtype))

    def __call__(
        self,
        input_ids: jax.Array,
        at: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits `(B, K, V)` in float32 of the tokens `at` these positions `(B, K)`."""
        x = self.encoder(input_ids, key=key)
        x = jnp.take_along_axis(x, at[..., None], axis=1)
        x = self.head_norm(jax.nn.gelu(self.head(x), approximate=False))
        table = self.encoder.embeddings.word_embeddings.embedding[...].astype(x.dtype)
        logits = jnp.matmul(x, table.T, preferred_element_type=jnp.float32)
        return logits + self.head_bias[...]
