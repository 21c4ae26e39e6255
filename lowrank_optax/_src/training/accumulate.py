"""Gradient accumulation in the subspace: sums of (r, n) instead of (m, n)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._src.engines.accumulation import AccumulateState, refused
from lowrank_optax._src.leaves.box import is_box
from lowrank_optax._src.leaves.context import accumulation, averaging, quietly
from lowrank_optax._src.leaves.fields import boxed_state
from lowrank_optax._src.leaves.paths import flatten
from lowrank_optax._src.leaves.transformation import transformation
from lowrank_optax._src.parts.checks import check_range


def accumulate_gradients(
    tx: optax.GradientTransformation, every: int
) -> optax.GradientTransformationExtraArgs:
    r"""Update once in several steps, by the mean of their projected gradients.

    For gradients G_1, ..., G_k of micro-batches, and the basis P of a matrix, which is
    chosen by G_1 if a refresh is due and stays for the window:

    .. math::
      S \leftarrow S + P^\top G_i, \quad
      N = \rho(S / k), \quad \Delta = s\,P N \text{ at the last, else } 0

    With a basis that is given this is the update by the mean gradient itself. Kept
    are, beside the state of ``tx``, ``r n`` numbers a matrix where `optax.MultiSteps`
    keeps ``m n``, and the whole sum of each leaf that is not a matrix. Steps, periods
    and schedules inside ``tx`` count windows.

    In a chain, what comes after the projection (weight decay, learning rate) acts once,
    at the end of a window. What comes before it acts on each micro-batch's gradient, as
    the whole sum is never known: ``clip_by_global_norm`` bounds each of them.

    Args:
      tx: `project_gradients` or what is made of it, alone or inside of chains and
        wrappers, with a recovery that needs no full gradient (`Drop`).
      every: k, gradients a window.

    Returns:
      A transformation whose updates are zero but at the last step of each window. Its
      state is that of ``tx``, with an `AccumulateState` for each `ProjectState`.

    Raises:
      ValueError: for ``every`` below 1; at init, for a ``tx`` that projects no
        gradients, leaves some of the parameters to others, keeps moments before the
        projection, or recovers more than is projected.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = lro.accumulate_gradients(lro.galore_adamw(1e-2, rank=2), every=2)
    >>> params = {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}
    >>> state = tx.init(params)
    >>> state[0].total["w"].shape, state[0].inner_state.basis["w"].shape
    ((2, 6), (4, 2))
    >>> for _ in range(2):
    ...     updates, state = tx.update(params, state, params)
    ...     print(float(abs(updates["b"]).max()) > 0)
    False
    True
    """
    check_range(every, "every", 1)
    tx = optax.with_extra_args_support(tx)

    def init(params):
        with accumulation("start"):
            with quietly():
                check_engines(boxed_state(tx, params), params)
            return tx.init(params)

    def update(updates, state, params=None, **extra):
        with accumulation("add"):
            _, added = tx.update(updates, state, params, **extra)
        state = _within(state, added)

        def finish():
            with accumulation("finish"):
                ended, new = tx.update(updates, state, params, **extra)
            return ended, _recounted(new, state)

        def wait():
            shapes, _ = jax.eval_shape(finish)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), state

        return jax.lax.cond(_sums(state)[0].count >= every, finish, wait)

    return transformation(init, update)


def check_engines(state: Any, params: Any) -> None:
    """Refuse what does not see all gradients by projections alone.

    By its state in `accumulation`, with each entry in a box of its parameter.
    """
    sums = _sums(state)
    if not sums:
        classes = {type(x).__name__: None for x in _named_tuples(state)}
        other = (
            f"an optimizer of the state {', '.join(classes) or type(state).__name__}"
        )
        raise refused(other, "gradients in a subspace, as project_gradients has them")

    def whole(x):
        return _is_sum(x) or is_box(x) or isinstance(x, optax.AddNoiseState)

    entries = jax.tree.leaves(state, is_leaf=whole)
    for x in entries[: next(i for i, x in enumerate(entries) if _is_sum(x))]:
        if isinstance(x, optax.AddNoiseState) and averaging() is None:
            need = "that nothing before the projection changes within a window"
            remedy = "Put it before accumulate_gradients."
            raise refused("optax.add_noise", need, remedy)
        if is_box(x):
            other = f"moments of '{'/'.join(x.path)}' that come before the projection"
            raise refused(other, "that only the projection depends on the gradients")
    summed = {
        box.path
        for x in sums
        for box in jax.tree.leaves(x.total, is_leaf=is_box)
        if is_box(box)
    }
    for parts in flatten(params)[0]:
        if parts not in summed:
            path = "/".join(parts)
            need = "every parameter inside of project_gradients"
            remedy = "Put it around the parts of a mask or a partition, each by itself."
            raise refused(f"the parameter '{path}' outside of it", need, remedy)


def _is_sum(x: Any) -> bool:
    return isinstance(x, AccumulateState)


def _is_count(x: Any) -> bool:
    return isinstance(x, optax.ApplyIfFiniteState)


def _recounted(state: Any, counts: Any) -> Any:
    """The state with the counts of another one: the same gradient counts only once."""

    def with_counts(x, y):
        if not _is_count(x):
            return x
        return y._replace(inner_state=_recounted(x.inner_state, y.inner_state))

    return jax.tree.map(with_counts, state, counts, is_leaf=_is_count)


def _within(state: Any, added: Any) -> Any:
    """The state after a step that ends no window: nothing moves but the engines.

    And what counts the gradients that are not finite, as it has to see each of them.
    """

    def counts(x):
        return _is_sum(x) or _is_count(x)

    def kept(old, new):
        if _is_count(new):
            return new._replace(inner_state=_within(old.inner_state, new.inner_state))
        return new if _is_sum(new) else old

    return jax.tree.map(kept, state, added, is_leaf=counts)


def _sums(state: Any) -> list[AccumulateState]:
    return [x for x in jax.tree.leaves(state, is_leaf=_is_sum) if _is_sum(x)]


def _named_tuples(state: Any) -> list[Any]:
    """The outermost states inside of chains, which are plain tuples."""
    found = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "_fields"))
    return [x for x in found if hasattr(x, "_fields")]
