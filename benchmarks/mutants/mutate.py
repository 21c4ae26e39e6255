"""Mutants: modules of the package that differ from it in one expression."""

import ast
import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

KINDS = (
    "sign",
    "transpose",
    "beta",
    "constant",
    "off by one",
    "guard",
    "axis",
    "bias correction",
    "min/max",
    "comparison",
    "keyword",
)

Change = tuple[ast.expr, str, ast.expr]  # an expression, the kind, and what it becomes

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.Gt: ast.GtE,
    ast.Eq: ast.NotEq,
    ast.Is: ast.IsNot,
    ast.In: ast.NotIn,
}
_COMPARISONS |= {new: old for old, new in _COMPARISONS.items()}
_EXTREMES = {"min": "max", "minimum": "maximum", "argmin": "argmax", "pmin": "pmax"}
_EXTREMES |= {new: old for old, new in _EXTREMES.items()}
_BETAS = {"b1": "b2", "b2": "b1"}
_SWAPPING = ("swapaxes", "moveaxis", "transpose")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One wrong expression.

    Attributes:
      id: of its content: the module, the function, the whole expression around it, and
        what becomes of it. Changes of other lines leave it as it is.
      module: path from the root of the tree.
      line: where it stands now.
      kind: one of `KINDS`.
      where: the names of the classes and functions around it.
      before, after: the smallest expression that changes.
      source: of the whole module, with the change.
    """

    id: str
    module: str
    line: int
    kind: str
    where: str
    before: str
    after: str
    source: str = dataclasses.field(repr=False)


def mutants(module: str, source: str) -> list[Mutant]:
    """All that can be made of a module, in the order of its text."""
    found: list[Mutant] = []
    seen: collections.Counter[str] = collections.Counter()
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    whole = b"".join(lines)

    def place(line: int | None, column: int | None) -> int:
        return starts[(line or 1) - 1] + (column or 0)

    for where, expression, guards in _expressions(ast.parse(source)):
        changes = list(_changes(expression))
        if guards:
            changes.append((expression, "guard", ast.Constant(False)))
        for node, kind, new in changes:
            begin = place(node.lineno, node.col_offset)
            end = place(node.end_lineno, node.end_col_offset)
            after = ast.unparse(new)
            content = "\n".join(
                (module, where, ast.unparse(expression), ast.unparse(node), kind, after)
            )
            seen[content] += 1
            digest = hashlib.sha256(f"{content}\n{seen[content]}".encode()).hexdigest()
            changed = whole[:begin] + f"({after})".encode() + whole[end:]
            found.append(
                Mutant(
                    digest[:12],
                    module,
                    node.lineno,
                    kind,
                    where,
                    ast.unparse(node),
                    after,
                    changed.decode(),
                )
            )
    return found


def sample(found: Iterable[Mutant], count: int, seed: int) -> list[Mutant]:
    """About so many mutants: of every module, more of long ones, and of every kind.

    They come by turns of the modules, so that whoever stops early has tried some of
    each. Which they are depends on their content and the seed alone.
    """
    by_module: dict[str, list[Mutant]] = collections.defaultdict(list)
    for mutant in found:
        by_module[mutant.module].append(mutant)
    share = count / max(1, sum(map(len, by_module.values())))
    chosen = []
    for _, own in sorted(by_module.items()):
        chosen += _by_turns(own, _kind, seed)[: max(2, round(share * len(own)))]
    return _by_turns(chosen, _module, seed)


def _kind(mutant: Mutant) -> str:
    return mutant.kind


def _module(mutant: Mutant) -> str:
    return mutant.module


def _by_turns(
    found: Sequence[Mutant], group: Callable[[Mutant], str], seed: int
) -> list[Mutant]:
    """The first of each group, then the second of each; chance orders the groups."""

    def chance(mutant: Mutant) -> str:
        return hashlib.sha256(f"{seed} {mutant.id}".encode()).hexdigest()

    turns: collections.Counter[str] = collections.Counter()
    placed = []
    for mutant in sorted(found, key=chance):
        placed.append((turns[group(mutant)], chance(mutant), mutant))
        turns[group(mutant)] += 1
    return [mutant for _, _, mutant in sorted(placed, key=lambda x: x[:2])]


def _expressions(
    node: ast.AST, names: tuple[str, ...] = ()
) -> Iterator[tuple[str, ast.expr, bool]]:
    """Whole expressions, where they stand, and whether they guard an error.

    Annotations, docstrings and what an error says are not among them.
    """
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        names = (*names, node.name)
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.expr):
                guards = isinstance(node, ast.If) and isinstance(
                    node.body[0], ast.Raise
                )
                yield ".".join(names), child, guards
            elif isinstance(child, ast.AST) and not isinstance(child, ast.Raise):
                yield from _expressions(child, names)


def _changes(expression: ast.expr) -> Iterator[Change]:
    """All changes within an expression."""
    # Parts of texts, and numbers that are treated with the keyword or sign before them.
    left_out: set[ast.AST] = set()
    for node in ast.walk(expression):
        if isinstance(node, ast.expr) and node not in left_out:
            yield from _of_node(node)
        if isinstance(node, ast.JoinedStr) or _is_negative(node):
            left_out.update(ast.walk(node))
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg and keyword.arg.startswith("axis"):
                    yield from _of_axis(keyword.value)
                    left_out.update(ast.walk(keyword.value))


def _of_node(node: ast.expr) -> Iterator[Change]:
    match node:
        case ast.BinOp(ast.Constant(1), ast.Sub(), ast.BinOp(_, ast.Pow(), _)):
            yield node, "bias correction", ast.Constant(1.0)
        case ast.BinOp(left, ast.Add() | ast.Sub(), right):
            if not (_is_text(left) or _is_text(right)):
                other = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
                yield node, "sign", ast.BinOp(left, other, right)
        case ast.UnaryOp(ast.USub(), ast.Constant()) if _is_negative(node):
            yield from _of_axis(node)
        case ast.UnaryOp(ast.USub(), operand):
            yield node, "sign", operand
        case ast.UnaryOp(ast.Not(), operand):
            yield node, "comparison", operand
        case ast.BoolOp(op, values):
            other = ast.Or() if isinstance(op, ast.And) else ast.And()
            yield node, "comparison", ast.BoolOp(other, values)
        case ast.Compare(left, [op], right) if type(op) in _COMPARISONS:
            other = ast.Compare(left, [_COMPARISONS[type(op)]()], right)
            yield node, "comparison", other
        case ast.Constant(value) if type(value) is int:
            yield node, "off by one", ast.Constant(value + 1)
        case ast.Constant(value) if type(value) is float:
            yield node, "constant", ast.Constant(2 * value if value else 1.0)
        case ast.Attribute(value, "mT" | "T"):
            yield node, "transpose", value
        case ast.Name(name) | ast.Attribute(_, name) if name in _BETAS:
            yield node, "beta", _renamed(node, _BETAS[name])
        case ast.Call():
            yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[Change]:
    match node.func:
        case ast.Name(name) | ast.Attribute(_, name) if name in _EXTREMES:
            function = _renamed(node.func, _EXTREMES[name])
            yield node, "min/max", ast.Call(function, node.args, node.keywords)
        case ast.Attribute(_, "where") if len(node.args) == 3:
            yield node, "guard", node.args[1]
        case ast.Attribute(_, name) if name in _SWAPPING and node.args:
            yield node, "transpose", node.args[0]
    for keyword in node.keywords:
        if keyword.arg and isinstance(keyword.value, ast.Name | ast.Attribute):
            kept = [x for x in node.keywords if x is not keyword]
            yield node, "keyword", ast.Call(node.func, node.args, kept)


def _of_axis(node: ast.expr) -> Iterator[Change]:
    match node:
        case ast.UnaryOp(ast.USub(), ast.Constant(value)) if type(value) is int:
            other = ast.Constant(2 if value == 1 else value - 1)
            yield node, "axis", ast.UnaryOp(ast.USub(), other)
        case ast.Constant(value) if type(value) is int:
            yield node, "axis", ast.Constant(1 if value == 0 else value - 1)
        case ast.Tuple(elements) if elements:
            yield node, "axis", ast.Tuple(elements[:-1], ast.Load())


def _is_negative(node: ast.AST) -> bool:
    match node:
        case ast.UnaryOp(ast.USub(), ast.Constant(value)):
            return type(value) is int
    return False


def _is_text(node: ast.expr) -> bool:
    """Whether a plus there joins: texts, lists or tuples."""
    match node:
        case ast.BinOp(left, _, right):
            return _is_text(left) or _is_text(right)
        case ast.Constant(value):
            return isinstance(value, str)
    return isinstance(node, ast.JoinedStr | ast.List | ast.ListComp | ast.Tuple)


def _renamed(node: ast.expr, name: str) -> ast.expr:
    if isinstance(node, ast.Attribute):
        return ast.Attribute(node.value, name, ast.Load())
    return ast.Name(name, ast.Load())
