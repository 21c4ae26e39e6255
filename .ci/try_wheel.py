"""Tries what `make dist` built: its files, and the README in an empty environment.

Only what git has of the package is to be in it: no tests, no examples, nothing that lay
about. Needs a clone, and PyPI for what the package depends on.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Beside the package in the source archive; hatchling adds the second line by itself.
BESIDE = {
    "README.md", "CHANGELOG.md", "CITATION.cff",
    ".gitignore", "LICENSE", "PKG-INFO", "pyproject.toml",
}  # fmt: skip
METADATA = {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE"}


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    return subprocess.run(
        command, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def compare(found: set[str], expected: set[str], archive: Path) -> None:
    if found != expected:
        raise SystemExit(
            f"{archive.name}: too much: {sorted(found - expected)}, "
            f"missing: {sorted(expected - found)}."
        )


def check_files(wheel: Path, sdist: Path) -> None:
    package = set(run("git", "ls-files", "lowrank_optax").split())
    assert "lowrank_optax/py.typed" in package
    info = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    inside = set(zipfile.ZipFile(wheel).namelist())
    compare(inside, package | {f"{info}/{x}" for x in METADATA}, wheel)
    with tarfile.open(sdist) as archive:
        inside = {x.name.partition("/")[2] for x in archive if x.isfile()}
    compare(inside, package | BESIDE, sdist)


def try_readme(wheel: Path) -> None:
    """The first block of the README, with no more installed than the wheel needs."""
    text = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    table = re.search(r"```\n(path .*?)```", text, re.DOTALL).group(1)
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        run(python, "-m", "pip", "install", "--quiet", wheel)
        printed = run(python, "-c", code, cwd=Path(folder))
    if printed != table:
        raise SystemExit(f"The README says\n{table}and the wheel says\n{printed}")


if __name__ == "__main__":
    (wheel,), (sdist,) = (ROOT.glob(f"dist/*{x}") for x in (".whl", ".tar.gz"))
    check_files(wheel, sdist)
    try_readme(wheel)
    print(f"{wheel.name} runs the README on Python {sys.version.split()[0]}.")
