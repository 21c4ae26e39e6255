"""The notebooks run, and what is committed of each is what its source puts out."""

import base64
import json
import re
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest

from notebooks import execute

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"
# Of a user's or of this machine's.
PRIVATE = re.compile(r"/(home|root|tmp|var|Users|work|content|opt|usr)\b|site-packages")

each = pytest.mark.parametrize("source", execute.SOURCES, ids=lambda path: path.stem)


def outputs(notebook):
    return [x for cell in notebook.cells for x in cell.get("outputs", ())]


def images(notebook):
    data = [x.data["image/png"] for x in outputs(notebook) if "data" in x]
    return [base64.b64decode(x) for x in data]


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def made_of(*cells):
    return nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in cells]
    )


@each
def test_it_runs_in_small(source):
    notebook = execute.run(execute.read(source), small=True)
    assert all(image.startswith(PNG) for image in images(notebook))
    assert images(notebook)


@each
def test_the_committed_notebook_is_of_its_source(source):
    committed = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(committed)
    expected = execute.read(source)
    assert [(cell.cell_type, cell.source) for cell in committed.cells] == [
        (cell.cell_type, cell.source) for cell in expected.cells
    ]
    assert committed.metadata == expected.metadata
    # All cells, in order, in one go.
    counts = [cell.execution_count for cell in code(committed)]
    assert counts == list(range(1, len(counts) + 1))

    assert images(committed) and all(x.startswith(PNG) for x in images(committed))
    for output in outputs(committed):
        assert output.output_type in ("stream", "display_data")
        assert output.get("name", "stdout") == "stdout"
    kept = [{**x, "data": None} for x in outputs(committed)]
    assert not PRIVATE.search(json.dumps(kept))


def test_no_notebook_is_without_a_source():
    found = sorted(execute.HERE.glob("*.ipynb"))
    assert found == [source.with_suffix(".ipynb") for source in execute.SOURCES]
    assert len(found) >= 6


def test_all_begin_alike_and_are_installed_from_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    url = project["urls"]["Repository"]
    colab = url.replace(
        "https://github.com", "https://colab.research.google.com/github"
    )
    first = {
        code(execute.read(x))[0].source.split("import jax")[0] for x in execute.SOURCES
    }
    assert len(first) == 1 and f'"{url}"' in first.pop()
    for source in execute.SOURCES:
        head = execute.read(source).cells[0].source
        assert f"({colab}/blob/main/notebooks/{source.stem}.ipynb)" in head


def test_the_kernel_is_this_interpreter_and_is_told_the_mode():
    ask = "import os, sys; print(sys.executable, os.environ['LOWRANK_OPTAX_SMALL'])"
    for small in (False, True):
        (output,) = outputs(execute.run(made_of(ask), small))
        assert output.text == f"{sys.executable} {int(small)}\n"


def test_tidying_takes_out_progress_bars_and_nothing_else():
    def with_stderr(text):
        notebook = made_of("1")
        notebook.cells[0].outputs = [
            nbformat.v4.new_output("stream", name=name, text=x)
            for name, x in (("stdout", "kept"), ("stderr", text))
        ]
        return notebook

    bars = "adamw: 0/3 |     | ETA ?\radamw: 3/3 |#####| ETA 00:00, loss 2.1\n"
    (output,) = outputs(execute.tidy(with_stderr(bars)))
    assert output.text == "kept"
    with pytest.raises(ValueError, match="stderr: UserWarning"):
        execute.tidy(with_stderr(bars + "UserWarning: look here\n"))


def test_an_unknown_name_is_refused(capsys):
    assert execute.main(["07_perpetual_motion"]) == 2
    assert "01_quick_start" in capsys.readouterr().err
