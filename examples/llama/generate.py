"""Answers of a LLaMA to prompts: prefill, then one token a step from a cache.

The whole of a batch is one compiled program. Prompts stand at the right end of their
rows, so that all of them are continued in the same column; what is before them in the
row is never attended to.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.llama.model import Layer, Llama, rotary_table

_ROUND = 32  # prompts are padded to a multiple of it, so that few shapes are compiled


class Cache(NamedTuple):
    """Keys and values of a layer, each `(B, S, K, H)`; columns not yet read are 0."""

    keys: jax.Array
    values: jax.Array


class _Decoding(NamedTuple):
    """Where a batch stands after a number of new tokens.

    Attributes:
      count: how many new tokens each row has.
      tokens: (B, max_new_tokens), the rest filled up with the first stop token.
      last: (B,), the tokens to go on from.
      done: (B,), whether the row has met a stop token.
      caches: one a layer.
    """

    count: jax.Array
    tokens: jax.Array
    last: jax.Array
    done: jax.Array
    caches: list[Cache]


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[int],
    temperature: float = 0.0,
    key: jax.Array | None = None,
    batch_size: int = 32,
    over: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> list[list[int]]:
    """What the model goes on with after each prompt, without the stop token.

    Args:
      model: its layers separate or stacked.
      prompts: token ids, of any lengths from 1 on.
      max_new_tokens: where a row ends that meets no stop token.
      stop: tokens that end a row, at least one.
      temperature: divides the logits that tokens are drawn by; 0 takes the most likely
        token.
      key: of the draws. Each prompt has draws of its own, by its place among the
        prompts, whatever the batch size.
      batch_size: prompts at a time.
      over: iterates over the batches, such as `tqdm`.

    Raises:
      ValueError: a prompt is empty, or too long for the model with the new tokens;
        there is no stop token; the temperature is negative, or above 0 without a key.
    """
    if not stop:
        raise ValueError("Cannot generate without a stop token.")
    if temperature < 0 or (temperature > 0 and key is None):
        raise ValueError(
            f"Cannot sample at temperature {temperature}"
            + (": it must be at least 0." if temperature < 0 else " without a key.")
        )
    longest = max(map(len, prompts), default=0)
    limit = model.config.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"A prompt of {longest} tokens and {max_new_tokens} new ones exceed"
            f" max_position_embeddings={limit}. Ask for fewer."
        )
    if not all(map(len, prompts)):
        raise ValueError("Cannot go on from an empty prompt.")
    keys = jax.random.key(0) if key is None else key
    graph, state = nnx.split(model)
    # Neighbours in length share a batch, so that little of it is padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for begin in over(range(0, len(order), batch_size)):
        chosen = order[begin : begin + batch_size]
        # The last batch is filled up, to be of the others' shape.
        rows = (chosen * batch_size)[:batch_size]
        ids, starts = _at_the_right([prompts[i] for i in rows])
        tokens = _continue(
            graph,
            state,
            ids,
            starts,
            jax.vmap(jax.random.fold_in, (None, 0))(keys, jnp.asarray(rows)),
            max_new_tokens,
            tuple(stop),
            temperature,
        )
        for i, row in zip(chosen, np.asarray(tokens), strict=False):
            ends = np.flatnonzero(np.isin(row, stop))
            answers[i] = row[: ends[0] if len(ends) else None].tolist()
    return answers


def _at_the_right(prompts: list[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids (B, P), padded on the left, and in which column each prompt begins."""
    width = -(-max(map(len, prompts)) // _ROUND) * _ROUND
    starts = np.array([width - len(prompt) for prompt in prompts], np.int32)
    ids = np.zeros((len(prompts), width), np.int32)
    for row, start, prompt in zip(ids, starts, prompts, strict=True):
        row[start:] = prompt
    return ids, starts


@partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _continue(
    graph: nnx.GraphDef,
    state: nnx.State,
    ids: jax.Array,
    starts: jax.Array,
    keys: jax.Array,
    max_new_tokens: int,
    stop: tuple[int, ...],
    temperature: float,
) -> jax.Array:
    """New tokens (B, max_new_tokens), from `stop[0]` on where a row has ended."""
    model = nnx.merge(graph, state)
    rows, width = ids.shape

    def choose(logits: jax.Array, count: Any) -> jax.Array:
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        draw = jax.vmap(jax.random.fold_in, (0, None))(keys, count)
        drawn = jax.vmap(jax.random.categorical)(draw, logits / temperature)
        return drawn.astype(jnp.int32)

    def going_on(at: _Decoding) -> jax.Array:
        return (at.count < max_new_tokens) & ~jnp.all(at.done)

    def step(at: _Decoding) -> _Decoding:
        tokens = at.tokens.at[:, at.count].set(jnp.where(at.done, stop[0], at.last))
        done = at.done | jnp.isin(at.last, jnp.asarray(stop))
        logits, caches = _read(
            model, at.last[:, None], at.caches, width + at.count, starts
        )
        count = at.count + 1
        return _Decoding(count, tokens, choose(logits, count), done, caches)

    caches = _empty_caches(model, rows, width + max_new_tokens)
    logits, caches = _read(model, ids, caches, 0, starts)
    end = jax.lax.while_loop(
        going_on,
        step,
        _Decoding(
            jnp.zeros((), jnp.int32),
            jnp.full((rows, max_new_tokens), stop[0], jnp.int32),
            choose(logits, 0),
            jnp.zeros(rows, bool),
            caches,
        ),
    )
    return end.tokens


def _empty_caches(model: Llama, rows: int, columns: int) -> list[Cache]:
    config = model.config
    shape = (rows, columns, config.kv_heads, config.head_width)
    return [
        Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
        for _ in range(config.num_hidden_layers)
    ]


def _read(
    model: Llama, ids: jax.Array, caches: list[Cache], begin: Any, starts: jax.Array
) -> tuple[jax.Array, list[Cache]]:
    """Logits (B, V) after ids (B, T) in the columns from `begin` on, and the caches
    with these; `starts` (B,) is where each row's text begins."""
    columns = begin + jnp.arange(ids.shape[1])
    # Before its start a row has no positions; what is computed there is not used.
    table = rotary_table(model.config, jnp.maximum(columns - starts[:, None], 0))
    known = jnp.arange(caches[0].keys.shape[1])
    mask = (known <= columns[:, None]) & (known >= starts[:, None, None])  # B T S
    new = []

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        old = caches[len(new)]
        at = (0, begin, 0, 0)
        cache = Cache(
            jax.lax.dynamic_update_slice(old.keys, k.astype(old.keys.dtype), at),
            jax.lax.dynamic_update_slice(old.values, v.astype(old.values.dtype), at),
        )
        new.append(cache)
        return jax.nn.dot_product_attention(q, *cache, mask=mask[:, None])

    x = model.embed_tokens(ids)
    for layer in _layers(model):
        x = layer(x, table, attend)
    return model.logits(x[:, -1]), new


def _layers(model: Llama) -> list[Layer]:
    """The layers one by one, also of a model that holds them as a stack."""
    if not isinstance(model.layers, Layer):
        return list(model.layers)
    graph, stack = nnx.split(model.layers)
    return [
        nnx.merge(graph, jax.tree.map(itemgetter(i), stack))
        for i in range(model.config.num_hidden_layers)
    ]
