"""What the tests tried every method with, from the record of `make contract`."""

import collections
import itertools
import re

from tables.records import ROOT, record, rows

# Sections of the tests, or whole files, as a reader looks for them.
AREAS = {
    "JAX": (
        "Transformations of JAX",
        "The end of what is counted",
        "Generators of random numbers",
        "Traces",
        "Derivatives",
        "test_threads.py",
    ),
    "Optax and Flax": (
        "Optax's wrappers",
        "Flax NNX",
        "Masks and labels by functions",
        "Linen's boxes",
        "test_inject.py",
        "test_decay.py",
    ),
    "dtypes": ("Dtypes", "Numbers of other widths", "Numbers of other kinds"),
    "trees and shapes": ("Trees and shapes", "test_any_params.py", "test_saving.py"),
    "gradients": ("Adversarial gradients", "Gradients", "test_faults.py"),
    "states": ("States", "Orbax"),
    "devices": (
        "Placements",
        "test_sharding.py",
        "test_average.py",
        "test_many_devices.py",
    ),
}


_AREA_OF = {section: area for area, found in AREAS.items() for section in found}
# These go by engine, and not by the registry.
_BY_METHOD = [area for area in AREAS if area != "devices"]
_PROPER = {
    **{x.lower(): x for x in ("Adam", "Linen", "NNX", "Optax")},
    **{x: f"`{x}`" for x in ("chain", "cond", "masked", "pmap", "vmap")},
}


def _sections() -> dict[str, list[str]]:
    """Tests of the record by section, in the order of AREAS and of the files."""
    recorded = {test for tests in record("contract").values() for test in tests}
    found: dict[str, list[str]] = {section: [] for section in _AREA_OF}
    for file in sorted({test.partition("::")[0] for test in recorded}):
        section = file
        text = (ROOT / "tests" / file).read_text()
        # A section begins with a comment that stands alone.
        for comment, test in re.findall(
            r"(?<=\n\n)# (.+)(?=\n\n)|def (test_\w+)\(", text
        ):
            section = comment if comment in _AREA_OF else section
            if f"{file}::{test}" in recorded:
                found[section].append(f"{file}::{test}")
    return found


def by_method() -> str:
    """Cases that passed: a line a public name, a column an area."""
    runs, counts = record("contract"), collections.Counter[tuple[str, str, str]]()
    for section, tests in _sections().items():
        for run, test in itertools.product(runs, tests):
            for method, cases in runs[run].get(test, {}).items():
                counts[run, method.partition("-")[0], _AREA_OF[section]] += cases
    methods = sorted({method for _, method, _ in counts} - {""})
    lines = []
    for method in methods:
        cells = [[counts[run, method, area] for run in runs] for area in _BY_METHOD]
        texts = (" / ".join(map(str, cell)) if any(cell) else "" for cell in cells)
        lines.append((f"{{py:obj}}`~lowrank_optax.{method}`", *texts))
    return rows(("", *_BY_METHOD), lines, figures=True)


def by_test() -> str:
    """Every test, how many methods it tried, and how many cases passed."""
    runs, sections = record("contract"), _sections()
    heads = [run.split(", ")[1] for run in runs]  # its jax
    texts = []
    for area, names in AREAS.items():
        lines = []
        for test in itertools.chain(*(sections[name] for name in names)):
            cells = [tests.get(test, {}) for tests in runs.values()]
            methods = {method for cell in cells for method in cell} - {""}
            lines.append(
                (_sentence(test), str(len(methods) or ""), *map(_cases, cells))
            )
        title = f"### {area[0].upper()}{area[1:]}\n\n"
        table = rows(("", "methods", *heads), lines, figures=True)
        texts.append(f"{title}:::{{container}} figures\n{table}\n:::\n")
    return "\n".join(texts)


def _sentence(test: str) -> str:
    """A test's name, which is one."""
    words = test.partition("::test_")[2].split("_")
    first, *rest = (_PROPER.get(x, x) for x in words)
    return " ".join((first[0].upper() + first[1:], *rest))


def _cases(methods: dict[str, int]) -> str:
    if 0 in methods.values():
        failed = [name for name, cases in methods.items() if not cases]
        return f"failed: {', '.join(failed)}"
    return str(sum(methods.values()) or "")


def summary() -> str:
    """How many cases passed in each run."""
    return "\n".join(
        f"- {run}: {sum(sum(x.values()) for x in tests.values()):,} cases of "
        f"{len(tests)} tests."
        for run, tests in record("contract").items()
    )
