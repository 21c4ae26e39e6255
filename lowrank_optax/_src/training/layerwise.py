"""Per-layer updates: the weights of a layer change as soon as their gradient exists.

So no gradient of the whole model ever does. What makes it small is that XLA writes the
new weights over the old ones, which it only does where nothing can still read these:
what writes, and what comes next, depends by data on what has read before
(`one_layer.after`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._src.training.one_layer import (
    PartialUpdate,
    Progress,
    after_turn,
    end_turn,
    slice_layer,
)


class LayerwiseStep(NamedTuple):
    """What `value_and_update` returns.

    Attributes:
      value: the loss before the update.
      grad_norm: the global norm of its gradient, float32, before any clip.
      params: the new parameters.
      opt_state: the new state of the optimizer.
    """

    value: jax.Array
    grad_norm: jax.Array
    params: Any
    opt_state: Any


def value_and_update(
    tx: optax.GradientTransformation,
    embed: Callable[[Any, Any], Any],
    layer: Callable[[Any, Any, Any], Any] | Sequence[Callable[[Any, Any, Any], Any]],
    head: Callable[[Any, Any, Any], jax.Array],
    *,
    layers: str = "layers",
    clip: Any = None,
) -> Callable[[Any, Any, Any], LayerwiseStep]:
    r"""A training step that updates each layer inside of the backward pass.

    The model is ``head(outer, layer(w_L, ... layer(w_1, embed(outer, batch))), batch)``
    with the layers' parameters stacked, ``(L, ...)`` each, at one name of a dictionary,
    and all others around them. The forward pass keeps the inputs of the layers; the
    backward pass goes through these again from the last layer to the first, and each
    time it has a layer's gradient it updates the layer, and the layer's part of the
    optimizer's state, in place. The steps are those of an ordinary one,
    ``tx.update(jax.grad(loss)(params), ...)``, with the same state; donate both.

    ``tx`` must treat the matrices of a stack one by one. Optimizers of this library do
    where ``matrices`` makes the layers a batch axis (``MatrixAxes()`` for
    ``(L, m, n)``, None for stacked vectors); those of Optax do where they work number
    by number. For ``optax.clip_by_global_norm`` there is ``clip``. `Staggered` spreads
    the leaves of a layer over its period as if there were no others.

    Args:
      tx: the optimizer, learning rate included.
      embed: ``(outer, batch) -> x``, the first layer's input, a tree of float arrays.
      layer: ``(w, x, batch) -> x``, of one layer. Or several in a row, the blocks that
        make up a layer: each block's weights are updated before the next one's
        gradient is formed, so that fewer of them exist at a time.
      head: ``(outer, x, batch) -> loss``, a scalar.
      layers: the name of the stacked parameters.
      clip: the largest global norm of the gradient. It is known only when all of it has
        been formed, so there are two backward passes: one for the norm, one to update.

    Returns:
      ``step(params, opt_state, batch) -> LayerwiseStep``, with ``opt_state`` as
      ``tx.init(params)`` makes it.

    Raises:
      ValueError: for parameters without the name, or stacks of different depths; for an
        optimizer whose state cannot be taken apart by layers, or that is known to look
        at several at once; for gradient accumulation, as summed gradients are what
        per-layer updates do without.

    >>> import jax, jax.numpy as jnp, optax, lowrank_optax as lro
    >>> params = {
    ...     "embed": jnp.ones((2, 4)),
    ...     "layers": {"w": 0.1 * jnp.ones((3, 4, 4)), "b": jnp.zeros((3, 4))},
    ...     "head": jnp.ones(4),
    ... }
    >>> tx = lro.mlorc_adamw(
    ...     1e-2, rank=2, matrices={"layers": {"w": lro.MatrixAxes(), "b": None}}
    ... )
    >>> step = lro.layerwise.value_and_update(
    ...     tx,
    ...     embed=lambda outer, batch: outer["embed"],
    ...     layer=lambda w, x, batch: x + jnp.tanh(x @ w["w"] + w["b"]),
    ...     head=lambda outer, x, batch: jnp.mean((x @ outer["head"] - batch) ** 2),
    ... )
    >>> step = jax.jit(step, donate_argnums=(0, 1))
    >>> state, batch = tx.init(params), jnp.zeros(2)
    >>> for _ in range(3):
    ...     value, grad_norm, params, state = step(params, state, batch)
    ...     print(f"{value:.0f}")
    102
    84
    68
    """
    tx = optax.with_extra_args_support(tx)
    blocks = (layer,) if callable(layer) else tuple(layer)

    def step(params, opt_state, batch):
        if not isinstance(params, Mapping) or layers not in params:
            got = sorted(params) if isinstance(params, Mapping) else type(params)
            raise ValueError(
                f"`params` must be a dictionary with the stacked layers at '{layers}', "
                f"got {got}. Say in `layers` what they are called."
            )
        model = _Model(params, layers, batch, embed, blocks, head)
        update = PartialUpdate(tx, params, opt_state, model.depth)
        before, factor = None, None
        if clip is not None:
            before = model.sweep(Progress(model.leaves))[1].squares
            # As optax.clip_by_global_norm has it.
            norm = jnp.sqrt(before)
            factor = jnp.where(norm < clip, 1.0, clip / norm)
        value, now = model.sweep(Progress(model.leaves, update.state), update, factor)
        squares = now.squares if before is None else before
        new_params = update.treedef.unflatten(
            [now.leaves[i] for i in range(len(now.leaves))]
        )
        new_state = update.structure.unflatten(now.state)
        return LayerwiseStep(value, jnp.sqrt(squares), new_params, new_state)

    return step


class _Model:
    """A model's functions with a batch, and which of its parameters each uses."""

    def __init__(self, params, layers, batch, embed, blocks, head):
        leaves, treedef = jax.tree.flatten(params)
        numbers = treedef.unflatten(range(len(leaves)))
        self.leaves = dict(enumerate(leaves))
        self.stack = numbers[layers]
        self.outer = {name: x for name, x in numbers.items() if name != layers}
        shapes = [jnp.shape(self.leaves[i]) for i in jax.tree.leaves(self.stack)]
        if () in shapes or len({shape[0] for shape in shapes}) != 1:
            raise ValueError(
                f"The parameters at '{layers}' must be stacks of one depth, (L, ...) "
                f"each, got shapes {sorted(set(shapes))}."
            )
        self.depth = shapes[0][0]

        # Each a function of parameters and an input.
        self.embed = lambda outer, x: embed(outer, batch)
        self.blocks = [lambda w, x, block=b: block(w, x, batch) for b in blocks]
        self.head = lambda outer, x: head(outer, x, batch)

        one = {i: _first(self.leaves[i]) for i in jax.tree.leaves(self.stack)}
        x, in_embed = _trace(self.embed, self.outer, self.leaves, ())
        in_blocks = []
        for block in self.blocks:
            x, used = _trace(block, self.stack, one, x)
            in_blocks.append(used)
        _, in_head = _trace(self.head, self.outer, self.leaves, x)
        # What is not used has a gradient of zero.
        in_embed |= set(jax.tree.leaves(self.outer)) - in_embed - in_head
        in_blocks[0] |= set(one).difference(*in_blocks)
        self.in_embed, self.in_blocks, self.in_head = in_embed, in_blocks, in_head

    def sweep(
        self, now: Progress, update: PartialUpdate | None = None, factor: Any = None
    ) -> tuple[jax.Array, Progress]:
        """The loss, and the end of a backward pass that updates if it is told how."""

        def use(now, grads, at=None):
            """Take complete gradients, of outer parameters or of a layer."""
            squares = now.squares
            for g in grads.values():
                squares += jnp.sum(jnp.square(g.astype(jnp.float32)))
            now = now._replace(squares=squares)
            if update is None or not grads:
                return now
            if factor is not None:
                grads = {i: (g * factor).astype(g.dtype) for i, g in grads.items()}
            return update(now, grads, at)

        def forward(x, w):
            return functools.reduce(lambda x, block: block(w, x), self.blocks, x), x

        def backward(carry, place_and_input):
            now, dx = carry
            place, x = place_and_input
            w, xs = _at(self.stack, _slices(now.leaves, place)), [x]
            for block in self.blocks[:-1]:
                xs.append(block(w, xs[-1]))
            grads: dict[int, jax.Array] = {}
            for b in reversed(range(len(self.blocks))):
                # Not what has been computed above, which need not be kept for this.
                at, x = after_turn((place, xs[b]), now.turn)
                w, used = _slices(now.leaves, at), self.in_blocks[b]
                _, own, dx = _pull(self.blocks[b], self.stack, used, w, x, dx)
                now = now._replace(turn=end_turn(dx, now.turn))
                complete, grads = _split(_add(grads, own), self.in_blocks[:b])
                now = use(now, complete, at)
            return (now, dx), None

        x = self.embed(_at(self.outer, now.leaves), ())
        x, inputs = jax.lax.scan(forward, x, _at(self.stack, now.leaves))
        value, own, dx = _pull(self.head, self.outer, self.in_head, now.leaves, x, None)
        now = now._replace(turn=end_turn(dx, now.turn))
        complete, grads = _split(own, [self.in_embed])
        now = use(now, complete)
        start = now, after_turn(dx, now.turn)
        places = jnp.arange(self.depth)
        (now, dx), _ = jax.lax.scan(backward, start, (places, inputs), reverse=True)

        def pull():
            used = self.in_embed
            return _pull(self.embed, self.outer, used, now.leaves, (), dx)[1]

        def never():
            return {i: jnp.zeros_like(now.leaves[i]) for i in self.in_embed}

        # XLA makes constants before all else: outside of a branch, the zeros to which
        # an embedding's gradient is added would be there from the start.
        own = jax.lax.cond(now.turn == 0, pull, never)
        return value, use(now, _add(grads, own))


def _first(x: jax.Array) -> Any:
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


def _at(numbers: Any, leaves: Mapping[int, Any]) -> Any:
    return jax.tree.map(lambda i: leaves[i], numbers)


def _trace(function: Any, numbers: Any, leaves: dict[int, Any], x: Any) -> Any:
    """What a function returns, by its shapes, and which parameters it uses."""
    given = {i: leaves[i] for i in jax.tree.leaves(numbers)}

    def run(given, x):
        return function(_at(numbers, given), x)

    closed, shape = jax.make_jaxpr(run, return_shape=True)(given, x)
    read = {id(v) for eqn in closed.jaxpr.eqns for v in eqn.invars}
    read |= {id(v) for v in closed.jaxpr.outvars}
    return shape, {
        i
        for i, v in zip(sorted(given), closed.jaxpr.invars, strict=False)
        if id(v) in read
    }


def _pull(function: Any, numbers: Any, used: set[int], leaves: Any, x: Any, dy: Any):
    """The value, and the gradients by the used parameters and by the input."""

    def run(own, x):
        return function(_at(numbers, {**leaves, **own}), x)

    y, pull = jax.vjp(run, {i: leaves[i] for i in sorted(used)}, x)
    return y, *pull(jnp.ones_like(y) if dy is None else dy)


def _add(a: dict[int, jax.Array], b: dict[int, jax.Array]) -> dict[int, jax.Array]:
    return a | {i: a[i] + g if i in a else g for i, g in b.items()}


def _split(grads: dict[int, jax.Array], open_sets: Sequence[set[int]]) -> Any:
    """Gradients that are complete, and those to which something may still come."""
    later = set().union(*open_sets)
    complete = {i: g for i, g in grads.items() if i not in later}
    return complete, {i: g for i, g in grads.items() if i in later}


def _slices(stacks: Mapping[int, jax.Array], at: Any) -> dict[int, jax.Array]:
    return {i: slice_layer(x, at)[0] for i, x in stacks.items()}
