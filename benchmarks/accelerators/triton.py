"""What a Triton kernel loads and stores, by going through it for all of its programs.

The numbers that decide where a tile lies and which branch is taken (the number of the
program, the counter of a loop, and what is computed from them) are followed in NumPy,
for all programs of the grid at once. So a tile that goes beyond an edge counts what is
there, one that is wholly beyond nothing, and a branch where it is taken. Where a number
depends on data, a tile counts as a whole one, and a conditional as its dearest branch.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

Atom = core.Var | core.Literal
Refs = Mapping[core.Var, int]  # the kernel's argument that a variable stands for
Values = dict[core.Var, np.ndarray]  # numbers that are known, of each program

_REFUSED = {"atomic_rmw", "atomic_cas", "dma_start", "copy_gmem_to_smem"}


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.trunc(a / np.where(b == 0, 1, b)).astype(np.int64)


_ARITHMETIC: Mapping[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _quotient,
    "rem": lambda a, b: np.fmod(a, np.where(b == 0, 1, b)),
    "neg": np.negative,
    "sign": np.sign,
    "max": np.maximum,
    "min": np.minimum,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "not": np.invert,
    "select_n": lambda which, a, b: np.where(which, b, a),
}


class Walk:
    """Goes through a kernel and sums what each of its arguments has moved.

    Attributes:
      name: the kernel's, for errors.
      everywhere: that all programs do something.
      moved: bytes by the number of the argument.
    """

    def __init__(self, name: str, grid: tuple[int, ...]):
        self.name = name
        self.places = np.indices(grid).reshape(len(grid), -1).astype(np.int64)
        self.everywhere = np.ones(math.prod(grid), bool)
        self.moved: Counter[int] = Counter()

    def run(
        self, jaxpr: core.Jaxpr, refs: Refs, values: Values, active: np.ndarray
    ) -> list[np.ndarray | None]:
        """Count a part of the kernel.

        Args:
          jaxpr: the part.
          refs, values: of its arguments those that are known.
          active: the programs that do it.

        Returns:
          Of its results those numbers that are known.
        """
        values = dict(values)
        used = {x for e in jaxpr.eqns for x in e.invars if isinstance(x, core.Var)}
        used.update(x for x in jaxpr.outvars if isinstance(x, core.Var))
        for eqn in jaxpr.eqns:
            kind = eqn.primitive.name
            if kind in _REFUSED:
                raise ValueError(
                    f"{self.name} does {kind}: cannot count what it moves."
                )
            first = eqn.invars[0] if eqn.invars else None
            if isinstance(first, core.Var) and first in refs and kind in _ACCESSES:
                times = 1 + (kind in _STORES and eqn.outvars[0] in used)
                extent = _extent(eqn, values, active)
                self.moved[refs[first]] += times * extent
                continue
            results = self._results(eqn, refs, values, active)
            for x, value in zip(eqn.outvars, results, strict=False):
                if value is not None:
                    values[x] = value
        return [self._value(x, values) for x in jaxpr.outvars]

    def _value(self, x: Atom, values: Values) -> np.ndarray | None:
        """A whole number or a truth value of each program, if it is known."""
        if not isinstance(x, core.Literal):
            return values.get(x)
        if np.ndim(x.val) or x.aval.dtype.kind not in "iub":
            return None
        return np.full(self.everywhere.shape, x.val)

    def _results(
        self, eqn: core.JaxprEqn, refs: Refs, values: Values, active: np.ndarray
    ) -> Sequence[np.ndarray | None]:
        kind, params = eqn.primitive.name, eqn.params
        if kind == "program_id":
            return [self.places[params["axis"]]]
        if kind == "num_programs":
            count = 1 + self.places[params["axis"]].max()
            return [np.full(self.everywhere.shape, count, np.int64)]
        if kind == "cond":
            return self._cond(eqn, refs, values, active)
        if kind == "scan":
            return self._scan(eqn, refs, values, active)
        if kind == "while":
            return self._while(eqn, refs, values, active)
        known = [self._value(x, values) for x in eqn.invars]
        parts = list(core.jaxprs_in_params(params))
        if parts:
            return self._within(parts[0], eqn.invars, known, refs, active)
        numbers = eqn.outvars and not eqn.outvars[0].aval.shape
        if not numbers or any(x is None for x in known):
            return []
        if kind == "convert_element_type":
            whole = np.issubdtype(params["new_dtype"], np.integer)
            return [known[0].astype(np.int64)] if whole else []
        return [_ARITHMETIC[kind](*known)] if kind in _ARITHMETIC else []

    def _within(
        self,
        jaxpr: core.Jaxpr | core.ClosedJaxpr,
        given: Sequence[Atom],
        known: Sequence[np.ndarray | None],
        refs: Refs,
        active: np.ndarray,
    ) -> list[np.ndarray | None]:
        """Count a part that has variables of its own."""
        body = getattr(jaxpr, "jaxpr", jaxpr)
        inner = {
            x: refs[y]
            for x, y in zip(body.invars, given, strict=False)
            if isinstance(y, core.Var) and y in refs
        }
        pairs = zip(body.invars, known, strict=False)
        return self.run(body, inner, {x: v for x, v in pairs if v is not None}, active)

    def _cond(
        self, eqn: core.JaxprEqn, refs: Refs, values: Values, active: np.ndarray
    ) -> Sequence[np.ndarray | None]:
        index, *given = eqn.invars
        known = [self._value(x, values) for x in given]
        which = self._value(index, values)
        branches = eqn.params["branches"]
        if which is not None:
            which = np.clip(which.astype(np.int64), 0, len(branches) - 1)
            for number, branch in enumerate(branches):
                self._within(branch, given, known, refs, active & (which == number))
            return []
        before, found = self.moved, []
        for branch in branches:
            self.moved = Counter()
            self._within(branch, given, known, refs, active)
            found.append(self.moved)
        self.moved = before + max(found, key=lambda moved: sum(moved.values()))
        return []

    def _scan(
        self, eqn: core.JaxprEqn, refs: Refs, values: Values, active: np.ndarray
    ) -> Sequence[np.ndarray | None]:
        params = eqn.params
        first = params["num_consts"]
        last = first + params["num_carry"]
        known = [self._value(x, values) for x in eqn.invars]
        for _ in range(params["length"]):
            held = [*known[:last], *[None] * (len(known) - last)]
            new = self._within(params["jaxpr"], eqn.invars, held, refs, active)
            known[first:last] = new[: params["num_carry"]]
        return known[first:last]

    def _while(
        self, eqn: core.JaxprEqn, refs: Refs, values: Values, active: np.ndarray
    ) -> Sequence[np.ndarray | None]:
        """A loop whose condition is known; another is refused if it moves anything."""
        params = eqn.params
        tests, bodies = params["cond_nconsts"], params["body_nconsts"]
        known = [self._value(x, values) for x in eqn.invars]
        given = eqn.invars
        carry = known[tests + bodies :]
        while True:
            (go,) = self._within(
                params["cond_jaxpr"],
                [*given[:tests], *given[tests + bodies :]],
                [*known[:tests], *carry],
                refs,
                active,
            )
            if go is None:
                break
            active = active & go
            if not active.any():
                return []
            held = [*known[tests : tests + bodies], *carry]
            body = params["body_jaxpr"]
            carry = self._within(body, given[tests:], held, refs, active)
        before, self.moved = self.moved, Counter()
        self._within(params["body_jaxpr"], given[tests:], [], refs, active)
        if any(self.moved.values()):
            raise ValueError(
                f"A loop in {self.name} has no known length: cannot count it."
            )
        self.moved = before
        return []


_STORES = {"swap", "masked_swap", "addupdate"}
_ACCESSES = {"get", "masked_load", *_STORES}


def _extent(eqn: core.JaxprEqn, values: Values, active: np.ndarray) -> float:
    """Bytes of a tile that are within its array, summed over the active programs."""
    ref = eqn.invars[0].aval
    size = np.dtype(ref.dtype).itemsize
    programs = int(active.sum())
    indices = _indices(eqn)
    if indices is None:
        return programs * size * math.prod(ref.shape)
    total = np.ones(active.shape)
    for index, dim in zip(indices, ref.shape, strict=True):
        width = getattr(index, "size", None) if hasattr(index, "stride") else None
        if width is None:  # one place, or an array of places
            total = total * math.prod(
                getattr(getattr(index, "aval", None), "shape", ())
            )
            continue
        start = index.start
        if isinstance(start, core.Var):
            start = values.get(start)
        elif isinstance(start, core.Literal):
            start = int(start.val)
        there = min(width, dim) if start is None else np.clip(dim - start, 0, width)
        total = total * there
    return float(np.sum(total[active])) * size


def _indices(eqn: core.JaxprEqn) -> Sequence[Any] | None:
    """Where in its array an access is; None for the whole of it."""
    kind, params = eqn.primitive.name, eqn.params
    if "args_tree" in params:
        transforms = jax.tree.unflatten(params["args_tree"], eqn.invars)[1]
    else:
        skipped = 1 if kind == "get" else 2
        transforms = jax.tree.unflatten(params["tree"], eqn.invars[skipped:])
    if not transforms:
        return None
    if len(transforms) > 1 or not hasattr(transforms[0], "indices"):
        raise ValueError(f"{kind} goes through several views: cannot count it.")
    return transforms[0].indices
