"""Less memory for ranks that are no longer used."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._src.engines.bases import bases
from lowrank_optax._src.leaves.context import limited_ranks
from lowrank_optax._src.leaves.fields import abstract_state
from lowrank_optax._src.leaves.paths import Path, flatten
from lowrank_optax._src.leaves.placing import unsplit
from lowrank_optax._src.parts.checks import check_rank


def shrink(
    tx: optax.GradientTransformation,
    opt_state: Any,
    params: Any,
    multiple_of: int = 8,
) -> tuple[Any, Any]:
    """Free the memory of basis columns that are zero, and of their moments.

    For the host, or for each of several, between steps: it looks at the ranks, cuts
    each matrix' basis and moments to the next multiple, and hands back a transformation
    for them, whose updates are compiled anew for the new shapes. Training goes on as it
    would have: bases are still chosen at the full rank and then cut. Only a rank that
    would grow beyond what is left is held there; so much does ``multiple_of`` leave for
    it. (And factored second moments average over fewer rows, which changes them for a
    while.)
    Drop the old state, or nothing is freed. What a checkpoint of it looks like is
    ``jax.eval_shape(tx.init, params)`` of the new transformation; for what is restored
    from one, `fit` makes that transformation again.

    Args:
      tx: any Optax transformation with `adaptive_rank` or the like in it; chains and
        wrappers included.
      opt_state: its state, of concrete arrays.
      params: arrays or abstract ones.
      multiple_of: ranks are rounded up to a multiple, so that few shapes occur.

    Returns:
      ``(tx, opt_state)``. Matrices whose basis is still unset keep their rank, and so
      do those whose moments would be stored in another form at the new one.

    Raises:
      TypeError, ValueError: for ``multiple_of`` below 1 or not an int.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = lro.adaptive_rank(optax.scale_by_adam(), max_rank=4)
    >>> params = {"w": jnp.ones((6, 8))}
    >>> _, state = tx.update(params, tx.init(params))  # ones are of rank 1
    >>> tx, state = lro.rank.shrink(tx, state, params, multiple_of=2)
    >>> state.basis["w"].shape, state.inner_state.mu["w"].shape
    ((8, 2), (2, 6))
    >>> updates, state = tx.update(params, state)
    """
    check_rank(multiple_of, "multiple_of")
    ranks: dict[Path, int] = {}
    own = set(flatten(params)[0])
    for path, basis, _ in bases(opt_state):
        if path not in own:  # a part of a code
            continue
        last = int(_columns_in_use(basis)) or basis.shape[-1]
        multiple = min(-(-last // multiple_of) * multiple_of, basis.shape[-1])
        ranks[path] = max(multiple, ranks.get(path, 0))

    def shapes(ranks):
        return abstract_state(_limited(tx, ranks), params)

    def fits(ranks):
        return jax.tree.structure(shapes(ranks)) == jax.tree.structure(opt_state)

    if not fits(ranks):
        ranks = {path: r for path, r in ranks.items() if fits({path: r})}
    cut = jax.tree.map(lambda x, y: leading(x, y.shape), opt_state, shapes(ranks))
    return _limited(tx, ranks), cut


def fit(
    tx: optax.GradientTransformation, opt_state: Any
) -> optax.GradientTransformationExtraArgs:
    """The transformation for a state that `shrink` has cut, as one of a checkpoint.

    Args:
      tx: that whose state was cut.
      opt_state: the state, its arrays concrete or abstract.

    Returns:
      ``tx`` with no basis wider than in the state.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = lro.adaptive_rank(optax.scale_by_adam(), max_rank=4)
    >>> params = {"w": jnp.ones((6, 8))}
    >>> _, state = tx.update(params, tx.init(params))
    >>> _, saved = lro.rank.shrink(tx, state, params, multiple_of=2)
    >>> updates, state = lro.rank.fit(tx, saved).update(params, saved)
    """
    ranks: dict[Path, int] = {}
    for path, basis, _ in bases(opt_state):
        ranks[path] = max(basis.shape[-1], ranks.get(path, 0))
    return _limited(tx, ranks)


def _limited(
    tx: optax.GradientTransformation, ranks: Mapping[Path, int]
) -> optax.GradientTransformationExtraArgs:
    def init(params):
        with limited_ranks(ranks):
            return tx.init(params)

    def update(updates, state, params=None, **extra):
        with limited_ranks(ranks):
            return tx.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


@jax.jit
def _columns_in_use(basis: jax.Array) -> jax.Array:
    """The columns up to the last that is not zero, as all stay in their places.

    One number, which every host knows, as it may have no more than a part of the basis.
    """
    used = jnp.any(basis != 0, axis=tuple(range(basis.ndim - 1)))
    return jnp.max(jnp.where(used, jnp.arange(1, basis.shape[-1] + 1), 0))


def leading(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The leading part of ``x`` of this shape; ``x`` itself where that is all."""
    if x.shape == shape:
        return x
    x = unsplit(jnp.asarray(x), [i != j for i, j in zip(x.shape, shape, strict=True)])
    return x[tuple(map(slice, shape))]
