"""The site's pages: their code runs, and the reference names all that is public."""

import importlib
import json
import re
from pathlib import Path

import matplotlib
import pytest
from registry import METHODS
from test_public_api import MODULES, PUBLIC

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Those that Sphinx executes are run when the site is built; what trainers need is run
# where there is one, see tests/trainers.
PAGES = [
    path
    for path in sorted(DOCS.rglob("*.md"))
    if not {"_build", "_generated", "trainers.md"} & set(path.parts)
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
    missing = expected - set(named)
    assert not missing, f"Add {', '.join(sorted(missing))} to a page of docs/api."
    assert sorted(named) == sorted(expected | {f"lowrank_optax.{x}" for x in MODULES})


@pytest.fixture
def tables(monkeypatch):
    """The package that makes the site's tables; it has plots drawn as SVG."""
    backend = matplotlib.get_backend()
    monkeypatch.syspath_prepend(DOCS)
    yield importlib.import_module("tables")
    matplotlib.use(backend)


def test_tables_are_made_of_the_records_and_the_code(tables, tmp_path):
    tables.write(tmp_path)
    made = {path.name for path in tmp_path.iterdir()}
    pages = [x.read_text() for x in DOCS.rglob("*.md") if "_build" not in x.parts]
    asked = set(re.findall(r"_generated/([\w-]+\.\w+)", "".join(pages)))
    assert asked and asked <= made


def test_the_contract_is_of_the_methods_and_tests_that_there_are():
    runs = json.loads((ROOT / "benchmarks/records/contract.json").read_text())
    tests = {test: cases for run in runs.values() for test, cases in run.items()}
    for test in tests:
        file, name = test.split("::")
        text = (ROOT / "tests" / file).read_text()
        assert f"def {name}(" in text, f"`make contract` again: {test} is gone."
    names = {method.name for method in METHODS}
    tried = {name for cases in tests.values() for name in cases} - {""}
    assert not names - tried, f"`make contract METHOD={min(names - tried)}` records it."
    assert not tried - names, f"`make contract` again: {tried - names} are gone."
    for run in runs.values():
        assert all(all(cases.values()) for cases in run.values()), "Some failed."


def test_claims_are_judged_by_intervals_of_paired_differences(tables, monkeypatch):
    papers = tables.papers
    seeds = {str(seed): 4.0 + seed for seed in range(5)}
    known = {
        "galore_adamw": seeds,
        # Of seeds that differ far more than the methods do.
        "i3s_adamw": {k: x - 0.02 + 0.001 * int(k) for k, x in seeds.items()},
        "lion": {k: x + 0.01 * (-1) ** int(k) for k, x in seeds.items()},
    }
    monkeypatch.setattr(papers, "losses", lambda name: known.get(name, {}))
    shown, verdict = papers.ahead("i3s_adamw", "galore_adamw")()
    # 2.776 is the quantile of 4 degrees of freedom.
    half = 2.776 * 0.001 * (2.5 / 5) ** 0.5
    assert shown.endswith(f": -0.018 ± {half:.3f}") and verdict == "yes"
    assert papers.ahead("galore_adamw", "i3s_adamw")()[1] == "no"
    assert papers.ahead("lion", "galore_adamw")()[1] == "not told apart"
    verdict = papers.alike("lion", "galore_adamw")()[1]
    assert verdict == "not told apart, to within 0.016"
    known["one"] = {"0": 3.0}
    assert papers.ahead("one", "galore_adamw")()[1] == "one seed only"
    assert papers.alike("galore_adamw", "i3s_adamw")()[1] == "no, it is behind"
    assert papers.ahead("lion", "sgd")()[1] == "not run yet"
