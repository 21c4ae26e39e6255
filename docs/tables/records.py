"""The committed measurements, and Markdown made of them."""

import json
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "records"


def record(name: str) -> Any:
    return json.loads((RECORDS / f"{name}.json").read_text())


def repository() -> str:
    """The address of the repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["urls"]["Repository"]


def rows(head: Sequence[str], lines: Iterable[Sequence[str]], figures: bool) -> str:
    """A Markdown table; with `figures`, all columns but the first are for numbers."""
    dashes = ["---"] + ["---:" if figures else "---"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, dashes, *lines))


def named(name: str) -> str:
    """A record's name of a run: the factory as code, and how it is set."""
    factory, comma, how = name.partition(",")
    return f"`{factory}`{comma}{how}"


def made_on(machine: dict[str, Any]) -> str:
    """When and with what a record was made."""
    versions = ", ".join(f"{x} {machine[x]}" for x in ("jax", "optax") if x in machine)
    return (
        f"Measured on {machine['date']}, {machine['processor']}, {machine['cores']} "
        f"cores, {versions}."
    )
