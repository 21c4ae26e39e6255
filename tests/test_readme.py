"""The Python blocks of the documents run, as a reader pastes them."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from benchmarks.record import interval

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "name", ["README.md", "COMPOSITIONS.md", "CONTRIBUTING.md", "MATRICES.md"]
)
def test_python_blocks_run(name, capsys):
    text = (ROOT / name).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    if name == "README.md":
        (table,) = re.findall(r"```\n(path .*?)```", text, re.DOTALL)
        assert capsys.readouterr().out == table  # describe's
    if name == "COMPOSITIONS.md":
        assert len(capsys.readouterr().out.splitlines()) == len(names["compositions"])


def anchors(path):
    """What GitHub and the site name the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", x.lower()).replace(" ", "-") for x in headings}


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("*.md")))
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", (ROOT / name).read_text())
    for path, anchor in links:
        target = ROOT / (path or name)
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_links_to_the_site_lead_to_its_pages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    site = re.escape(project["urls"]["Documentation"])
    text = (ROOT / "README.md").read_text()
    links = re.findall(rf"\]\({site}(?:/([^)#]*)\.html)?#?([^)]*)\)", text)
    assert len(links) == text.count(project["urls"]["Documentation"]) > 10
    for page, anchor in links:
        target = ROOT / "docs" / f"{page or 'index'}.md"
        assert target.exists(), page
        assert not anchor or anchor in anchors(target), f"{page}#{anchor}"


def test_the_losses_compared_are_those_of_the_record():
    text = (ROOT / "README.md").read_text()
    (names, figures) = re.search(
        r"95 % interval:\n\n\|(.*)\|\n\|[-|]+\|\n\|(.*)\|\n", text
    ).groups()
    record = json.loads((ROOT / "benchmarks/records/comparison.json").read_text())
    found = record["figures"]["equal_rank"]
    adamw = found["adamw"]["losses"]
    for name, figure in zip(names.split("|"), figures.split("|"), strict=True):
        losses = found[name.strip(" `")]["losses"]
        assert len(losses) == 5
        mean, half = interval([losses[seed] - adamw[seed] for seed in adamw])
        assert figure.strip() == f"{mean:+.3f} ± {half:.3f}"
