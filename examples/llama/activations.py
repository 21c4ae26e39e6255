"""How much a training step of a LLaMA keeps beside weights, state and gradients.

Estimates, from what XLA's programs for an H100 were seen to keep at a time
(`tests/test_plan.py` has the figures). They know two kinds of activation: arrays of
(tokens, D), (tokens, F) and (tokens, V), and attention's weights, (rows, N, T, T). In
float32 the latter are kept twice: as exponentials, and divided by their sums.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from examples.llama.config import LlamaConfig

_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Activations:
    """Bytes on a device, of its part of a batch.

    Attributes:
      config: the model.
      rows: sequences on the device.
      time: tokens in each.
      model: over how many devices heads, feed-forward and vocabulary are split.
    """

    config: LlamaConfig
    rows: int
    time: int
    model: int = 1

    @property
    def stream(self) -> int:
        """Of one array (tokens, D): what goes from layer to layer."""
        return self._tokens * self.config.hidden_size * self._item

    @property
    def layer(self) -> int:
        """What is kept of a layer for its gradient: eight arrays of (tokens, D), half
        of them of the heads, three of (tokens, F), and attention's weights."""
        weights = self._square * (_FLOAT + self._item)
        split = 4 * self._heads + 3 * self._wide + weights
        return 4 * self.stream + split // self.model

    @property
    def head(self) -> int:
        """What the loss needs: logits and their gradient in float32, and two arrays of
        (tokens, D)."""
        logits = self._tokens * self.config.vocab_size * _FLOAT
        return 2 * logits // self.model + 2 * self.stream

    @property
    def kept(self) -> int:
        """At the end of the forward pass, all layers' being kept."""
        return self.config.num_hidden_layers * self.layer + self.head

    @property
    def remat(self) -> int:
        """The same where only the layers' inputs are; or in the backward pass through
        attention, which takes its weights three times."""
        inputs = self.config.num_hidden_layers * self.stream
        heads = self._heads // self.model
        backward = self._square * (2 * _FLOAT + self._item) // self.model
        return inputs + max(self.head, backward + 4 * self.stream + 4 * heads)

    @property
    def layerwise(self) -> int:
        """The same where a layer is updated as soon as its gradient exists: the head,
        three arrays of (tokens, F), or attention's weights of one row, three times."""
        inputs = self.config.num_hidden_layers * self.stream
        block = 3 * self._wide // self.model + 4 * self.stream
        row = self._square * (2 * _FLOAT + self._item) // (self.rows * self.model)
        return inputs + max(self.head, block, row) + 2 * self.stream

    @property
    def last(self) -> int:
        """What is left in the backward pass when all gradients exist."""
        return 4 * self.stream + 4 * self._heads // self.model

    @property
    def _tokens(self) -> int:
        return self.rows * self.time

    @property
    def _item(self) -> int:
        return jnp.dtype(self.config.dtype).itemsize

    @property
    def _heads(self) -> int:
        width = self.config.num_attention_heads * self.config.head_width
        return self._tokens * width * self._item

    @property
    def _wide(self) -> int:
        return self._tokens * self.config.intermediate_size * self._item

    @property
    def _square(self) -> int:
        return self.rows * self.config.num_attention_heads * self.time**2
