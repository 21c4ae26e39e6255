"""Which method passed which test: `pytest --contract FILE` adds a run to that file.

A test counts for a method of the registry if it is parametrized by it, and for "" if by
none. `make contract` runs the tests that are recorded, and the site has their table.
"""

import collections
import json
import platform
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from registry import METHODS

NAMES = sorted((method.name for method in METHODS), key=len, reverse=True)
# chex and absl write the method into the name of a test.
_OF_CHEX = re.compile(rf"(test_\w+?)_({'|'.join(map(re.escape, NAMES))})__")


def cell_of(item: pytest.Item) -> tuple[str, str, str]:
    """File, test and method of a test case."""
    if found := _OF_CHEX.match(item.name):
        return item.path.name, found[1], found[2]
    callspec = getattr(item, "callspec", None)
    values = callspec.params.values() if callspec else ()
    names = [getattr(x, "name", x) for x in values]
    method = next((x for x in names if isinstance(x, str) and x in NAMES), "")
    return item.path.name, item.originalname, method


class Contract:
    """A plugin of pytest: counts the cases that passed, and writes them at the end."""

    def __init__(self, path: Path):
        self.path = path
        self.passed: collections.Counter = collections.Counter()
        self.failed: set[tuple[str, ...]] = set()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        for item in items:
            # With xdist, a report brings it from the worker.
            item.user_properties.append(("contract", cell_of(item)))

    def pytest_runtest_logreport(self, report):
        cell = tuple(dict(report.user_properties)["contract"])
        if report.failed:
            self.failed.add(cell)
        elif report.passed and report.when == "call":
            self.passed[cell] += 1

    def pytest_sessionfinish(self, session):
        if not hasattr(session.config, "workerinput"):
            self.write()

    def write(self) -> None:
        """Cells that did not run keep what they had: a method can be run alone."""
        runs = json.loads(self.path.read_text()) if self.path.exists() else {}
        tests = runs.setdefault(_environment(), {})
        for file, test, method in self.passed.keys() | self.failed:
            cell = (file, test, method)
            cases = 0 if cell in self.failed else self.passed[cell]
            tests.setdefault(f"{file}::{test}", {})[method] = cases
        self.path.write_text(_one_test_a_line({k: _known(x) for k, x in runs.items()}))


def _environment() -> str:
    python = ".".join(platform.python_version_tuple()[:2])
    return f"Python {python}, jax {version('jax')}, optax {version('optax')}"


def _known(tests: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Without tests and methods that there are no more."""
    kept = {}
    for name, cases in tests.items():
        path, test = Path(__file__).with_name(name.split("::")[0]), name.split("::")[1]
        if path.exists() and f"def {test}(" in path.read_text():
            kept[name] = {k: n for k, n in cases.items() if k in ("", *NAMES)}
    return kept


def _one_test_a_line(runs: dict[str, dict[str, dict[str, int]]]) -> str:
    texts = []
    for run, tests in sorted(runs.items()):
        lines = [
            f"{json.dumps(test)}: {json.dumps(tests[test], sort_keys=True)}"
            for test in sorted(tests)
        ]
        texts.append(f"{json.dumps(run)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(texts) + "\n}\n"
