"""What the gradient and the moments look like along a run, measured by SVD."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro

LEADING = 8  # singular values counted as the top, as in MLorc's Figure 1
_MATRICES = 8  # a full SVD of every matrix of a large model would take hours


@dataclass(frozen=True)
class Probe:
    """Measures a few matrices of a model, evenly spread over its layers.

    Attributes:
      paths: key paths of the measured leaves.
      rank: columns of the compared subspaces.
    """

    paths: tuple[jax.tree_util.KeyPath, ...]
    rank: int

    @classmethod
    def of(cls, params: Any, rank: int) -> "Probe":
        """A probe of the leaves that the library calls matrices by default."""
        views = jax.tree_util.tree_leaves_with_path(lro.default_matrices(params))
        paths = [path for path, view in views if view is not None]
        return cls(tuple(paths[:: -(-len(paths) // _MATRICES)]), rank)

    def start(self, params: Any) -> list[jax.Array]:
        """Zero bases, which stand for no measurement yet."""
        return [
            jnp.zeros((*leaf.shape[:-1], min(self.rank, *leaf.shape[-2:])))
            for leaf in self._pick(params)
        ]

    @partial(jax.jit, static_argnums=0)
    def measure(
        self, grads: Any, opt_state: Any, bases: list[jax.Array]
    ) -> tuple[dict[str, jax.Array], list[jax.Array]]:
        """Means over the measured matrices, and the bases to compare with next time.

        Returns:
          `overlap` of the leading left singular subspaces of the gradient with those
          of the measurement before, `gradient`, the share of the top 8 singular values
          in the sum of all, and the same share of `first_moment` and `second_moment`
          where `opt_state` holds full ones. Zero where there is nothing to measure
          yet: no basis before, a moment before the first step.
        """
        picked = self._pick(grads)
        # Twenty times cheaper than the vectors of an SVD; the leading ones agree.
        new = [
            lro.linalg.gram_eigh(g, b.shape[-1])[0]
            for g, b in zip(picked, bases, strict=True)
        ]
        overlap = lro.diagnostics.subspace_overlap
        record = {
            "overlap": _mean([overlap(u, b) for u, b in zip(new, bases, strict=True)]),
            "gradient": _mean([_top_share(g) for g in picked]),
        }
        for name, moment in full_moments(opt_state, grads).items():
            record[name] = _mean([_top_share(x) for x in self._pick(moment)])
        return record, new

    def _pick(self, tree: Any) -> list[jax.Array]:
        leaves = dict(jax.tree_util.tree_leaves_with_path(tree))
        return [leaves[path] for path in self.paths]


def full_moments(opt_state: Any, params: Any) -> dict[str, Any]:
    """The moments that a state keeps at full size, as trees like the parameters.

    Returns:
      `first_moment` and `second_moment`, as far as there are any.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    shapes = {path: jnp.shape(x) for path, x in leaves}
    moments = {}
    for name, field in (("first_moment", "mu"), ("second_moment", "nu")):
        kept = {  # of matrices and of all else in a tree each
            path: x
            for _, tree in optax.tree.get_all_with_path(opt_state, field)
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
            if jnp.shape(x) == shapes.get(path)
        }
        if kept.keys() == shapes.keys():
            moments[name] = treedef.unflatten(kept[path] for path in shapes)
    return moments


def _top_share(x: jax.Array) -> jax.Array:
    return lro.diagnostics.singular_value_ratio(x, LEADING)


def _mean(values: list[jax.Array]) -> jax.Array:
    return jnp.mean(jnp.stack([jnp.mean(value) for value in values]))
