"""Which tests execute a line: no other can tell that it is wrong."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from coverage import CoverageData

# Runs pytest on a file, with options and further environment variables.
Run = Callable[[str, Sequence[str], dict[str, str]], None]


class Reach:
    """Knows what coverage.py saw of each file of tests, and looks where it does not.

    Args:
      root: of the tree.
      kept: a directory in which data of earlier runs on the same tree may lie.
      run: how a file's tests are run.
    """

    def __init__(self, root: Path, kept: Path, run: Run):
        self._kept, self._run = kept / _digest(root.rglob("*.py")), run

    def tests(self, files: Iterable[str], module: str, line: int) -> set[str] | None:
        """The ids of those in these files, without parameters; None if not known.

        That is so where the line is executed on import, or in another process.
        """
        contexts = {c for file in files for c in self._contexts(file, module, line)}
        if "" in contexts or not contexts:
            return None
        # As "id[parameters]|setup".
        return {context.rpartition("|")[0].partition("[")[0] for context in contexts}

    def _contexts(self, file: str, module: str, line: int) -> list[str]:
        path = self._kept / f"{file.replace('/', '.')}.coverage"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".new")
            top = Path(module).parts[0] if "/" in module else "."
            options = [f"--cov={top}", "--cov-context=test", "--cov-report="]
            self._run(file, options, {"COVERAGE_FILE": str(draft)})
            draft.replace(path)
        data = CoverageData(str(path))
        data.read()
        # The copies of a tree lie in directories of other names.
        [seen] = [f for f in data.measured_files() if f.endswith(f"/{module}")] or [""]
        return data.contexts_by_lineno(seen).get(line, [])


def _digest(paths: Iterable[Path]) -> str:
    """Of what stands in the files."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]
