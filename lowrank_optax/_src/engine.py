"""What the three engines share: the wrapper of a transformation, the look into a state.

Boxes (NNX variables) and meshes of explicit axes are handled here and in
`MatrixView.full`, and nowhere else.
"""

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowrank_optax._src import batching, matrix, stack, trees
from lowrank_optax._src.box import ParamBox, is_box

Where = tuple[str, int]  # a field of a state, and the number of a parameter's leaf


def transformation(
    init: Callable[..., Any], update: Callable[..., tuple[Any, Any]]
) -> optax.GradientTransformationExtraArgs:
    """An optax transformation from an ``init`` and an ``update`` over plain arrays.

    ``update`` never sees boxes, and on a mesh of explicit axes runs with automatic
    ones; what it returns has the structure, boxes and shardings of what came in.
    """

    def update_fn(updates, state, params=None, **extra):
        plain = [_unbox(x) for x in (updates, state, params, extra)]

        def run(updates, state, params, extra):
            return update(updates, state, params, **extra)

        new = _with_auto_axes(run, *plain)
        for result, given in zip(new, plain[:2], strict=True):
            if jax.tree.structure(result) != jax.tree.structure(given):
                raise ValueError(
                    "A transformation changed the structure of its updates or state: "
                    f"{jax.tree.structure(given)} became {jax.tree.structure(result)}."
                )
        return tuple(
            jax.tree.unflatten(jax.tree.structure(old), jax.tree.leaves(x))
            for old, x in zip((updates, state), new, strict=True)
        )

    return optax.GradientTransformationExtraArgs(init, update_fn)


def _unbox(tree: Any) -> Any:
    return jax.tree.map(matrix.value_of, tree, is_leaf=matrix.is_variable)


def _with_auto_axes(run: Any, *args: Any) -> Any:
    """``run(*args)``, its two results sharded as the first two arguments came in."""
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, args[:2])
    if any(matrix.explicit_axes(s.mesh) for s in jax.tree.leaves(shardings)):
        run = jax.sharding.auto_axes(run, out_sharding=shardings)
    return run(*args)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile ``function(parts, *arrays)`` once for equal parts and equal shapes.

    Leaves of equal shape share one body, and so do the transformations that
    `optax.inject_hyperparams` makes anew at every update: numbers in the parts (frozen
    dataclasses, nested at will) that are arrays become arguments.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def body(skeleton, numbers, *args):
        return function(_fill(skeleton, numbers), *args)

    @functools.wraps(function)
    def call(parts, *args):
        numbers: list[Any] = []
        return body(_empty(parts, numbers), numbers, *args)

    return call


@dataclasses.dataclass(frozen=True)
class _Hole:
    number: int


def _rebuild(part: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(part, tuple):
        return tuple(_rebuild(x, change) for x in part)
    if not dataclasses.is_dataclass(part) or isinstance(part, (type, _Hole)):
        return change(part)
    new = object.__new__(type(part))  # validated when it was made
    for field in dataclasses.fields(part):
        value = _rebuild(getattr(part, field.name), change)
        object.__setattr__(new, field.name, value)
    return new


def _empty(parts: Any, numbers: list[Any]) -> Any:
    def take(x):
        if not isinstance(x, (jax.Array, np.ndarray)):
            return x
        numbers.append(x)
        return _Hole(len(numbers) - 1)

    return _rebuild(parts, take)


def _fill(skeleton: Any, numbers: list[Any]) -> Any:
    return _rebuild(
        skeleton, lambda x: numbers[x.number] if isinstance(x, _Hole) else x
    )


class StateFields:
    """The fields of an optimizer's state that mirror the parameters' tree.

    Found by initialising the optimizer, for its shapes alone, with every parameter in
    a box of its path: wherever a box comes out again, it is that parameter's entry of
    a field. So masks, labels and partitions inside are followed as they are. What
    stands below a parameter's place, as in a code, is a field of its own, "mu.left".
    """

    def __init__(self, inner: optax.GradientTransformation):
        self._inner = inner
        self._layouts: dict[Any, Layout] = {}

    def layout(self, tree: Any) -> "Layout":
        """Where the fields are, for parameters (or their shapes) like ``tree``."""
        flat, treedef = jax.tree_util.tree_flatten_with_path(
            tree, is_leaf=matrix.is_variable
        )
        values = [matrix.value_of(x) for _, x in flat]
        shapes = tuple((tuple(x.shape), jnp.dtype(x.dtype)) for x in values)
        within = accumulating() is not None, stack.parts()
        seen = (treedef, shapes, trees.limits(), *within)
        if seen not in self._layouts:
            boxes = [
                ParamBox(jax.ShapeDtypeStruct(*shape), path=str(i))
                for i, shape in enumerate(shapes)
            ]
            with trees.quietly():
                # A function of its own, or JAX would answer for other limits.
                state = jax.eval_shape(
                    lambda params: self._inner.init(params), treedef.unflatten(boxes)
                )
            # An inner mask may have left out what is in the box.
            state = jax.tree.map(
                lambda x: x.value if is_box(x) and not hasattr(x.value, "shape") else x,
                state,
                is_leaf=is_box,
            )
            found, structure = jax.tree_util.tree_flatten_with_path(
                state, is_leaf=is_box
            )
            self._layouts[seen] = Layout(
                structure,
                [_field(k, x, [path for path, _ in flat]) for k, x in found],
                {i: x for i, (_, x) in enumerate(found)},
                _masked_fields(state, {tuple(path) for path, _ in flat}),
            )
        return self._layouts[seen]


def _field(key_path: Any, entry: Any, paths: list[Any]) -> Where | None:
    if not is_box(entry):
        return None
    leaf = int(entry.path)
    path = tuple(paths[leaf])
    for end in range(len(key_path), len(path) - 1, -1):
        start = end - len(path)
        if tuple(key_path[start:end]) == path:
            field = "/".join(trees.path_parts(key_path[:start]))
            return ".".join((field, *trees.path_parts(key_path[end:]))), leaf
    return None


def _masked_fields(state: Any, paths: set[Any]) -> list[str]:
    """Fields in which some parameter, or each of them, has no entry."""

    def left_out(x):
        return isinstance(x, optax.MaskedNode)

    entries, _ = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda x: is_box(x) or left_out(x)
    )
    starts = (
        key_path[:start]
        for key_path, x in entries
        if left_out(x)
        for start in range(len(key_path))
        if tuple(key_path[start:]) in paths
    )
    return ["/".join(trees.path_parts(start)) for start in starts]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each parameter's entries stand in a state, see `StateFields`."""

    structure: Any
    where: list[Where | None]
    found: dict[int, Any]
    masked: list[str]

    @property
    def names(self) -> list[str]:
        """Paths of the fields within the state, such as ``"0/mu"``."""
        return list(dict.fromkeys([*(w[0] for w in self.where if w), *self.masked]))

    @property
    def abstract(self) -> dict[Where, Any]:
        """Shape and dtype of each entry as the optimizer makes it."""
        entries = ((w, self.found[i].value) for i, w in enumerate(self.where) if w)
        return dict(entries)

    def get(self, state: Any) -> dict[Where, Any]:
        """What stands at each parameter's place in each field."""
        entries = self.structure.flatten_up_to(state)
        return {w: x for w, x in zip(self.where, entries, strict=True) if w}

    def set(self, state: Any, values: dict[Where, Any]) -> Any:
        """The state with other values at some places."""
        entries = self.structure.flatten_up_to(state)
        placed = zip(self.where, entries, strict=True)
        return self.structure.unflatten(
            [values.get(w, x) if w else x for w, x in placed]
        )


def fit_boxes(layout: Layout, state: Any, tree: Any) -> Any:
    """The state without annotations that do not fit, as factored moments inherit them.

    An optimizer that keeps something of another shape than its parameter leaves it in
    the parameter's box, whose sharding would be that of another array. It stays if it
    says something else than the parameter's, or if the axes that it splits are alike.
    """
    leaves = trees.flatten(tree)[1]

    def fit(where, x):
        source = leaves[where[1]]
        if not matrix.is_variable(x):
            return x
        annotations = (y.get_metadata().get("out_sharding") for y in (x, source))
        shape, own = x.get_value().shape, source.get_value().shape
        split = [a is not None for a in matrix.leaf_spec(source)[0] or ()]
        alike = len(shape) == len(own) and all(
            i == j for i, j, s in zip(shape, own, split, strict=False) if s
        )
        if alike or len(set(annotations)) > 1:
            return x
        return x.replace(x.get_value(), out_sharding=None)

    return layout.set(state, {w: fit(w, x) for w, x in layout.get(state).items()})


_phases: list[str] = []


def accumulating() -> str | None:
    """What `accumulate_gradients` asks of the engine inside of it, see there."""
    return _phases[-1] if _phases else None


@contextlib.contextmanager
def accumulation(phase: str) -> Iterator[None]:
    """Let transformations within take their part in the sum of several gradients."""
    _phases.append(phase)
    try:
        yield
    finally:
        _phases.pop()


def increment(step: jax.Array) -> jax.Array:
    """The next step; stays at the largest int32 instead of wrapping around."""
    return jnp.asarray(optax.safe_increment(step))


def last(name: str) -> str:
    """The field's own name at the end of its path."""
    return name.rpartition("/")[2]


def part_of_code(name: str) -> bool:
    """Whether a field is an array of a code, such as "inner_state/mu.left"."""
    return "." in last(name)


def where(accept: jax.Array, new: Any, old: Any) -> Any:
    """``new`` where a scalar (or a predicate a matrix) accepts it, else ``old``."""

    def pick(x, y):
        mask = accept.reshape(accept.shape + (1,) * (x.ndim - accept.ndim))
        return jnp.where(mask, x, y)

    return jax.tree.map(pick, new, old)


def finite(tree: Any) -> jax.Array:
    """Whether every array is finite."""
    each = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.stack(each).all() if each else jnp.array(True)


def accept(new: Any, old: Any, direction: jax.Array | None = None) -> Any:
    """``new`` if every array of it is finite, else ``old``: bad input never sticks.

    What else is made of the old state, as the direction is, must come before the new
    one, which then can take its place in memory.
    """
    ok = finite(new)
    return where(ok if direction is None else batching.after(ok, direction), new, old)


def check_number(value: Any, name: str) -> None:
    """Refuse a schedule where a number belongs, and say where it is taken."""
    if callable(value):
        raise TypeError(
            f"`{name}` must be a number, got the function {value!r}. For a schedule "
            "use lowrank_optax.inject_hyperparams, as in "
            f"inject_hyperparams(galore_adamw)(learning_rate=0.01, {name}=schedule)."
        )


def check_rank(rank: Any, name: str = "rank") -> int:
    """A rank as a positive int, or an error that says what would be right."""
    try:
        # An array of JAX would be concrete here, and not in an update.
        wrong = isinstance(rank, (bool, jax.Array))
        number = None if wrong else operator.index(rank)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(
            f"`{name}` must be a Python int, as it decides shapes; got {rank!r} of "
            f"type {type(rank).__name__}. To inject hyperparameters, use "
            "lowrank_optax.inject_hyperparams, which keeps it static."
        )
    if number < 1:
        raise ValueError(f"`{name}` must be at least 1, got {number}.")
    return number
