"""What a user says of which leaves are matrices: `matrices=` in all its forms."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import optax

from lowrank_optax._src.leaves.box import is_boxed, value_of
from lowrank_optax._src.leaves.default import Choice, by_default, default_matrices
from lowrank_optax._src.leaves.matrix import Matrices, MatrixAxes
from lowrank_optax._src.leaves.paths import Path, flatten, path_parts, placeholders


def choices(matrices: Matrices, tree: Any) -> dict[Path, Choice]:
    """What is made of each leaf of a tree of parameters or gradients."""
    if isinstance(matrices, _Rules):
        return matrices.choices(tree)
    if matrices is default_matrices:
        matrices = None
    # A module may be callable and a tree at once; a function is a leaf.
    if callable(matrices) and jax.tree_util.all_leaves([matrices]):
        return choices(matrices(tree), tree)
    if matrices is None or isinstance(matrices, MatrixAxes):
        return by_default(tree, matrices)
    return _by_path(matrices, tree)


def _by_path(specs: Any, tree: Any) -> dict[Path, Choice]:
    """The choices of a tree of specs, and the default rule's where it names nothing."""
    given = _specs(specs)
    result = by_default(tree)
    axes = {path: x for path, x in given.items() if x is not None}
    nothing = {path for path, x in given.items() if x is None}
    left_out = placeholders(tree)
    there = [*result, *left_out]
    # A None may stand for all below it, as a placeholder does.
    unknown = set(axes) - set(there)
    unknown |= nothing - {start for path in there for start in _starts(path)}
    unknown = {path for path in unknown if left_out.keys().isdisjoint(_starts(path))}
    if result and unknown:
        raise ValueError(
            f"`matrices` names {sorted('/'.join(p) for p in unknown)}, which the tree "
            f"does not have. It has {['/'.join(p) for p in list(result)[:10]]}."
        )
    for path in result:
        if path in axes:
            result[path] = Choice(axes[path], asked=True)
        elif not nothing.isdisjoint(_starts(path)):
            result[path] = _ASKED_TO_BE_DENSE
    return result


def _starts(path: Path) -> list[Path]:
    """A path, and those of all that it is in."""
    return [path[:length] for length in range(len(path) + 1)]


_ASKED_TO_BE_DENSE = Choice(None, "`matrices` has None for it", asked=True)


def _specs(specs: Any) -> dict[Path, MatrixAxes | None]:
    flat, _ = jax.tree_util.tree_flatten_with_path(
        specs,
        is_leaf=lambda x: x is None or isinstance(x, MatrixAxes) or is_boxed(x),
    )
    result = {path_parts(key): value_of(x) for key, x in flat}
    for path, axes in result.items():
        if axes is not None and not isinstance(axes, MatrixAxes):
            raise TypeError(
                f"`matrices` holds {axes!r} at '{'/'.join(path)}'; its leaves must be "
                "MatrixAxes or None."
            )
    return result


@dataclasses.dataclass(frozen=True)
class _Rules:
    """See `matrix_rules`."""

    rules: tuple[tuple[re.Pattern[str], MatrixAxes | None], ...]
    otherwise: Matrices

    def __call__(self, params: Any) -> Any:
        treedef = flatten(params)[2]
        return treedef.unflatten(x.axes for x in self.choices(params).values())

    def choices(self, tree: Any) -> dict[Path, Choice]:
        result = choices(self.otherwise, tree)
        self._check_all_match(result, placeholders(tree))
        for path in result:
            for pattern, axes in self.rules:
                if pattern.search("/".join(path)):
                    result[path] = Choice(axes, _ASKED_TO_BE_DENSE.why, asked=True)
                    break
        return result

    def _check_all_match(self, paths: Iterable[Path], left_out: Mapping[Path, Any]):
        # A mask may have left out a whole branch, of whose leaves nothing is known.
        branches = any(isinstance(x, optax.MaskedNode) for x in left_out.values())
        seen = ["/".join(path) for path in (*paths, *left_out)]
        idle = [
            pattern.pattern
            for pattern, _ in self.rules
            if not any(map(pattern.search, seen))
        ]
        if idle and seen and not branches:
            raise ValueError(
                f"No parameter has a path in which {idle} of `matrix_rules` is found. "
                f"The tree has {seen[:10]}."
            )


def matrix_rules(
    rules: Mapping[str, MatrixAxes | None],
    otherwise: Matrices = default_matrices,
) -> Callable[[Any], Any]:
    """Which leaves are matrices, by regular expressions for their paths.

    Args:
      rules: for each expression, searched in the path with its parts joined by ``/``,
        rows and columns of the leaves, or None to keep them at full rank. Of several
        that are found in a path, the first counts.
      otherwise: of the leaves that no rule names, in any form that ``matrices`` has;
        by default `default_matrices`.

    Returns:
      A function to be given as ``matrices=``.

    Raises:
      TypeError: if a rule is not `MatrixAxes` or None.
      ValueError: for an expression that does not compile and, at ``init``, for one
        that is found in no path, unless a mask has left out parameters.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> rules = lro.matrix_rules({"experts": lro.MatrixAxes(), "gate": None})
    >>> rules({"experts": jnp.ones((3, 4, 6)), "gate": jnp.ones((4, 3))})
    {'experts': MatrixAxes(rows=-2, cols=-1), 'gate': None}
    """
    compiled = []
    for expression, axes in rules.items():
        if axes is not None and not isinstance(axes, MatrixAxes):
            raise TypeError(
                f"`matrix_rules` has {axes!r} for {expression!r}; it must be "
                "MatrixAxes or None."
            )
        try:
            compiled.append((re.compile(expression), axes))
        except re.error as error:
            raise ValueError(
                f"`matrix_rules` cannot read {expression!r} as a regular expression: "
                f"{error}."
            ) from error
    return _Rules(tuple(compiled), otherwise)
