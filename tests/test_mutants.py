"""The script that makes mutants: what it changes, what it tries, and what it keeps."""

import ast
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.mutants import record, tests
from benchmarks.mutants.__main__ import ROOT, all_mutants
from benchmarks.mutants.mutate import KINDS, Mutant, mutants, sample
from benchmarks.mutants.running import Copy, Result

TOY = '''"""Prose with - 1."""
def scaled(x: Literal[1], b1=0.9, *, b2=0.5, axis=-1):
    """1 + 1."""
    if x < 0 and not b1:
        raise ValueError(f"{x + 1} < 0")
    y = jnp.where(x.mT > 3, jnp.minimum(x, -b1), x - 1)
    return mean(y / (1 - b2**x), axis=axis, keepdims=True), sum(y, axis=0), f"{x + 1}"
'''
CHANGES = {
    ("constant", "0.9", "1.8"),
    ("constant", "0.5", "1.0"),
    ("axis", "-1", "-2"),
    ("off by one", "0", "1"),
    ("comparison", "x < 0", "x <= 0"),
    ("comparison", "x < 0 and (not b1)", "x < 0 or not b1"),
    ("comparison", "not b1", "b1"),
    ("guard", "x < 0 and (not b1)", "False"),
    ("beta", "b1", "b2"),
    ("guard", "jnp.where(x.mT > 3, jnp.minimum(x, -b1), x - 1)", "jnp.minimum(x, -b1)"),
    ("comparison", "x.mT > 3", "x.mT >= 3"),
    ("transpose", "x.mT", "x"),
    ("off by one", "3", "4"),
    ("min/max", "jnp.minimum(x, -b1)", "jnp.maximum(x, -b1)"),
    ("sign", "-b1", "b1"),
    ("sign", "x - 1", "x + 1"),
    ("off by one", "1", "2"),
    ("bias correction", "1 - b2 ** x", "1.0"),
    ("beta", "b2", "b1"),
    ("keyword", "mean(y / (1 - b2 ** x), axis=axis, keepdims=True)",
     "mean(y / (1 - b2 ** x), keepdims=True)"),
    ("axis", "0", "1"),
}  # fmt: skip


def test_every_kind_of_mistake_is_made_and_no_text_is_touched():
    made = mutants("toy.py", TOY)
    assert {(m.kind, m.before, m.after) for m in made} == CHANGES
    assert {m.kind for m in made} == set(KINDS)
    assert len({m.id for m in made}) == len(made)
    original = ast.unparse(ast.parse(TOY))
    for m in made:
        changed = ast.unparse(ast.parse(m.source))
        assert changed != original
        rows = zip(TOY.splitlines(), m.source.splitlines(), strict=True)
        assert [i for i, (x, y) in enumerate(rows, 1) if x != y] == [m.line]


def test_a_mutant_is_known_by_its_content():
    made = {m.id: m for m in mutants("toy.py", TOY)}
    moved = mutants("toy.py", "z = 1\n" + TOY.replace("> 3", "> 4"))
    known = [m for m in moved if m.id in made]
    assert all(m.line == made[m.id].line + 1 for m in known)
    assert all(
        (m.before, m.after) == (made[m.id].before, made[m.id].after) for m in known
    )
    # Those of the expression that changed.
    gone = {m.line for i, m in made.items() if i not in {k.id for k in known}}
    assert gone == {6} and len(known) > 10


def test_the_sample_has_some_of_every_module_and_stays():
    found = all_mutants()
    chosen = sample(found, 330, seed=0)
    assert 300 <= len(chosen) <= 400
    assert {m.module for m in chosen} == {m.module for m in found}
    assert {m.kind for m in chosen} == set(KINDS)
    assert sample(found[::-1], 330, seed=0) == chosen
    assert sample(found, 330, seed=1) != chosen


def test_all_modules_have_tests_that_are_there():
    for module in {m.module for m in all_mutants()}:
        missing = [
            test for test in tests.tests_of(module) if not (ROOT / test).exists()
        ]
        assert not missing, module
    with pytest.raises(ValueError, match="No tests are known for .*unheard"):
        tests.tests_of("lowrank_optax/_src/unheard.py")


def toy_tree(root: Path) -> Path:
    """A package of two functions, of which one is tested."""
    files = {
        "toy.py": "def twice(x):\n    return x + x\n\n"
        "def half(x):\n    return x - x / 2\n",
        "tests/test_toy.py": "import toy\n\n"
        "def test_nothing():\n    assert toy.twice(0) == 0\n\n"
        "def test_twice():\n    assert toy.twice(3) == 6\n",
        "tests/conftest.py": "import os\n\nos.environ['XLA_FLAGS'] = ''\n\n"
        "def pytest_addoption(parser):\n    parser.addoption('--sample')\n",
        "pyproject.toml": "[tool.pytest.ini_options]\npythonpath = ['.']\n",
        ".gitignore": "ignored.py\n",
        "ignored.py": "",
        "benchmarks/__init__.py": "",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    package = root / "benchmarks" / "mutants"
    package.mkdir()
    for name in ("__init__.py", "quick_first.py"):
        shutil.copyfile(ROOT / "benchmarks" / "mutants" / name, package / name)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return root


def test_mutants_are_tried_in_a_copy(tmp_path):
    tree = toy_tree(tmp_path / "tree")
    before = (tree / "toy.py").read_text()
    copy = Copy(tree, tmp_path / "copy", tmp_path / "kept", limit=60.0)
    assert not (copy.root / "ignored.py").exists()
    made = {m.before: m for m in mutants("toy.py", before) if m.kind == "sign"}
    results = {k: copy.try_(m, ["tests/test_toy.py"]) for k, m in made.items()}
    name = "tests/test_toy.py::test_twice"
    assert (results["x + x"].outcome, results["x + x"].by) == ("killed", name)
    assert (results["x - x / 2"].outcome, results["x - x / 2"].by) == ("survived", "")
    assert (tree / "toy.py").read_text() == (copy.root / "toy.py").read_text() == before
    # What no test executes is tried with all of them.
    [reached] = (tmp_path / "kept" / "reached").glob("*/*.coverage")
    assert reached.name == "tests.test_toy.py.coverage"
    seconds = json.loads((tmp_path / "kept" / "seconds.json").read_text())
    assert seconds.keys() == {name, name.replace("twice", "nothing")}
    hurried = Copy(tree, tmp_path / "other", tmp_path / "kept", limit=0.0)
    left = hurried.try_(made["x - x / 2"], ["tests/test_toy.py"])
    assert left.outcome == "too slow"
    copy.check([name])
    (copy.root / "toy.py").write_text(made["x + x"].source)
    with pytest.raises(RuntimeError, match="test_twice fails without a mutant"):
        copy.check([name])


def test_only_tests_that_execute_the_line_are_run(tmp_path):
    tree = toy_tree(tmp_path / "tree")
    toy = "def twice(x):\n    if x:\n        return x + x\n    return 0\n"
    (tree / "toy.py").write_text(toy)
    kept = tmp_path / "kept"
    copy = Copy(tree, tmp_path / "copy", kept, limit=60.0)
    made = {(m.kind, m.before): m for m in mutants("toy.py", toy)}
    sign, zero = made["sign", "x + x"], made["off by one", "0"]
    own = "tests/test_toy.py::test_nothing", "tests/test_toy.py::test_twice"
    assert copy.try_(sign, ["tests/test_toy.py"]).by == own[1]
    assert copy.try_(zero, ["tests/test_toy.py"]).by == own[0]
    # The quickest of all would have been the other one, which now fails too.
    toy_tests = copy.root / "tests" / "test_toy.py"
    toy_tests.write_text(toy_tests.read_text().replace("== 0", "== 1"))
    assert copy.try_(sign, ["tests/test_toy.py"]).by == own[1]
    # Another tree's tests were not seen yet.
    text = toy_tests.read_text()
    (tree / "tests" / "test_toy.py").write_text(text)
    other = Copy(tree, tmp_path / "other", kept, limit=60.0)
    with pytest.raises(RuntimeError, match="fails without a mutant"):
        other.try_(sign, ["tests/test_toy.py"])


def test_the_record_counts_what_still_stands(tmp_path, monkeypatch):
    made = [m for m in mutants("toy.py", TOY) if m.kind == "sign"]
    assert len(made) == 2
    results = record.Results(tmp_path / "mutants.jsonl")
    results.add(made[0], Result("survived", "", 1.0))
    results.add(made[1], Result("survived", "", 1.0))
    results.add(made[1], Result("killed", "test", 2.0))  # once there was a test
    results.add(
        Mutant("gone", "toy.py", 1, "sign", "", "a", "b", ""),
        Result("killed", "test", 1.0),
    )
    again = record.Results(tmp_path / "mutants.jsonl").all
    assert again == results.all
    counts = {"killed": 1, "survived": 1, "too slow": 0, "equivalent": 0}
    assert record.figures(made, again)["all"] == counts
    page = record.page(made, again, left=3)
    assert "of the other 2, 1 were killed, 50.0%" in page and "3 of the sample" in page
    assert f"{made[0].id}, toy.py:6 `scaled`, sign: `x - 1` became `x + 1`" in page
    monkeypatch.setitem(record.EQUIVALENT, made[0].id, "that is so")
    page = record.page(made, again, left=0)
    assert "of the other 1, 1 were killed, 100.0%" in page and "that is so" in page
