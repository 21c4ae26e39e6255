"""A task that needs no download: which package of the standard library is this from?"""

import ast
import hashlib
import platform
import re
from collections import defaultdict

import numpy as np

from examples.common.data import stdlib_documents
from examples.roberta.data import Dataset, Examples
from examples.roberta.tasks import Preset, Task

_SNIPPET = 400  # characters
_PACKAGES = 10
_FEWEST_FILES = 5  # of a package, so that it can be split by file
_HELD_OUT = 5  # one file of so many
_MASK = "PACKAGE"

STDLIB = Task(
    name="stdlib",
    title="packages of the standard library",
    preset=Preset(
        epochs=3,
        batch_size=32,
        max_length=128,
        update_every=50,
        full=1e-3,
        mlorc=1e-3,
        lora=5e-3,
        galore=5e-3,
        ldadamw=1e-3,
        train_examples=3000,
        validation_examples=800,
    ),
    texts=(("snippet",),),
)


def load_stdlib() -> tuple[Dataset, tuple[str, ...]]:
    """Snippets of the sources with their packages, and docstrings to pre-train on.

    The classes are the packages with most text. Their names are masked in every
    snippet. Files are held out whole, and no docstring of them is trained on.

    Returns:
      The data set, and the docstrings.
    """
    files = defaultdict(dict)
    documents = stdlib_documents()
    for name, text in documents:
        package, _, rest = name.partition("/")
        if rest:
            files[package][name] = text
    sizes = {
        package: sum(map(len, texts.values()))
        for package, texts in files.items()
        if len(texts) >= _FEWEST_FILES
    }
    packages = sorted(sorted(sizes, key=lambda p: -sizes[p])[:_PACKAGES])
    own_name = re.compile("|".join(packages), re.IGNORECASE)
    parts = {"train": ([], []), "validation": ([], [])}
    held_out = set()
    for label, package in enumerate(packages):
        names = sorted(
            files[package], key=lambda n: hashlib.sha256(n.encode()).digest()
        )
        held_out |= set(names[: -(-len(names) // _HELD_OUT)])
        for name in sorted(names):
            texts, labels = parts["validation" if name in held_out else "train"]
            masked = own_name.sub(_MASK, files[package][name])
            for start in range(0, len(masked) - _SNIPPET + 1, _SNIPPET):
                texts.append((masked[start : start + _SNIPPET],))
                labels.append(label)
    train, validation = (
        Examples(texts, np.array(labels, np.int32)) for texts, labels in parts.values()
    )
    docstrings = tuple(
        docstring
        for name, text in documents
        if name not in held_out
        for docstring in _docstrings(text)
    )
    source = f"the standard library of Python {platform.python_version()}"
    return Dataset(source, tuple(packages), train, {"": validation}), docstrings


def _docstrings(text: str) -> list[str]:
    found, bodies = [], [ast.parse(text)]
    while bodies:
        node = bodies.pop()
        if docstring := ast.get_docstring(node):
            found.append(docstring)
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        bodies += [child for child in node.body if isinstance(child, kinds)]
    return found
