"""The tests of a mutant, in a copy of the tree."""

import dataclasses
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import pytest

from benchmarks.mutants.mutate import Mutant
from benchmarks.mutants.reach import Reach

_Ends = pytest.ExitCode

Outcome = Literal["killed", "survived", "too slow"]

# Of the laws that all methods share, one case in so many tells which lines a law
# executes. Of one that does, all cases are tried.
_SAMPLE = "8"
# Parameters in brackets may hold anything.
_FAILED = re.compile(
    r"^(?:FAILED|ERROR) ([^\[\n]+?(?:\[.*?\])?)(?: - .*)?$", re.MULTILINE
)


@dataclasses.dataclass(frozen=True)
class Result:
    """What the tests said of a mutant.

    Attributes:
      outcome: "too slow" where none had failed when the time was up.
      by: the test that failed, or "".
      seconds: that it took.
    """

    outcome: Outcome
    by: str
    seconds: float


class Copy:
    """A copy of what git knows of a tree, in which modules are replaced in turn.

    Args:
      tree: the root of the tree.
      root: that of the copy.
      kept: a directory for what makes later runs quicker: compiled programs, what each
        test has taken, and which lines it executes.
      limit: seconds of the processor for the tests of a mutant.
    """

    def __init__(self, tree: Path, root: Path, kept: Path, limit: float):
        self.root, self._limit = root, limit
        self._cache, self._seconds = kept / "compiled", kept / "seconds.json"
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=tree, check=True, capture_output=True)
        for name in filter(None, os.fsdecode(names.stdout).split("\0")):
            if (tree / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(tree / name, self.root / name)
        self._flags = self._xla_flags()
        self._reach = Reach(self.root, kept / "reached", self._look)

    def _xla_flags(self) -> str:
        """What the tests' conftest.py sets, which it takes a process to find out."""
        program = "import os, conftest; print(os.environ['XLA_FLAGS'])"
        asked = [sys.executable, "-B", "-c", program]
        said = subprocess.run(
            asked, cwd=self.root / "tests", check=True, capture_output=True, text=True
        )
        return said.stdout.strip()

    def try_(self, mutant: Mutant, tests: Sequence[str], whole: bool = False) -> Result:
        """Runs those of the tests that execute the line, until one fails.

        If ``whole``, all of them.
        """
        reaching = None
        if not whole:
            reaching = self._reach.tests(tests, mutant.module, mutant.line)
        path, began = self.root / mutant.module, time.monotonic()
        original = path.read_text()
        path.write_text(mutant.source)
        try:
            outcome, by = self._pytest(tests, self._limit, reaching)
        finally:
            path.write_text(original)
        return Result(outcome, by, round(time.monotonic() - began, 1))

    def check(self, tests: Iterable[str]) -> None:
        """Raises if one of these fails without a mutant, which it then cannot tell."""
        asked = sorted(set(tests))
        if asked and (by := self._pytest(asked, math.inf)[1]):
            raise RuntimeError(
                f"{by} fails without a mutant, too: what this run has added to the "
                "record is worth nothing. Mend the test, and run again."
            )

    def _pytest(
        self, tests: Sequence[str], limit: float, only: set[str] | None = None
    ) -> tuple[Outcome, str]:
        own = {"QUICK_FIRST_LIMIT": str(limit)}
        if only is not None:
            own["QUICK_FIRST_ONLY"] = "\n".join(sorted(only))
        options = ["-x", "-rfE", "--tb=no"]
        process = self._start(tests, options, own, "1")
        try:
            # A mutant may never end; others may need the processor too.
            longest = None if limit == math.inf else 60 + 10 * limit
            said, _ = process.communicate(timeout=longest)
        except subprocess.TimeoutExpired:
            return "too slow", ""
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                # It may have been writing there.
                shutil.rmtree(self._cache, ignore_errors=True)
        failed = _FAILED.search(said)
        match process.returncode:
            case 0 | _Ends.NO_TESTS_COLLECTED:
                return "survived", ""
            case _Ends.INTERRUPTED if not failed:
                return "too slow", ""
            case _Ends.USAGE_ERROR:
                raise RuntimeError(said)
        # Without a test's name, not even the collection of tests ended.
        return "killed", failed[1] if failed else tests[0]

    def _look(self, file: str, options: Sequence[str], own: dict[str, str]) -> None:
        """Runs all of a file's tests, without a mutant."""
        own = {"QUICK_FIRST_LIMIT": str(math.inf)} | own
        process = self._start([file], options, own, _SAMPLE)
        said, _ = process.communicate()
        if process.returncode not in (_Ends.OK, _Ends.NO_TESTS_COLLECTED):
            raise RuntimeError(f"{file} fails without a mutant:\n{said}")

    def _start(
        self,
        tests: Sequence[str],
        options: Sequence[str],
        own: dict[str, str],
        sample: str,
    ) -> subprocess.Popen[str]:
        env = {
            "PYTHONDONTWRITEBYTECODE": "1",  # by times, which mutants may share
            "JAX_COMPILATION_CACHE_DIR": str(self._cache),
            "XLA_FLAGS": self._flags,
            "QUICK_FIRST": str(self._seconds),
        }
        options = ["-q", "-p", "no:cacheprovider", *options]
        options += ["-p", f"{__package__}.quick_first"]
        if any(test.startswith("tests/") for test in tests):  # whose option it is
            options += ["--sample", sample]
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=self.root,
            env=os.environ | env | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
