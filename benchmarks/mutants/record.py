"""What is known of the mutants, a line each, and the page that is made of it."""

import collections
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.mutants.equivalent import EQUIVALENT
from benchmarks.mutants.mutate import KINDS, Mutant
from benchmarks.mutants.running import Result
from examples.common.report import markdown_table

Kept = dict[str, Any]


class Results:
    """Mutants that were tried, in a file; of one that is there twice, the last line."""

    def __init__(self, path: Path):
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.all: dict[str, Kept] = {x["id"]: x for x in map(json.loads, lines)}

    def add(self, mutant: Mutant, result: Result) -> None:
        kept = dataclasses.asdict(mutant) | dataclasses.asdict(result)
        del kept["source"]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(kept) + "\n")
        self.all[mutant.id] = kept


def outcome(kept: Kept) -> str:
    """As in the record: one that cannot be told from the original is no survivor."""
    if kept["outcome"] == "survived" and kept["id"] in EQUIVALENT:
        return "equivalent"
    return kept["outcome"]


_COLUMNS = ("killed", "survived", "too slow", "equivalent")


def figures(found: Sequence[Mutant], results: Mapping[str, Kept]) -> Kept:
    """Counts by module and by kind, of the mutants that the package still has."""
    tried = [results[m.id] for m in found if m.id in results]

    def counts(own: Iterable[Kept]) -> dict[str, int]:
        counted = collections.Counter(map(outcome, own))
        return {name: counted[name] for name in _COLUMNS}

    def by(what: str, names: Iterable[str]) -> dict[str, dict[str, int]]:
        return {name: counts(x for x in tried if x[what] == name) for name in names}

    return {
        "possible": len(found),
        "all": counts(tried),
        "by_module": {
            module: counts(x for x in tried if x["module"] == module)
            for module in sorted({x["module"] for x in tried})
        },
        "by_kind": {
            kind: counts(x for x in tried if x["kind"] == kind) for kind in KINDS
        },
    }


def page(found: Sequence[Mutant], results: Mapping[str, Kept], left: int) -> str:
    """The record for people.

    Args:
      found: all mutants of the package.
      results: of those that were tried.
      left: how many of the sample were not.
    """
    counted = figures(found, results)
    tried = [(m, results[m.id]) for m in found if m.id in results]
    survivors = [m for m, kept in tried if outcome(kept) == "survived"]
    equivalent = [m for m, kept in tried if outcome(kept) == "equivalent"]
    parts = (
        summary(counted, left),
        "## By kind",
        table("kind", counted["by_kind"]),
        "## By module",
        table("module", counted["by_module"]),
        "## Survivors",
        "\n".join(f"- {shown(m)}" for m in survivors) or "None.",
        "## Equivalent",
        "\n".join(f"- {shown(m)}: {EQUIVALENT[m.id]}" for m in equivalent) or "None.",
    )
    return "\n\n".join(parts)


def summary(counted: Kept, left: int) -> str:
    total = counted["all"]
    tried = sum(total.values())
    counting = tried - total["equivalent"]
    dead = total["killed"]
    share = f", {100 * dead / counting:.1f}%" if counting else ""
    unfinished = (
        f" **Not complete**: {left} of the sample were not tried yet; "
        "`python -m benchmarks.mutants` goes on."
        if left
        else ""
    )
    return (
        f"{tried} mutants of the {counted['possible']} that the script can make of the "
        f"package were tried. {total['equivalent']} of them are equivalent; of the "
        f"other {counting}, {dead} were killed{share}. A mutant is one changed "
        "expression; it is killed where a test of the files that "
        "`benchmarks/mutants/tests.py` names for its module fails, and so does not "
        f"without it. Where there was too little time for all of them it is too slow, "
        f"and counts as not killed.{unfinished}"
    )


def table(title: str, counted: Mapping[str, Mapping[str, int]]) -> str:
    rows = [
        [name, *(str(own[column] or "") for column in _COLUMNS)]
        for name, own in counted.items()
    ]
    return markdown_table([title, *_COLUMNS], rows)


def shown(mutant: Mutant) -> str:
    before, after = _differing(mutant.before, mutant.after)
    return (
        f"{mutant.id}, {mutant.module}:{mutant.line} `{mutant.where or 'module'}`, "
        f"{mutant.kind}: `{before}` became `{after}`"
    )


def _differing(before: str, after: str, around: int = 30) -> tuple[str, str]:
    """Two texts without most of what they begin and end with alike."""
    begin = 0
    while begin < min(len(before), len(after)) and before[begin] == after[begin]:
        begin += 1
    end = 0
    while (
        end < min(len(before), len(after)) - begin
        and before[-1 - end] == after[-1 - end]
    ):
        end += 1

    def cut(text: str) -> str:
        first = max(0, begin - around)
        last = min(len(text), len(text) - end + around)
        return "…" * (first > 0) + text[first:last] + "…" * (last < len(text))

    return cut(before), cut(after)
