"""Which leaves are matrices by default: what their names, axes and neighbours tell."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lowrank_optax._src.leaves.attention import attention_axes
from lowrank_optax._src.leaves.box import value_of
from lowrank_optax._src.leaves.context import beside
from lowrank_optax._src.leaves.matrix import MatrixAxes
from lowrank_optax._src.leaves.names import named_dense, pieces, weights_of
from lowrank_optax._src.leaves.paths import (
    Path,
    check_arrays,
    flatten,
    placeholders,
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is made of a leaf.

    Attributes:
      axes: its rows and columns, or None if it stays at full rank.
      why: the reason of None.
      asked: whether the user named the leaf, so that no rule may decide otherwise.
      unknown: whether it stays at full rank as nothing tells its rows and columns.
    """

    axes: MatrixAxes | None
    why: str = ""
    asked: bool = False
    unknown: bool = False


def by_default(tree: Any, stacks: MatrixAxes | None = None) -> dict[Path, Choice]:
    """The default rule's choice for each leaf.

    Args:
      tree: of parameters; only paths, shapes and dtypes are read.
      stacks: rows and columns of leaves whose names tell nothing, and of attention
        kernels too unless it is ``MatrixAxes()``; None for those of two axes.
    """
    check_arrays(tree)
    paths, leaves, _ = flatten(tree)
    own = dict(zip(paths, map(value_of, leaves), strict=True))
    left_out = placeholders(tree)
    values = own | {
        path: x
        for path, x in beside().items()
        if any(path[: len(start)] == start for start in left_out)
    }
    heads = attention_axes({path: tuple(x.shape) for path, x in values.items()})
    return {p: _choose(p, x, values, heads.get(p), stacks) for p, x in own.items()}


def _choose(
    path: Path,
    x: Any,
    values: Mapping[Path, Any],
    heads: MatrixAxes | None,
    stacks: MatrixAxes | None,
) -> Choice:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return Choice(None, f"its dtype {x.dtype} is not floating")
    if x.ndim < 2:
        return Choice(None, "it is a vector" if x.ndim else "it is a scalar")
    # Haiku's `b` is a bias; a `b` without the larger `w` may be anything.
    weights = [values[other] for other in weights_of(path) if other in values]
    if any(w.ndim > x.ndim for w in weights):
        return Choice(None, f"'{path[-1]}' names a bias")
    if (why := named_dense(pieces(path))) is not None:
        return Choice(None, why)
    # Of those who say that leaves are stacks of matrices, none means split heads.
    if heads is not None and stacks in (None, MatrixAxes()):
        return Choice(heads)
    if stacks is not None:
        return Choice(stacks, asked=True)
    if x.ndim > 2:
        why = f"it has {x.ndim} axes and nothing tells which are rows and columns"
        return Choice(None, why, unknown=True)
    return Choice(MatrixAxes())


def default_matrices(params: Any) -> Any:
    """The default rule as a tree: `MatrixAxes` where a leaf is a matrix, else None.

    Edit the result and pass it as ``matrices=`` to change which leaves are projected,
    or give `matrix_rules` what should differ.

    Matrices are the float leaves of two axes and, with heads on an axis of their own,
    attention kernels; of others with three axes and more, names do not tell the rows
    and columns. What stays at full rank by its name, whatever its axes:

    - biases and norms: the last word of the leaf or its module is bias, biases, scale,
      gain, gamma, beta, offset, norm, norms, rms, ln or bn, or ends in norm or
      normalization; the first one of the leaf is bias or biases; such a word of a norm
      anywhere in the leaf or its module, if the leaf ends in weight or w; or a leaf b,
      b1 or up_b beside a w, w1 or up_w of more axes;
    - embeddings: a word that starts with embed or is emb, embs, embd, posemb, unembed,
      unembedding, wte, wpe, vocab, vocabulary or table; and positional encodings;
    - heads: a word logits, classifier, pooler, readout or predictions; a part
      qa_outputs, or one that starts with lm_head; except in an attention, a part that
      ends in head or heads, and a leaf or module score, shared, lm_out, lm_output,
      output, output_layer or output_projection.

    A list has no names: give a list of specs. For Keras, with ``variables =
    model.trainable_variables``, ``rule = default_matrices({v.path: v.value for v in
    variables})`` and ``matrices=[rule[v.path] for v in variables]``.

    Args:
      params: arrays or abstract ones.

    Returns:
      A tree like ``params``.

    Raises:
      TypeError: for a leaf that is no array.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> params = {"embed": jnp.ones((9, 4)), "w": jnp.ones((4, 4)), "b": jnp.ones(4)}
    >>> lro.default_matrices(params)
    {'b': None, 'embed': None, 'w': MatrixAxes(rows=-2, cols=-1)}
    >>> lro.default_matrices({"query": {"kernel": jnp.ones((16, 4, 8))}})
    {'query': {'kernel': MatrixAxes(rows=0, cols=(1, 2))}}
    """
    treedef = flatten(params)[2]
    return treedef.unflatten(choice.axes for choice in by_default(params).values())
