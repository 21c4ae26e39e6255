"""The Python blocks of the documents run, as a reader pastes them."""

import re
from pathlib import Path

import pytest

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
