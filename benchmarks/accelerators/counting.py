"""What a compiled program does in one step, counted in its text.

The rules, of which none flatters:

- A conditional counts as its dearest branch. The one exception is a conditional that
  renews a basis, which the library marks by the scope "refresh": in an ordinary step
  no refresh is due, and it counts as its cheapest. In a refresh all of them are due.
  One that looks at the gradient of a leaf without a basis, marked by "waits", counts as
  its cheapest in both, as bases are there: the first step, which is not counted, reads
  the gradients of leaves that are renewed at once one time more than a refresh.
- A loop counts as often as XLA knows that it runs. Where XLA does not know, the loop
  counts once and is named: `measure` refuses the program unless told otherwise.
- A Pallas call counts what its grid reads and writes, re-reads included, see `pallas`.
- A fusion reads its operands and writes its results once. Of an operand that it only
  slices it reads the slices, and what it updates in place it writes where it does.
- What XLA keeps in a TPU's fast memory (VMEM) costs nothing but its copies.

The tiles of a matrix product are read more than once where they do not fit the caches;
that is not counted, here or by XLA.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.accelerators.hlo import Computation, Instruction, Module

Dims = tuple[int, ...]
Signature = tuple[str, tuple[Dims, ...], tuple[Dims, ...]]
Traffic = Mapping[Signature, tuple[float, ...]]  # bytes of operands, then of results
Rule = Literal["marked", "all"]

_FREE = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
_LIBRARY = re.compile(
    r"cusolver|triangularsolve|trsm|potrf|getrf|geqrf|orgqr|gesvd|syevd|syevj|lapack"
    r"|cholesky|eigh|^qr$|householder|ludecomposition|invertdiagblocks",
    re.IGNORECASE,
)
_PALLAS = ("__gpu$xla.gpu.triton", "tpu_custom_call", "mosaic_gpu")
_ALIASES = {"ConcatBitcast", "AssumeGatherIndicesInBound"}  # move nothing
_SCOPE = re.compile(r"(?:\w+\()*refresh\)*")
_WAITS = re.compile(r"refresh\)*/.*/(?:\w+\()*waits\)*/[^/]+$")
_INNER = re.compile(r"branch_\d+_fun|while|body|cond|scan")


@dataclass(frozen=True)
class Cost:
    """What is done.

    Attributes:
      launches: kernels, copies, calls of libraries, and a conditional's look at its
        predicate. On TPU these are the operations of the program.
      calls: of cuSOLVER, of cuBLAS's triangular solves and the like.
      bytes: read from the device's memory and written to it.
      unbounded: loops of unknown length, which were counted once.
    """

    launches: float = 0
    calls: float = 0
    bytes: float = 0
    unbounded: frozenset[str] = field(default_factory=frozenset)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.launches + other.launches,
            self.calls + other.calls,
            self.bytes + other.bytes,
            self.unbounded | other.unbounded,
        )

    def times(self, count: int) -> "Cost":
        return Cost(
            count * self.launches,
            count * self.calls,
            count * self.bytes,
            self.unbounded,
        )


def opens_refresh(scopes: str, inside: bool = False) -> bool:
    """Whether a path of scopes ends within "refresh", and in no branch or loop of it.

    Args:
      scopes: such as "jit(step)/refresh/jit(body)".
      inside: whether what the path starts from is so.
    """
    for scope in scopes.split("/"):
        if _SCOPE.fullmatch(scope):
            inside = True
        elif _INNER.fullmatch(scope):
            inside = False
    return inside


def is_refresh(conditional: Instruction) -> bool:
    """Whether the library marked a conditional as one of a refresh."""
    return opens_refresh(conditional.op_name.rpartition("/")[0])


@dataclass(frozen=True)
class Counter:
    """Counts the steps of one program.

    Attributes:
      module: the program.
      traffic: bytes of each Pallas call, from `pallas.traffic`.
      refresh: whether all refreshes are due.
      rule: "marked", or "all" to take every conditional for one of a refresh: for
        optimizers of others, which mark nothing.
    """

    module: Module
    traffic: Traffic
    refresh: bool
    rule: Rule = "marked"

    def count(self) -> Cost:
        return self.computation(self.module.entry)

    def computation(self, name: str) -> Cost:
        found = self.module.computations[name]
        total = Cost()
        for instruction in found.instructions:
            total += self.instruction(found, instruction)
        return total

    def instruction(self, around: Computation, x: Instruction) -> Cost:
        if x.opcode in _FREE or x.opcode.endswith("-done"):
            return Cost()
        if x.opcode == "conditional":
            return self.conditional(x)
        if x.opcode == "while":
            body = self.computation(x.called("body")[0])
            trips = self.module.trips(around, x)
            if trips is None:
                test = self.computation(x.called("condition")[0])
                return body + test + Cost(unbounded=frozenset(x.called("body")))
            return body.times(trips)
        if x.opcode in ("call", "async-start"):
            inner = x.called("to_apply") or x.called("calls")
            return self.computation(inner[0])
        if x.opcode == "custom-call":
            return self.custom_call(around, x)
        return Cost(launches=1, bytes=_moved(self.module, around, x))

    def conditional(self, x: Instruction) -> Cost:
        costs = [self.computation(name) for name in x.branches]
        refresh = self.rule == "all" or is_refresh(x)
        spared = _WAITS.search(x.op_name) or refresh and not self.refresh
        choose: Callable[..., Cost] = min if spared else max
        look = Cost(launches=1)
        return look + choose(costs, key=lambda c: (c.bytes, c.launches))

    def custom_call(self, around: Computation, x: Instruction) -> Cost:
        if x.target in _ALIASES:
            return Cost()
        if any(name in x.target for name in _PALLAS):
            return Cost(launches=1, bytes=self.pallas_call(around, x))
        calls = bool(_LIBRARY.search(x.target))
        moved = sum(y.bytes for y in around.operands(x)) + x.bytes
        return Cost(launches=1, calls=calls, bytes=moved)

    def pallas_call(self, around: Computation, x: Instruction) -> float:
        operands = [around.by_name[name].result[0] for name in x.operands]
        name = re.search(r"([^/]+)/pallas_call", x.op_name)
        signature = (
            name[1] if name else x.name,
            tuple(y.dims for y in operands),
            tuple(y.dims for y in x.result),
        )
        if signature not in self.traffic:
            known = ", ".join(sorted({k[0] for k in self.traffic})) or "none"
            raise ValueError(
                f"The traced program has no Pallas call like {signature}: what it reads"
                f" is not known. Those that it has: {known}."
            )
        each = zip((*operands, *x.result), self.traffic[signature], strict=True)
        return sum(0.0 if y.space else moved for y, moved in each)


def check_bounded(*costs: Cost) -> None:
    """Refuse counts in which a loop of unknown length counted once.

    Raises:
      ValueError: with the names of the loops' computations.
    """
    unbounded = sorted(frozenset().union(*(cost.unbounded for cost in costs)))
    if unbounded:
        raise ValueError(
            f"XLA knows no length of the loops {', '.join(unbounded)}: what they cost"
            " is unknown. Bound them, or count each once with --loops."
        )


def conditionals(module: Module) -> tuple[int, int]:
    """How many conditionals are marked as refreshes, and how many are not."""
    found = [
        is_refresh(x)
        for computation in module.computations.values()
        for x in computation.instructions
        if x.opcode == "conditional"
    ]
    return sum(found), len(found) - sum(found)


def _moved(module: Module, around: Computation, x: Instruction) -> float:
    """Bytes that one kernel reads and writes."""
    operands = list(around.operands(x))
    if x.opcode == "fusion":
        return _fusion(module, around, x)
    if x.opcode == "copy-start":
        return x.result[0].bytes + operands[0].bytes
    if x.opcode == "slice-start":
        target = x.result[-2]
        return (0.0 if operands[0].result[0].space else target.size) + target.bytes
    if x.opcode in ("slice", "dynamic-slice", "gather"):
        read = 0.0 if operands[0].result[0].space else x.size
        return read + x.bytes + sum(y.bytes for y in operands[1:])
    if x.opcode in ("dynamic-update-slice", "scatter"):
        update = operands[1] if x.opcode == "dynamic-update-slice" else operands[-1]
        written = 0.0 if x.result[0].space else update.size
        return written + sum(y.bytes for y in operands[1:])
    return sum(y.bytes for y in operands) + x.bytes


def _fusion(module: Module, around: Computation, x: Instruction) -> float:
    inner = module.computations[x.called("calls")[0]]
    for y in inner.instructions:
        if y.opcode == "custom-call" and any(name in y.target for name in _PALLAS):
            raise ValueError(f"A Pallas call is fused into {x.name}: cannot count it.")
    total = 0.0
    for number, name in enumerate(x.operands):
        operand = around.by_name[name]
        if name not in x.operands[:number] and operand.bytes:
            total += _read(module, inner, inner.parameters[number])
    root = inner.root
    many = root.opcode == "tuple"
    parts = [inner.by_name[name] for name in root.operands] if many else [root]
    if len(parts) != len(x.result):  # one that makes several, such as a sort
        return total + x.bytes
    for array, part in zip(x.result, parts, strict=True):
        total += 0.0 if array.space else _written(inner, part, array.size)
    return total


def _read(module: Module, inner: Computation, x: Instruction) -> float:
    """Bytes of a fusion's parameter, or of a view of it, that the fusion reads."""
    total = x.size if x.root else 0.0
    for user in inner.users[x.name]:
        first = user.operands[0] == x.name and x.name not in user.operands[1:]
        if user.opcode == "bitcast":
            total += _read(module, inner, user)
        elif user.opcode in ("slice", "dynamic-slice", "gather") and first:
            total += user.size
        elif user.opcode == "dynamic-update-slice" and first:
            continue  # written over in place
        elif user.opcode == "fusion" and user.operands.count(x.name) == 1:
            nested = module.computations[user.called("calls")[0]]
            parameter = nested.parameters[user.operands.index(x.name)]
            same = "output_to_operand_aliasing" in user.rest
            view = same or _source(nested, nested.root) is parameter
            # A view that a fusion within gives is read by whoever takes it.
            total += _read(module, *((inner, user) if view else (nested, parameter)))
        else:
            return x.size
    return min(total, x.size)


def _source(inner: Computation, x: Instruction) -> Instruction:
    """What an instruction is a view of."""
    while x.opcode == "bitcast":
        x = inner.by_name[x.operands[0]]
    return x


def _written(inner: Computation, x: Instruction, size: float) -> float:
    """Bytes of a fusion's result that are written: of an update in place its own."""
    x = _source(inner, x)
    if x.opcode == "dynamic-update-slice":
        return min(size, inner.by_name[x.operands[1]].size)
    return size
