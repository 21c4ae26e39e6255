"""Thin and small problems of many leaves, in common calls.

Neither the launches, nor the run time of small factorizations, nor the time to compile
them grows with the number of leaves then.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax._src.linalg.meshes import at_once, split_axes

Arrays = Sequence[jax.Array]
T = TypeVar("T")


class Stacks:
    """Problems of equal shapes as stacks: ``(*batch, rows, cols)`` as (N, rows, cols).

    Args:
      problems: for each one its arrays, or anything of their shapes. Those of equal
        shapes behind their batch axes, and of equal dtypes, are one stack. But on a
        mesh each is by itself, as XLA would move those that are split otherwise.
      count: a number that is not known when compiling, see `places`.
    """

    def __init__(self, problems: Sequence[Arrays], count: jax.Array | None):
        def kind(i, arrays):
            alone = i if any(map(split_axes, arrays)) else None
            return alone, *((x.shape[-2:], jnp.dtype(x.dtype)) for x in arrays)

        self._batches = [arrays[0].shape[:-2] for arrays in problems]
        self._members: dict[object, list[int]] = {}
        for i, arrays in enumerate(problems):
            self._members.setdefault(kind(i, arrays), []).append(i)
        self._count = count

    def stack(self, arrays: Arrays) -> list[jax.Array]:
        """One array of each problem, as one array of each stack."""
        return [
            _concatenate([arrays[i] for i in members])
            for members in self._members.values()
        ]

    def owners(self, of: Sequence[int]) -> list[np.ndarray]:
        """For each matrix of each stack, ``of`` the problem that it comes from."""
        return [
            np.concatenate(
                [np.full(math.prod(self._batches[i]), of[i]) for i in members]
            )
            for members in self._members.values()
        ]

    def unstack(self, stacks: Arrays) -> list[jax.Array]:
        """The inverse of `stack`."""
        found: dict[int, jax.Array] = {}
        for members, x in zip(self._members.values(), stacks, strict=True):
            sizes = [math.prod(self._batches[i]) for i in members]
            for i, part in zip(members, _split(x, sizes, self._count), strict=True):
                found[i] = part.reshape(*self._batches[i], *x.shape[1:])
        return [found[i] for i in range(len(found))]


def each(
    function: Callable[..., jax.Array],
    problems: Sequence[Arrays],
    count: jax.Array | None,
) -> list[jax.Array]:
    """``function`` of the arrays of each problem, of a whole stack in one call."""
    return [x for (x,) in each_of_several(lambda *x: (function(*x),), problems, count)]


def each_of_several(
    function: Callable[..., tuple[jax.Array, ...]],
    problems: Sequence[Arrays],
    count: jax.Array | None,
) -> list[tuple[jax.Array, ...]]:
    """`each` of a function that makes several arrays."""
    stacks = Stacks(problems, count)
    columns = [stacks.stack(list(x)) for x in zip(*problems, strict=True)]
    found = [function(*x) for x in zip(*columns, strict=True)]
    found = [at_once(x) for x in zip(*found, strict=True)]
    return list(zip(*map(stacks.unstack, found), strict=True))


def as_parts(tree: T, count: jax.Array | None) -> T:
    """The same arrays; on GPU as parts of copies that are made before all else.

    Where an array is read by what need not come before what overwrites it, XLA copies
    it, each array in a launch of its own: 29 of 238 for MLorc-AdamW on a layer of
    LLaMA-7B. Of stacks there are four, most of which are wanted anyway.
    """
    arrays, structure = jax.tree.flatten(tree)
    if any(map(split_axes, arrays)):
        return tree  # each would be a stack, and a launch, of its own

    def copied(*arrays):
        return each(jax.lax.optimization_barrier, [(x,) for x in arrays], count)

    parts = jax.lax.platform_dependent(
        *arrays, cuda=copied, default=lambda *arrays: list(arrays)
    )
    return structure.unflatten(parts)


def across(
    function: Callable[[jax.Array], jax.Array], stacks: Iterable[jax.Array]
) -> list[jax.Array]:
    """``function`` of each stack, in one call for all whose matrices are of one shape.

    But on a mesh, stacks of more than one matrix are by themselves: each device may
    have some of its matrices, and takes these.

    Args:
      function: of ``(N, k, k)``.
      stacks: arrays of matrices.
    """
    columns = list(stacks)
    groups: dict[object, list[int]] = {}
    for i, x in enumerate(columns):
        alone = i if len(x) > 1 and split_axes(x) else None
        groups.setdefault((alone, x.shape[1:], x.dtype), []).append(i)
    found: dict[int, jax.Array] = {}
    for members in groups.values():
        result = function(_concatenate([columns[i] for i in members]))
        sizes = [columns[i].shape[0] for i in members]
        found |= zip(members, _split(result, sizes, None), strict=True)
    return [found[i] for i in range(len(columns))]


def _concatenate(arrays: list[jax.Array]) -> jax.Array:
    # By matrices: rows and columns may be sharded, and would be moved.
    return jnp.concatenate([x.reshape(-1, *x.shape[-2:]) for x in arrays])


def _split(x: jax.Array, sizes: list[int], count: jax.Array | None) -> list[jax.Array]:
    starts = list(itertools.accumulate(sizes, initial=0))[:-1]
    return [
        jax.lax.dynamic_slice_in_dim(x, start, size)
        for start, size in zip(places(starts, count), sizes, strict=True)
    ]


def places(numbers: list[int], count: jax.Array | None) -> Sequence[jax.Array | int]:
    """The numbers, on CPU and GPU as ones that are not known when compiling.

    On GPU, XLA takes each part of a stack in a launch of its own where it knows that
    they do not overlap, and all of them in one where it does not: which saves 187 of
    1,256 launches of MLorc-AdamW for LLaMA-60M.

    On CPU, loops that take parts at places which they know differ from one another, and
    XLA takes its time to compile each, where those at unknown places are all the same:
    4 instead of 10 seconds for MLorc on the 56 matrices of LLaMA-60M.

    Args:
      numbers: to be made unknown.
      count: any number that is not negative and itself not known; with None, or outside
        of a compilation, nothing is done.
    """
    if not isinstance(count, jax.core.Tracer) or len(numbers) < 3:
        return numbers

    def known(count):
        return tuple(jnp.uint32(i) for i in numbers)

    def zero(count):  # which is not known here
        return jnp.minimum(count, 0).astype(jnp.uint32)

    def moved(count):
        return tuple(x + zero(count) for x in known(count))

    def looped(count):
        def step(_, values):
            return tuple(x + zero(count) for x in values)

        return jax.lax.fori_loop(jnp.uint32(0), 1 + zero(count), step, known(count))

    # On GPU, a loop of unknown length would wait for the host.
    return jax.lax.platform_dependent(count, cpu=looped, cuda=moved, default=known)
