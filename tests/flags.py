"""What `--help` of a command must say."""

import ast
import dataclasses
import inspect
import re

import pytest


def explained(settings):
    """The text below each field of a dataclass and of those that it extends."""
    found = {}
    for part in settings.__mro__[:-1]:
        body = ast.parse(inspect.getsource(part)).body[0].body
        for field, text in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign):
                found[field.target.id] = " ".join(text.value.value.split())
    return found


def check_help(main, settings, capsys, monkeypatch):
    """Asserts that the help of a command shows each flag of it with its text."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    texts = explained(settings)
    assert texts.keys() == {field.name for field in dataclasses.fields(settings)}
    for name, text in texts.items():
        flag = name.replace("_", "-")
        assert f"--{flag}" in shown or f"--no-{flag}" in shown
        assert text in shown
