"""The site's pages: their code runs, and the reference names all that is public."""

import importlib
import re
from pathlib import Path

import pytest
from test_public_api import MODULES, PUBLIC

DOCS = Path(__file__).parents[1] / "docs"
# Those that Sphinx executes are run when the site is built.
PAGES = [
    path
    for path in sorted(DOCS.rglob("*.md"))
    if not {"_build", "_generated"} & set(path.parts)
    and "```python\n" in path.read_text()
]


@pytest.mark.parametrize("path", PAGES, ids=lambda x: str(x.relative_to(DOCS)))
def test_python_blocks_run(path):
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(path), "exec"), names)


def test_all_methods_have_code():
    methods = set((DOCS / "methods").glob("*.md")) - {DOCS / "methods" / "index.md"}
    assert len(methods) >= 14 and methods <= set(PAGES)


def test_the_reference_names_all_that_is_public():
    text = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    named = re.findall(r"^\.\. auto(?:function|class|module):: (\S+)$", text, re.M)
    # Of a submodule, all members are taken.
    expected = {x for x in PUBLIC if "." not in x}
    assert sorted(named) == sorted(expected | {f"lowrank_optax.{x}" for x in MODULES})


def test_tables_are_made_of_the_records_and_the_code(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(DOCS)
    tables = importlib.import_module("tables")
    tables.write(tmp_path)
    made = {path.name for path in tmp_path.iterdir()}
    pages = [x.read_text() for x in DOCS.rglob("*.md") if "_build" not in x.parts]
    asked = set(re.findall(r"_generated/([\w-]+\.\w+)", "".join(pages)))
    assert asked and asked <= made
