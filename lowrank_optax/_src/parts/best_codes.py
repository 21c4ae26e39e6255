"""The best low-rank codes of matrices that are known by their sketches."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lowrank_optax._src import linalg
from lowrank_optax._src.linalg import matmul
from lowrank_optax._src.linalg.meshes import at_once
from lowrank_optax._src.linalg.products import kept_apart, of_unit_length
from lowrank_optax._src.linalg.thin import Arrays, Stacks, across
from lowrank_optax._src.parts.factors import LowRankCode

Sketch = tuple[Array, Array]  # y = A Omega T, its columns near one, and z = y^T A
Factors = tuple[Array, Array]  # of a code
Scaled = tuple[Array, Array]  # a matrix near one, and its scale


def best_codes(
    found: Sequence[Sketch],
    olds: Sequence[LowRankCode],
    leaf: Sequence[int] | None,
    count: Array | None,
) -> list[LowRankCode]:
    """The best codes of ``Q Q^T A``, of the old codes' ranks, for many matrices.

    ``Q`` spans the range of a sketch ``y``, and ``z = y^T A``: with ``Q = y T``,
    ``Q^T A = T^T z``. All that is factored are matrices of the sketch's width, those of
    all problems together. It is the second of two rounds: see `low_rank.sketches` for
    the first, whose Gram matrix does not tell directions below 1e-3 of a column from
    noise.

    Args:
      found: sketches.
      olds: the codes to be replaced. They stay where a new one of the same leaf is not
        finite, as the moments of a leaf belong together.
      leaf: to which leaf each belongs; None to accept all.
      count: see `thin.places`.
    """
    if not found:
        return []
    problems = [(*sketch, *old) for sketch, old in zip(found, olds, strict=True)]
    stacks = Stacks(problems, count)
    y, z, *old = (stacks.stack(list(x)) for x in zip(*problems, strict=True))
    white = across(linalg.whitening, at_once(map(linalg.gram, y)))
    bs = [matmul(t.mT, x) for t, x in zip(white, z, strict=True)]
    units = list(map(linalg.unit_scale, bs, at_once(map(linalg.magnitude, bs))))
    grams = at_once(linalg.gram(b.mT) for b, _ in units)
    vectors = across(lambda s: linalg.eigh(s)[1], grams)
    left, right = old
    turns = list(map(matmul, white, vectors))
    codes, finite = _codes(y, turns, units, vectors, right)
    if leaf is not None:
        # As stacks, or each new factor would be copied to its old place.
        pairs = list(zip(kept_apart(left), right, strict=True))
        codes = _accept(codes, finite, pairs, stacks.owners(leaf))
    factors = (stacks.unstack(list(x)) for x in zip(*codes, strict=True))
    return list(map(LowRankCode, *factors))


def _accept(codes, finite, olds, owners) -> list[Factors]:
    """The new codes of the leaves of which all are finite, else the old ones."""
    if all(len(set(of)) == 1 for of in owners):
        # One leaf a stack, as on a mesh, where its predicates are on many devices.
        whole: dict[int, Array] = {}
        for of, ok in zip(owners, finite, strict=True):
            whole[of[0]] = whole.get(of[0], True) & jnp.all(ok)
        return [
            (jnp.where(whole[of[0]], a, x), jnp.where(whole[of[0]], b, y))
            for of, (a, b), (x, y) in zip(owners, codes, olds, strict=True)
        ]
    owner = np.concatenate(owners)
    leaves = jnp.ones(int(owner.max(initial=-1)) + 1, jnp.int32)
    ok = leaves.at[owner].min(jnp.concatenate(finite).astype(jnp.int32))[owner] > 0
    kept, start = [], 0
    for code, old in zip(codes, olds, strict=True):
        here = ok[start : start + len(code[0])][:, None, None]
        kept.append(
            tuple(jnp.where(here, x, y) for x, y in zip(code, old, strict=True))
        )
        start += len(code[0])
    return kept


def _codes(
    ys: Arrays, turns: Arrays, units: Sequence[Scaled], vectors: Arrays, olds: Arrays
) -> tuple[list[Factors], list[Array]]:
    """Both factors of ``Q W_r (W_r^T b) scale``, with ``Q W = y turn``.

    And whether they are finite: all numbers of b are in the lengths of its rows, and
    columns of y are of norm one, or have made b what is not finite.

    Args:
      ys, turns: see above.
      units: ``(b, scale)``.
      vectors: W.
      olds: the right factors before.
    """
    leading = [w[..., : old.shape[-2]] for w, old in zip(vectors, olds, strict=True)]
    bs, scales = zip(*units, strict=True)
    rights = [matmul(w.mT, b) for w, b in zip(leading, bs, strict=True)]
    overlaps = (matmul(old, x.mT) for old, x in zip(olds, rights, strict=True))
    sums = at_once([*map(_squares, rights), *overlaps])
    squares, overlaps = sums[: len(rights)], sums[len(rights) :]
    norms = list(map(_used_norms, squares))
    lengths = [jnp.where(n > 0, n, jnp.inf) for n in norms]
    rights = [x / n for x, n in zip(rights, lengths, strict=True)]
    overlaps = [x / n.mT for x, n in zip(overlaps, lengths, strict=True)]
    rights = _with_spare(rights, norms, olds, overlaps)
    each = zip(turns, norms, scales, strict=True)
    turns = [t[..., : n.shape[-2]] * n.mT * scale for t, n, scale in each]
    finite = [
        jnp.all(jnp.isfinite(x), (-2, -1)) & jnp.all(jnp.isfinite(y), (-2, -1))
        for x, y in zip(squares, turns, strict=True)
    ]
    return list(zip(map(matmul, ys, turns), rights, strict=True)), finite


def _used_norms(squares: Array) -> Array:
    """Norms of rows by their squares; zero for those that are noise."""
    # The root only of what is not zero, where it has no derivative.
    some = jnp.where(squares > 0, squares, 1.0)
    norms = jnp.where(squares > 0, jnp.sqrt(some), 0.0)
    return jnp.where(norms > 1e-7 * jnp.max(norms, axis=-2, keepdims=True), norms, 0.0)


def _with_spare(
    rights: Arrays, norms: Arrays, olds: Arrays, overlaps: Arrays
) -> list[Array]:
    """Unit rows, of which those that are not used look where the others do not.

    A zero row would be a column lost to the next sketch. ``overlaps`` are those of the
    old rows with the new ones.
    """
    each = zip(olds, overlaps, rights, strict=True)
    spares = [old - matmul(overlap, right) for old, overlap, right in each]
    found = []
    squares = at_once(map(_squares, spares))
    for right, norm, x, square in zip(rights, norms, spares, squares, strict=True):
        spare = of_unit_length(x, square)
        found.append(kept_apart(jnp.where(norm > 0, right, spare)))
    return found


def _squares(rows: Array) -> Array:
    return jnp.sum(rows * rows, axis=-1, keepdims=True)
