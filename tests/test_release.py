"""What is said in several places is the same in all: version, addresses, actions."""

import re
import tomllib
from pathlib import Path

import pytest

import lowrank_optax as lro

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_the_version_is_that_of_the_package():
    version = re.escape(lro.__version__)
    assert "version" in PROJECT["dynamic"]
    assert re.search(
        rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(), re.M
    )
    changes = (ROOT / "CHANGELOG.md").read_text()
    (when,) = re.findall(
        rf"^## \[{version}\] - (unreleased|\d{{4}}-\d\d-\d\d)$", changes, re.M
    )
    # A tag is there once it is released.
    place = "commits/main" if when == "unreleased" else f"releases/tag/v{version}"
    assert re.search(rf"^\[{version}\]: \S+/{place}$", changes, re.M)


def test_addresses_are_those_of_the_project():
    repository = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
    owner, name = repository.split("/")
    assert PROJECT["urls"]["Documentation"] == f"https://{owner}.github.io/{name}"
    assert repository in (ROOT / "pyproject.toml").read_text().partition("[tool.")[2]
    folders = [ROOT / x for x in ("docs", "notebooks", "examples", "lowrank_optax")]
    files = [*ROOT.glob("*.md"), *(x for folder in folders for x in folder.rglob("*"))]
    found = set()
    for path in files:
        if path.suffix in {".md", ".py", ".ipynb"} and "_build" not in path.parts:
            found |= set(
                re.findall(rf"github(?:\.com)?/([\w-]+/{name})", path.read_text())
            )
    assert found == {repository}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda x: x.name)
def test_actions_are_pinned(path):
    used = re.findall(r"uses: ([^.].*)", path.read_text())  # ours begin with a dot
    # A tag can be moved; its name beside the hash is for the reader.
    assert used
    assert [x for x in used if not re.fullmatch(r"\S+@[0-9a-f]{40} # v[\d.]+", x)] == []
