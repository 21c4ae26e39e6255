"""The Python blocks of the documents run, as a reader pastes them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "name", ["README.md", "COMPOSITIONS.md", "CONTRIBUTING.md", "MATRICES.md"]
)
def test_python_blocks_run(name, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)
    if name == "README.md":
        assert "(512, 1376)" in capsys.readouterr().out  # describe's table
    if name == "COMPOSITIONS.md":
        assert len(capsys.readouterr().out.splitlines()) == len(names["compositions"])
