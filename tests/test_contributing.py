"""What CONTRIBUTING.md asks: imports point down, and a method is entered everywhere."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
from registry import METHODS
from test_public_api import FUNCTIONS, is_factory

from benchmarks.accelerators.cases import CASES
from examples.common import methods as examples
from lowrank_optax._src import methods

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "lowrank_optax" / "_src"
# The rows of the table in "Where things go"; the last two stand side by side.
LAYERS = (
    *("linalg", "leaves", "parts", "kernels", "engines", "methods"),
    *("report", "training"),
)


def layers_imported(path):
    """The layers of `_src` that a module imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name.startswith("lowrank_optax._src."):
                    yield name.split(".")[2]


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_down(layer):
    assert layer in [path.name for path in SOURCE.iterdir()]
    above = LAYERS[LAYERS.index(layer) + 1 :]
    for path in sorted((SOURCE / layer).glob("*.py")):
        upwards = set(above) & set(layers_imported(path))
        assert not upwards, f"{path.relative_to(ROOT)} imports from {upwards}"


def functions():
    """All that the modules of methods define, but for what is private there."""
    for module in pkgutil.iter_modules(methods.__path__):
        path = f"{methods.__name__}.{module.name}"
        for name, x in vars(importlib.import_module(path)).items():
            own = inspect.isfunction(x) and x.__module__ == path
            if own and not name.startswith("_"):
                yield name, x


def factories():
    """The transformations and optimizers among them."""
    return ((name, x) for name, x in functions() if is_factory(x))


def test_every_function_says_what_it_returns():
    # By which a transformation is known, here and to whoever reads its signature.
    for name, x in functions():
        said = inspect.signature(x).return_annotation is not inspect.Signature.empty
        assert said, f"Annotate what {x.__module__}.{name} returns."


# Parts of several methods, which are no methods themselves.
SHARED = {"clip_by_matrix_rms", "optimizer"}
OWN = {name: x for name, x in factories() if name not in SHARED}
OPTIMIZERS = {
    k for k, x in OWN.items() if "learning_rate" in inspect.signature(x).parameters
}


def in_backticks(path):
    return set(re.findall(r"`(\w+)", (ROOT / path).read_text()))


PLACES = {
    "lowrank_optax/__init__.py, as `X as X` and in __all__": (OWN, FUNCTIONS),
    "tests/registry.py": (OWN, {method.name for method in METHODS}),
    "the table of README.md": (OWN, in_backticks("README.md")),
    "CHANGELOG.md": (OWN, in_backticks("CHANGELOG.md")),
    "METHODS of examples/common/methods.py": (OPTIMIZERS, examples.METHODS),
    "CASES of benchmarks/accelerators/cases.py": (OPTIMIZERS, CASES),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_method_is_in(place):
    expected, found = map(set, PLACES[place])
    missing = ", ".join(sorted(expected - found))
    assert not missing, f"Add {missing} to {place}."


def test_every_method_has_a_page(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    rows = importlib.import_module("tables.methods").METHODS
    shown = {name for row in rows for name in (row.transformation, row.optimizer)}
    missing = ", ".join(sorted(OWN.keys() - shown))
    assert not missing, f"Add {missing} to docs/tables/methods.py."
    pages = ROOT / "docs" / "methods"
    listed = (pages / "index.md").read_text().splitlines()
    for page in {row.page for row in rows} - {""}:
        assert (pages / f"{page}.md").exists(), f"Write docs/methods/{page}.md."
        assert page in listed, f"List {page} in docs/methods/index.md."
