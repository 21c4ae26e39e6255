"""Random trees, and runs of an optimizer on gradients that are given in advance."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np


def random_like(shapes: Any, seed: int, dtype: Any = jnp.float32) -> Any:
    """Standard normal arrays for a tree of shapes, or of arrays."""
    rng = np.random.default_rng(seed)

    def draw(x):
        shape = x if isinstance(x, tuple) else x.shape
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def random_grads(params: Any, steps: int, seed: int = 1) -> list[Any]:
    """One tree of gradients a step, in the parameters' dtypes."""
    return [
        jax.tree.map(
            lambda p, g: g.astype(p.dtype), params, random_like(params, seed + t)
        )
        for t in range(steps)
    ]


def run(tx, params: Any, grads: list[Any], state: Any = None):
    """``(updates of each step, last state)``, compiled."""
    return run_eagerly(tx._replace(update=jax.jit(tx.update)), params, grads, state)


def run_eagerly(tx, params: Any, grads: list[Any], state: Any = None):
    """`run` without compilation of the update as a whole."""
    state = tx.init(params) if state is None else state
    updates = []
    for g in grads:
        u, state = tx.update(g, state, params)
        updates.append(u)
    return updates, state


def assert_close(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    chex.assert_trees_all_close(a, b, rtol=rtol, atol=atol)


def relative_error(a: Any, b: Any) -> float:
    """Of two arrays, or of two lists of arrays as one: in the Frobenius norm."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree))))
