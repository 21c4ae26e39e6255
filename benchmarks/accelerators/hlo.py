"""XLA's text of a compiled program, read into instructions."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(
    r"\b(pred|token|opaque|[a-z]+\d+[a-z0-9]*)\[([\d,<=]*)\](?:\{([^{}]*)\})?"
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"([\w\-]+)\(")
_OF_A_LOOP = ("condition", "body")


@dataclass(frozen=True)
class Array:
    """An array as the compiled program keeps it.

    Attributes:
      dtype: as XLA spells it.
      dims: its shape.
      space: where it is. 0 is the device's large memory, all others are on the chip.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> float:
        """Bytes, wherever they are."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            found = re.search(r"\d+", self.dtype)
            bits = int(found[0]) if found else 0
        count = 1
        for dim in self.dims:
            count *= dim
        return count * bits / 8

    @property
    def bytes(self) -> float:
        """Bytes in the device's large memory."""
        return 0.0 if self.space else self.size


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a shape, which may be a tuple of shapes."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        shape = tuple(int(x.strip("<=")) for x in dims.split(",") if x)
        found.append(Array(dtype, shape, int(space[1]) if space else 0))
    return tuple(found)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique within its computation.
      result: the arrays that it makes.
      opcode: what it does.
      operands: the names of the instructions that it takes.
      inside: the text between the parentheses of the operands.
      rest: the text after them, with the attributes.
      root: whether its result is the computation's.
    """

    name: str
    result: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    inside: str
    rest: str
    root: bool

    @cached_property
    def size(self) -> float:
        return sum(x.size for x in self.result)

    @cached_property
    def bytes(self) -> float:
        return sum(x.bytes for x in self.result)

    @property
    def op_name(self) -> str:
        """The path of named scopes and of JAX's operation."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """What a custom call calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def element(self) -> int | None:
        """Which element of a tuple it takes, if that is what it does."""
        found = re.search(r"index=(\d+)", self.rest)
        return int(found[1]) if found and self.opcode == "get-tuple-element" else None

    @property
    def number(self) -> int | None:
        """The whole number that it is, if it is one."""
        whole = self.opcode == "constant" and self.inside.isdigit()
        return int(self.inside) if whole else None

    def called(self, *attributes: str) -> list[str]:
        """The computations that attributes of these names call, in order."""
        found = []
        for attribute in attributes:
            many = re.search(attribute + r"=\{([^}]*)\}", self.rest)
            one = re.search(attribute + r"=%?([\w.\-]+)", self.rest)
            if many:
                found += re.findall(r"[\w.\-]+", many[1])
            elif one:
                found.append(one[1])
        return found

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional, that of 0 or of a false one first."""
        return self.called(
            "branch_computations", "false_computation", "true_computation"
        )


@dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {x.name: x for x in self.instructions}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who takes an instruction's result."""
        users: dict[str, list[Instruction]] = {x.name: [] for x in self.instructions}
        for instruction in self.instructions:
            for name in dict.fromkeys(instruction.operands):
                users.setdefault(name, []).append(instruction)
        return users

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(x.inside): x for x in self.instructions if x.opcode == "parameter"}

    @property
    def root(self) -> Instruction:
        return next(x for x in self.instructions if x.root)

    def item(self, pack: Instruction, place: int) -> Instruction:
        """What a tuple has at a place, copies left out."""
        found = self.by_name[pack.operands[place]] if pack.opcode == "tuple" else pack
        return self.origin(found)

    def origin(self, found: Instruction) -> Instruction:
        """What an instruction copies, or itself."""
        while found.opcode == "copy":
            found = self.by_name[found.operands[0]]
        return found

    def operands(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instructions that one takes, each once."""
        for name in dict.fromkeys(instruction.operands):
            if name in self.by_name:
                yield self.by_name[name]


@dataclass(frozen=True)
class Module:
    """A compiled program: its computations by name, and the one that starts it."""

    computations: dict[str, Computation]
    entry: str

    def trips(self, around: Computation, loop: Instruction) -> int | None:
        """How often a loop runs: as XLA says, or as its counter does."""
        known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        test, body = (self.computations[loop.called(x)[0]] for x in _OF_A_LOOP)
        if "direction=LT" not in test.root.rest or len(test.root.operands) != 2:
            return None
        counter, end = (test.by_name[name] for name in test.root.operands)
        place = counter.element
        if place is None:
            return None
        # XLA forgets the count where it has moved constants into the body.
        start = around.item(around.by_name[loop.operands[0]], place)
        after = body.item(body.root, place)
        if after.opcode != "add":
            return None
        before, step = (body.origin(body.by_name[name]) for name in after.operands)
        numbers = [x.number for x in (start, step, end)]
        if before.element != place or None in numbers or numbers[1] != 1:
            return None
        return max(0, numbers[2] - numbers[0])


def parse(text: str) -> Module:
    """Read what `jax.stages.Compiled.as_text` gives.

    Raises:
      ValueError: where no computation is the entry.
    """
    found: dict[str, list[Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
            continue
        instruction = _instruction(line)
        if instruction is not None and current is not None:
            current.append(instruction)
    if entry is None:
        raise ValueError("The text has no ENTRY computation: is it optimized HLO?")
    return Module({k: Computation(k, tuple(v)) for k, v in found.items()}, entry)


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    body = re.sub(r"/\*.*?\*/", "", match[3])
    if body.startswith("("):
        end = _closing(body, 0) + 1
    else:
        end = body.find(" ")
    result, rest = body[:end], body[end:].strip()
    opcode = _OPCODE.match(rest)
    if not opcode:
        return None
    start = opcode.end() - 1
    end = _closing(rest, start)
    inside = rest[start + 1 : end]
    return Instruction(
        name=match[2],
        result=arrays(result),
        opcode=opcode[1],
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        inside=inside,
        rest=rest[end + 1 :],
        root=bool(match[1]),
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at ``start`` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
    return len(text)
