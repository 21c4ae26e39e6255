"""A plugin of pytest: the quickest tests come first, as many as the time allows.

What each took is kept in the file that QUICK_FIRST names, from one run to the next.
After so many seconds of the processor as QUICK_FIRST_LIMIT says no other test begins.
Where QUICK_FIRST_ONLY has ids of tests without parameters, a line each, no other test
is run.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest


class QuickFirst:
    """Sorts tests by the seconds that they have taken.

    Of other parameters at least, if their own are not known; new tests come first.
    """

    def __init__(self, path: Path, limit: float, only: set[str] | None):
        self._path, self._limit, self._only = path, limit, only
        self._seconds = json.loads(path.read_text()) if path.exists() else {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self._only is not None:
            items[:] = [x for x in items if _function(x.nodeid) in self._only]
        alike: dict[str, float] = {}
        for name, taken in self._seconds.items():
            function = _function(name)
            alike[function] = min(taken, alike.get(function, taken))

        def expected(item: Any) -> float:
            like = alike.get(_function(item.nodeid), 0.0)
            return self._seconds.get(item.nodeid, like)

        items.sort(key=expected)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.passed:
            taken, before = report.duration, self._seconds.get(report.nodeid)
            # The least, as compilation counts only once.
            least = taken if before is None else min(taken, before)
            self._seconds[report.nodeid] = round(least, 3)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: Any, nextitem: Any) -> None:
        # Which pytest looks at after this test.
        if nextitem is not None and time.process_time() > self._limit:
            item.session.shouldstop = "the time is up"

    def pytest_sessionfinish(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".new")
        draft.write_text(json.dumps(self._seconds))
        draft.replace(self._path)


def _function(nodeid: str) -> str:
    return nodeid.partition("[")[0]


def pytest_configure(config: Any) -> None:
    path, limit = os.environ["QUICK_FIRST"], os.environ["QUICK_FIRST_LIMIT"]
    listed = os.environ.get("QUICK_FIRST_ONLY")
    only = None if listed is None else set(listed.splitlines())
    config.pluginmanager.register(QuickFirst(Path(path), float(limit), only))
