"""Small factorizations of many leaves as one batch.

An algorithm on one matrix is a generator that hands out its small problems,

    q = yield from ask(range_basis, y)

and gets their answers back. Those of all leaves, and of both moments of a leaf, are
driven in step: problems with the same function and shapes are stacked and solved in one
call. So neither the run time nor the compile time of small factorizations grows with
the number of leaves.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Request = tuple[Any, ...]  # (function, *arrays), arrays of shape (*batch, rows, cols)
Steps = Generator[list[Request], Any, Any]


def ask(function: Callable[..., Any], *arrays: jax.Array) -> Steps:
    """One small problem, as an algorithm of its own."""
    (answer,) = yield [(function, *arrays)]
    return answer


def together(*steps: Steps) -> Steps:
    """Several algorithms in step; returns the list of their results."""
    results: list[Any] = [None] * len(steps)
    replies: dict[int, Any] = dict.fromkeys(range(len(steps)))
    while replies:
        requests = {}
        for i, reply in replies.items():
            try:
                requests[i] = steps[i].send(reply)
            except StopIteration as done:
                results[i] = done.value
        if not requests:
            break
        answers = yield [request for own in requests.values() for request in own]
        position, replies = 0, {}
        for i, own in requests.items():
            replies[i] = answers[position : position + len(own)]
            position += len(own)
    return results


def drive(*steps: Steps, count: jax.Array | None = None) -> list[Any]:
    """Run algorithms to their ends, their small problems in common batches.

    Args:
      steps: one for each leaf.
      count: see `places`.
    """
    running = together(*steps)
    answers = None
    with turns():
        try:
            while True:
                answers = _solve(running.send(answers), count)
        except StopIteration as done:
            return done.value


_turns: list[jax.Array | None] = []  # the end of the last turn
_at_once: list[bool] = []


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Let nothing within take turns: the turns are those of what is around it."""
    _at_once.append(True)
    try:
        yield
    finally:
        _at_once.pop()


@contextlib.contextmanager
def turns() -> Iterator[None]:
    """Let what is computed within take turns."""
    _turns.append(None)
    try:
        yield
    finally:
        _turns.pop()


def take_turn(x: Any, dtype: Any) -> jax.Array:
    """A number or an array in a dtype, but not before the turn taken last is over.

    What is computed from it waits, so that the large temporaries of one leaf are gone
    before those of the next one come: fresh memory costs more time than arithmetic.
    """
    x, last = jnp.asarray(x, dtype), _last_turn()
    return x if last is None else after(x, last)


def _last_turn() -> jax.Array | None:
    return _turns[-1] if _turns and not _at_once else None


def end_turn(last: jax.Array) -> None:
    """The turn is over once ``last`` is known, a small array."""
    if _turns:
        _turns[-1] = last


def wait_turn(tree: Any) -> Any:
    """The arrays and keys of a leaf, each of which takes its turn."""

    def wait(x):
        last = _last_turn()
        return x if last is None else after(x, last)

    return jax.tree.map(wait, tree)


def end_turn_of(tree: Any) -> None:
    """The turn is over once all arrays of a leaf are known."""
    arrays = sorted(jax.tree.leaves(tree), key=lambda x: x.size)
    if arrays:
        end_turn(functools.reduce(after, arrays))


def _solve(requests: Sequence[Request], count: jax.Array | None) -> list[Any]:
    def kind(request):
        function, *arrays = request
        return function, tuple((x.shape[-2:], x.dtype) for x in arrays)

    groups: dict[Any, list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(kind(request), []).append(i)
    batches = [x.shape[:-2] for _, x, *_ in requests]
    starts = {}
    for members in groups.values():
        sizes = [math.prod(batches[i]) for i in members]
        starts |= zip(members, itertools.accumulate(sizes, initial=0), strict=False)
    place = places(sorted(set(starts.values())), count)
    answers: list[Any] = [None] * len(requests)
    for members in groups.values():
        function = requests[members[0]][0]
        columns = zip(*(requests[i][1:] for i in members), strict=True)
        solved = function(*(_stack(x) for x in columns))
        for i in members:
            answers[i] = jax.tree.map(_part(place[starts[i]], batches[i]), solved)
    return answers


def _stack(arrays: Sequence[jax.Array]) -> jax.Array:
    # By rows: an axis of one before them would make each array anew for this.
    rows, cols = arrays[0].shape[-2:]
    flat = jnp.concatenate([x.reshape(-1, cols) for x in arrays])
    return flat.reshape(-1, rows, cols)


def _part(start: Any, batch: tuple[int, ...]) -> Callable[..., Any]:
    def part(x):
        taken = jax.lax.dynamic_slice_in_dim(x, start, math.prod(batch))
        return taken.reshape(*batch, *x.shape[1:])

    return part


def unstack(x: jax.Array, count: jax.Array | None) -> list[jax.Array]:
    """The list of ``x[i]``; for ``count`` see `places`."""
    place = places(range(x.shape[0]), count)
    return [jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for i in place.values()]


def places(numbers: Sequence[int], count: jax.Array | None) -> dict[int, Any]:
    """``{number: number}``, on CPU as numbers that are not known when compiling.

    Loops that take parts of a batch at places which they know differ from one another,
    and each takes its time to compile, where those at unknown places are all the same.

    Args:
      numbers: to be made unknown.
      count: any number that is not negative and itself not known; with None, or
        outside of a compilation, nothing is done.
    """
    if not isinstance(count, jax.core.Tracer) or len(numbers) < 3:
        return {i: i for i in numbers}

    def known(count):
        return tuple(jnp.uint32(i) for i in numbers)

    def unknown(count):
        zero = jnp.minimum(count, 0).astype(jnp.uint32)  # which is not known here

        def step(_, values):
            return tuple(x + zero for x in values)

        return jax.lax.fori_loop(jnp.uint32(0), 1 + zero, step, known(count))

    # Elsewhere, a loop of unknown length would wait for the host.
    values = jax.lax.platform_dependent(count, cpu=unknown, default=known)
    return dict(zip(numbers, values, strict=True))


def after(x: jax.Array, dependency: jax.Array) -> jax.Array:
    """``x``, an array or keys, to be computed only once ``dependency`` is known.

    Adds a zero made of it. A data dependence is the one thing that XLA neither merges
    nor reorders: what is computed from the result is not the same expression as before,
    and is not kept alive from then (an optimization barrier does not do this on CPU).
    """
    if not dependency.size:
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = after(jax.random.key_data(x), dependency)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    zero = dependency[(0,) * dependency.ndim] * 0
    return x + jnp.where(zero == 0, zero, 0).astype(x.dtype)
