"""How low-rank a matrix is, and how subspaces meet: pure functions for inside jit.

All compute in float32 at least. What is of a matrix works over the last two axes with
any batch axes in front, and gives a number for each; all but ``subspace_overlap`` are
unchanged by scaling, and all are finite for zero input. `state_metrics` looks into the
states of optimizers.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lowrank_optax._src import linalg
from lowrank_optax._src.engines.bases import CODES, bases, entries
from lowrank_optax._src.leaves.box import is_box, value_of
from lowrank_optax._src.leaves.context import record_views
from lowrank_optax._src.leaves.fields import boxed_state
from lowrank_optax._src.leaves.matrix import MatrixView
from lowrank_optax._src.leaves.paths import Path, flatten, labels, path_parts
from lowrank_optax._src.leaves.roles import holder_of, role_of
from lowrank_optax._src.parts.factors import LowRankCode


def _unit_matrix(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """``x`` in float32, scaled so that neither its squares nor their sum overflow."""
    if x.ndim < 2:
        raise ValueError(
            f"Cannot measure the rank of an array of shape {x.shape}: it has no rows "
            "and columns. Pass an array of at least two axes."
        )
    return linalg.unit_scale(x)[0]


def _singular_values(x: Float[Array, "*b m n"]) -> Float[Array, "*b s"]:
    """Descending, up to the scale of ``x``. By the SVD: a Gram matrix loses the tail,
    which the sums below are made of."""
    return _values(_unit_matrix(x))


@linalg.one_by_one
def _values(x: Float[Array, "*b m n"]) -> Float[Array, "*b s"]:
    return jnp.linalg.svd(x, compute_uv=False)


def _sum_squares(x: Float[Array, "*b m n"]) -> Float[Array, "*b"]:
    return jnp.sum(x * x, axis=(-2, -1))


def check_energy(energy: float) -> None:
    """Raises ValueError unless ``energy`` is a share that truncation can keep."""
    if not 0 < energy < 1:
        raise ValueError(
            f"Cannot keep the share {energy} of the energy. Pass a number in (0, 1)."
        )


def tail_energy(s: Float[Array, "*b s"]) -> Float[Array, "*b s"]:
    """``sum_{i >= r} s_i^2`` for every r: what a truncation to rank r leaves out."""
    return linalg.sums_from_end(s * s)


def rank_keeping(s: Float[Array, "*b s"], energy: float) -> Int[Array, "*b"]:
    """The smallest rank whose truncation keeps the share ``energy`` of ``sum s^2``."""
    tail = tail_energy(s)
    return jnp.sum(tail > (1 - energy) * tail[..., :1], axis=-1)


def _share(part: Array, whole: Array) -> Array:
    """``part / whole``, and 0 of nothing."""
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1.0), 0.0)


def _check_same_rows(name: str, a: Array, other: str, b: Array) -> None:
    if min(a.ndim, b.ndim) < 2 or a.shape[-2] != b.shape[-2]:
        raise ValueError(
            f"Cannot compare {name} of shape {a.shape} with {other} of shape "
            f"{b.shape}: both must be matrices with the same number of rows."
        )


def singular_value_ratio(x: Float[Array, "*b m n"], k: int = 8) -> Float[Array, "*b"]:
    """The share of the ``k`` largest singular values in the sum of all of them.

    The measure of MLorc's Figures 1 and 4: 1 for a matrix of rank at most ``k``,
    ``k / min(m, n)`` for an orthogonal one, 0 for zero.

    Args:
      x: ``(*batch, m, n)``.
      k: how many singular values count as the top, at least 1.

    Returns:
      ``(*batch,)`` in [0, 1].

    Raises:
      ValueError: if ``x`` is no matrix or ``k < 1``.

    >>> import jax.numpy as jnp
    >>> float(singular_value_ratio(jnp.eye(16)))
    0.5
    """
    if k < 1:
        raise ValueError(f"Cannot take the top {k} singular values. Pass k >= 1.")
    s = _singular_values(x)
    return _share(jnp.sum(s[..., :k], axis=-1), jnp.sum(s, axis=-1))


def effective_rank(
    x: Float[Array, "*b m n"], *, energy: float | None = None
) -> Float[Array, "*b"]:
    """The effective rank: by entropy, or by a share of the energy to be kept.

    By default that of Roy and Vetterli (2007), ``exp(-sum_i p_i log p_i)`` with
    ``p_i = sigma_i / sum_j sigma_j``: a real number between 1 and the rank, equal to
    the rank where the non-zero singular values are equal. With ``energy``, that of
    AdaRankGrad (equation 2, whose threshold is ``1 - energy``): the smallest ``r`` with
    ``sum_{i > r} sigma_i^2 <= (1 - energy) sum_i sigma_i^2``. Zero has rank 0.

    Args:
      x: ``(*batch, m, n)``.
      energy: share of the squared Frobenius norm to keep, in (0, 1); None (default)
        for the entropy.

    Returns:
      ``(*batch,)`` in [0, min(m, n)]; whole numbers where ``energy`` is given.

    Raises:
      ValueError: if ``x`` is no matrix or ``energy`` is not in (0, 1).

    >>> import jax.numpy as jnp
    >>> print(f"{effective_rank(jnp.eye(4)):.4f}")
    4.0000
    >>> float(effective_rank(jnp.diag(jnp.array([3.0, 2.0, 1.0])), energy=0.9))
    2.0
    """
    if energy is not None:
        check_energy(energy)
    s = _singular_values(x)
    if energy is None:
        return _entropy_rank(s)
    return rank_keeping(s, energy).astype(s.dtype)


def _entropy_rank(s: Float[Array, "*b s"]) -> Float[Array, "*b"]:
    p = _share(s, jnp.sum(s, axis=-1, keepdims=True))
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), -1)
    return jnp.where(s[..., 0] > 0, jnp.exp(entropy), 0.0)


def stable_rank(x: Float[Array, "*b m n"]) -> Float[Array, "*b"]:
    """``||x||_F^2 / ||x||_2^2``: at most the rank, and little moved by noise.

    Args:
      x: ``(*batch, m, n)``.

    Returns:
      ``(*batch,)`` in [1, min(m, n)]; 0 for zero.

    Raises:
      ValueError: if ``x`` is no matrix.

    >>> import jax.numpy as jnp
    >>> float(stable_rank(jnp.diag(jnp.array([2.0, 1.0, 0.0]))))
    1.25
    """
    return _stable_rank(_singular_values(x))


def _stable_rank(s: Float[Array, "*b s"]) -> Float[Array, "*b"]:
    return _share(jnp.sum(s * s, axis=-1), s[..., 0] ** 2)


def subspace_overlap(
    u: Float[Array, "*b m r"], v: Float[Array, "*b m k"]
) -> Float[Array, "*b"]:
    """``||u^T v||_F^2 / r``, the mean squared cosine between subspaces (I3S, eq. 3).

    1 where the span of ``v`` holds that of ``u``, 0 where they are orthogonal, ``k/m``
    in expectation for random ones.

    Args:
      u: ``(*batch, m, r)`` with orthonormal columns (zero columns count as missed).
      v: ``(*batch, m, k)`` with orthonormal columns.

    Returns:
      ``(*batch,)`` in [0, 1].

    Raises:
      ValueError: if ``u`` and ``v`` differ in their rows.

    >>> import jax.numpy as jnp
    >>> float(subspace_overlap(jnp.eye(6)[:, :4], jnp.eye(6)[:, 2:]))
    0.5
    """
    _check_same_rows("u", u, "v", v)
    u, v = linalg.at_least_float32(u), linalg.at_least_float32(v)
    return _sum_squares(linalg.matmul(u.mT, v)) / u.shape[-1]


def captured_energy(
    x: Float[Array, "*b m n"], basis: Float[Array, "*b m r"]
) -> Float[Array, "*b"]:
    """``||basis^T x||_F^2 / ||x||_F^2``: what a projection keeps of a matrix.

    Args:
      x: ``(*batch, m, n)``.
      basis: ``(*batch, m, r)`` with orthonormal columns.

    Returns:
      ``(*batch,)`` in [0, 1]; 0 for zero ``x``.

    Raises:
      ValueError: if ``x`` and ``basis`` differ in their rows.

    >>> import jax.numpy as jnp
    >>> float(captured_energy(jnp.ones((4, 3)), jnp.eye(4)[:, :1]))
    0.25
    """
    _check_same_rows("x", x, "basis", basis)
    x, basis = _unit_matrix(x), linalg.at_least_float32(basis)
    kept = _sum_squares(linalg.matmul(basis.mT, x))
    # Rounding can carry a full basis a few units above 1.
    return jnp.minimum(_share(kept, _sum_squares(x)), 1.0)


def state_metrics(
    opt_state: Any,
    *,
    tx: optax.GradientTransformation | None = None,
    grads: Any = None,
    earlier: Any = None,
    moments: bool = False,
) -> dict[str, Array]:
    """What a low-rank optimizer's state says of its ranks, to be logged with a loss.

    For each basis P (m, r) of a `ProjectState`, wherever it stands in the state:
    ``rank/<path>``, the number of its columns that are not zero. Over all of them:
    ``rank``, the mean weighted with m + n (AdaRankGrad, Section 4; AR-16), and
    ``memory_reduction``, the numbers that a basis and one moment at these ranks have
    less than at the fixed ones, ``sum (r - rank) (m + n)``. The averages over time of
    the paper are those of what is logged. What is asked for comes beside these; of a
    stack, each is the mean over its matrices.

    Args:
      opt_state: any Optax state.
      tx: the transformation of this state, given with ``grads``.
      grads: gradients, or updates, as ``tx`` is given them. Of each that has a basis,
        ``captured_energy/<path>``, see `captured_energy`.
      earlier: a state of before. Of each basis, ``overlap/<path>`` with the one which
        that has in its place: `subspace_overlap` of the columns that are not zero.
      moments: whether to measure first and second moments of two axes or more that are
        stored as they are, or as the factors of MLorc: ``effective_rank/<path>``
        (by entropy) and ``stable_rank/<path>``, the path being that of the field and of
        the parameter. Takes the singular values of each, which is slow at full size.

    Returns:
      ``{name: scalar}`` in float32 at least, without a basis only of the moments.

    Raises:
      ValueError: for one of ``tx`` and ``grads`` without the other.

    >>> import jax.numpy as jnp, optax, lowrank_optax as lro
    >>> tx = lro.adaptive_rank(optax.scale_by_adam(), max_rank=3)
    >>> params = {"w": jnp.ones((4, 6))}
    >>> _, state = tx.update(params, tx.init(params))
    >>> metrics = lro.diagnostics.state_metrics(state)
    >>> {name: int(x) for name, x in metrics.items()}
    {'rank/w': 1, 'rank': 1, 'memory_reduction': 20}
    >>> metrics = lro.diagnostics.state_metrics(
    ...     state, tx=tx, grads=params, earlier=state, moments=True
    ... )
    >>> print(f"{metrics['captured_energy/w']:.3f}, {metrics['overlap/w']:.3f}")
    1.000, 1.000
    >>> print(f"{metrics['stable_rank/mu/w']:.3f}")
    1.000
    """
    if (tx is None) != (grads is None):
        raise ValueError(
            "Cannot measure the captured energy by one of `tx` and `grads` alone: the "
            "transformation tells how the gradients are seen. Pass both."
        )
    metrics, asked, weights, unused = {}, {}, [], []
    seen = {} if tx is None else _seen_by(tx, grads)
    before = {} if earlier is None else {parts: p for parts, p, _ in bases(earlier)}
    found = list(bases(opt_state))
    names = labels([parts for parts, _, _ in found])
    for path, (parts, basis, n) in zip(names, found, strict=True):
        used = jnp.sum(jnp.any(basis != 0, axis=-2), axis=-1).astype(jnp.float32)
        metrics[f"rank/{path}"] = jnp.mean(used)
        weights.append(used.size * (basis.shape[-2] + n))
        unused.append(basis.shape[-1] - metrics[f"rank/{path}"])
        for x in (x for x in seen.get(parts, []) if x.shape[:-1] == basis.shape[:-1]):
            captured = jnp.mean(captured_energy(x, basis))
            asked.setdefault(f"captured_energy/{path}", captured)
        if parts in before:
            share = basis.shape[-1] / jnp.maximum(used, 1)
            overlap = share * subspace_overlap(basis, before[parts])
            asked[f"overlap/{path}"] = jnp.mean(overlap)
    if moments:
        spectra = list(_moments(opt_state))
        names = labels([path for path, _ in spectra])
        for path, (_, s) in zip(names, spectra, strict=True):
            asked[f"effective_rank/{path}"] = jnp.mean(_entropy_rank(s))
            asked[f"stable_rank/{path}"] = jnp.mean(_stable_rank(s))
    if not metrics:
        return asked
    weight = jnp.array(weights, jnp.float32)
    ranks = jnp.stack(list(metrics.values()))
    totals = {
        "rank": jnp.sum(weight * ranks) / jnp.sum(weight),
        "memory_reduction": jnp.sum(weight * jnp.stack(unused)),
    }
    return metrics | totals | asked


def _seen_by(
    tx: optax.GradientTransformation, grads: Any
) -> dict[Path, list[Float[Array, "*b m n"]]]:
    """The gradient of each matrix, in every way that the transformation sees it."""
    with record_views() as views:
        boxed_state(tx, grads)
    paths, leaves, _ = flatten(grads)
    leaf_at = dict(zip(paths, leaves, strict=True))
    seen: dict[Path, list[Array]] = {}
    for view in views:
        if isinstance(view, MatrixView) and is_box(view.source):
            x = view.matrix(value_of(leaf_at[view.source.path]))
            seen.setdefault(view.source.path, []).append(x)
    return seen


def _moments(opt_state: Any) -> Iterator[tuple[Path, Float[Array, "*b s"]]]:
    """Field and parameter of each moment with rows and columns; singular values."""

    def is_moment(key, name):
        return name and role_of(holder_of(opt_state, key, name), name) is not None

    for key, x in entries(opt_state):
        names = [k.name if isinstance(k, jax.tree_util.GetAttrKey) else "" for k in key]
        start = next((i for i, k in enumerate(names) if is_moment(key, k)), None)
        if start is None or "basis" in names[:start]:
            continue
        path = path_parts(key)[start:]
        if isinstance(x, LowRankCode):
            left, right = map(value_of, x)
            q, p = linalg.orthonormalize(left), linalg.orthonormalize(right.mT)
            core = linalg.matmul(linalg.matmul(q.mT, left), linalg.matmul(right, p))
            yield path, _singular_values(core)
        elif not isinstance(x, CODES):
            if getattr(x, "ndim", 0) >= 2:
                yield path, _singular_values(x)
