"""What a batch has to be read and predicted, and the loss of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Text(NamedTuple):
    """What is read and what is predicted of it, each `(B, T)`.

    Attributes:
      ids: the tokens that are read.
      targets: what is predicted at their places.
      segments: which text of its row a token belongs to, as `Llama` takes it.
      weights: of the targets in the mean loss; equal ones if None.
    """

    ids: jax.Array
    targets: jax.Array
    segments: jax.Array | None = None
    weights: jax.Array | None = None

    def loss_sums(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The weighted sum of the losses of logits `(B, T, V)`, and of the weights."""
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, self.targets)
        weights = jnp.ones_like(losses) if self.weights is None else self.weights
        return jnp.sum(losses * weights), jnp.sum(weights)

    def mean_loss(self, logits: jax.Array) -> jax.Array:
        """The weighted mean; zero where nothing is predicted."""
        total, weights = self.loss_sums(logits)
        return total / jnp.maximum(weights, 1)


def whole_rows(rows: jax.Array) -> Text:
    """Rows `(B, T + 1)` of one text each, predicted but for their first token."""
    return Text(rows[:, :-1], rows[:, 1:])
