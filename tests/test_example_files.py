"""Files of the examples: written aside, checked when read, one process at a time."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from examples.common.data import load_corpus
from examples.common.errors import BadFile, one_line
from examples.common.files import aside, read_object, read_or_make, write_json
from examples.common.lock import sole_use
from examples.common.metrics import MetricsLog, read_metrics
from examples.common.settings import read_record, write_record
from examples.common.tokens import (
    TokenizedCorpus,
    check_tokens,
    read_tokenizer,
    save_tokenizer,
)
from examples.common.typed import checked_fields
from examples.common.weights import read_tensors, write_tensors
from examples.llama import finetune, pretrain
from examples.llama.instructions import read_instructions
from examples.roberta import glue
from examples.roberta.data import read_examples
from examples.roberta.tasks import GLUE
from tests.faults import DAMAGES, full_disk, remove

# Writing

WORDS = {f"word{i}": i for i in range(5000)}
LARGE = np.arange(50_000, dtype=np.float32)


def by_numpy(path):
    with aside(path) as draft, draft.open("wb") as file:
        np.save(file, LARGE)


def by_cache(path):
    TokenizedCorpus(Tokenizer(models.BPE()), LARGE[:9], LARGE).save(path.parent)


WRITERS = {
    "validation.npy": by_cache,
    "a.json": lambda path: write_json(path, WORDS),
    "a.npy": by_numpy,
    "model.safetensors": lambda path: write_tensors(path.parent, {"w": LARGE}),
    "tokenizer.json": lambda path: save_tokenizer(
        Tokenizer(models.BPE(vocab=WORDS, merges=[])), path
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_older_file_and_names_it(name, tmp_path):
    path = tmp_path / name
    path.write_text("older")
    with full_disk(4096), pytest.raises(OSError, match="Cannot write") as caught:
        WRITERS[name](path)
    assert str(path) in one_line(caught.value)
    assert path.read_text() == "older"
    WRITERS[name](path)
    assert path.stat().st_size > 4096
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("place", ["file", "draft"])
def test_a_link_is_replaced_and_not_written_through(place, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    path = tmp_path / "inside" / "a.json"
    path.parent.mkdir()
    link = path if place == "file" else path.with_name("a.json.tmp")
    link.symlink_to(outside)
    write_json(path, {"a": 1})
    assert outside.read_text() == "mine"
    assert not path.is_symlink() and json.loads(path.read_text()) == {"a": 1}


def test_metrics_that_no_longer_fit_are_one_error_with_a_path(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with full_disk(90), pytest.raises(OSError) as caught:
        with MetricsLog(path) as log:
            for step in range(9):
                log.write({"step": step, "loss": 0.5})
    assert str(path) in str(caught.value)
    # What was whole is there, and the torn line behind it is no error.
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2]


# Reading JSON

DEEP = "[" * 100_000 + "]" * 100_000
NOT_JSON = {
    "nothing": "",
    "half": '{"a": 1',
    "deep": DEEP,
    "deep object": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "digits": '{"a": ' + "9" * 5000 + "}",
    "list": "[1]",
    "null": "null",
}


@pytest.mark.parametrize("text", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_no_object_is_one_error_with_a_path(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(BadFile) as caught:
        read_object(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 300
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(BadFile, match="not UTF-8"):
        read_object(path)


def test_what_was_made_is_checked_when_it_is_read_again(tmp_path):
    path = tmp_path / "a.json"

    def check(value):
        if value != [1]:
            raise ValueError("it is not [1].")
        return "checked"

    assert read_or_make(path, lambda: [1], check) == "checked"
    path.write_text("[2]")
    with pytest.raises(BadFile, match=r"a\.json is not as it was written: it is not"):
        read_or_make(path, lambda: [1], check)
    assert path.read_text() == "[2]"


@dataclass(frozen=True)
class Fields:
    count: int
    share: float = 0.5
    names: tuple[str, ...] = ("a",)
    kind: Literal["x", "y"] = "x"
    maybe: int | None = None
    flag: bool = False
    anything: Any = None


GOOD_FIELDS = {"count": 3, "share": 1, "names": ["b", "c"], "maybe": None, "flag": True}


def test_fields_of_the_right_types_are_taken():
    found = Fields(**checked_fields(Fields, GOOD_FIELDS))
    assert found == Fields(3, 1, ("b", "c"), flag=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": "3"}, "count must be int, got '3'"),
        ({"count": True}, "count must be int, got True"),
        ({"count": 3.0}, "count must be int"),
        ({"count": None}, "count must be int"),
        ({"share": "x"}, "share must be float"),
        ({"share": False}, "share must be float"),
        ({"names": "b"}, "names must be"),
        ({"names": ["b"] * 20 + [1]}, "names must be"),
        ({"names": [["b"]]}, "names must be"),
        ({"kind": "z"}, "kind must be"),
        ({"maybe": "x"}, "maybe must be int | None, got 'x'"),
        ({"maybe": True}, "maybe must be"),
        ({"flag": 1}, "flag must be bool, got 1"),
        ({"other": 1}, "unknown field 'other'"),
    ],
    ids=str,
)
def test_fields_of_other_types_are_named(change, said):
    with pytest.raises(ValueError) as caught:
        checked_fields(Fields, GOOD_FIELDS | change)
    assert said in str(caught.value)
    for value in (None, [], "x"):
        with pytest.raises(ValueError, match="not an object"):
            checked_fields(Fields, value)
    with pytest.raises(ValueError, match="it lacks count"):
        checked_fields(Fields, {})


# The record of a run


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_record_is_refused(damage, tmp_path):
    facts = {"settings": {"steps": 3, "rates": (0.1, 2.5e-7)}, "device": "a"}
    write_record(tmp_path, facts)
    assert read_record(tmp_path) == json.loads(json.dumps(facts))
    path = tmp_path / "run.json"
    damage(path)
    with pytest.raises(FileNotFoundError if damage is remove else BadFile) as caught:
        read_record(tmp_path)
    assert str(path) in str(caught.value)


def test_an_edited_record_is_refused(tmp_path):
    write_record(tmp_path, {"settings": {"steps": 3}})
    path = tmp_path / "run.json"
    path.write_text(path.read_text().replace("3", "4", 1))
    with pytest.raises(BadFile, match=r"run\.json is not as it was written"):
        read_record(tmp_path)


# Metrics

LINES = [{"step": 0, "loss": 2.5}, {"step": 1, "loss": 1.5}, {"step": 3, "loss": 1.0}]


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "3", "null", '{"loss": 1}', '{"step": "2"}', '{"step": true}', DEEP]
    + ['{"step": 1}', '{"step": 0}', '{"step": -1}', '{"step": 1.5}'],
    ids=lambda line: line[:20],
)
def test_a_damaged_line_of_metrics_is_named(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(record) for record in LINES]
    path.write_text("\n".join([*lines[:2], line, lines[2]]) + "\n")
    with pytest.raises(BadFile) as caught:
        read_metrics(path)
    assert f"{path}, line 3: not the record of a step" in str(caught.value)
    # A last line that was not written to its end is what a kill leaves.
    path.write_text("\n".join([*lines, '{"step": 4, "lo']))
    assert read_metrics(path) == LINES


# One process at a time


def test_another_process_is_kept_out(tmp_path):
    program = (
        "import sys; from pathlib import Path\n"
        "from examples.common.lock import sole_use\n"
        "with sole_use(Path(sys.argv[1]), resumed=True):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    root = Path(__file__).parents[1]
    out = tmp_path / "run"
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(out)],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout.readline() == b"held\n"
        for resumed in (True, False):
            with pytest.raises(ValueError, match="another process does") as caught:
                with sole_use(out, resumed):
                    pass
            assert str(out) in str(caught.value)
    finally:
        # Killed: the system lets go for it.
        other.kill()
        other.communicate()
    with sole_use(out, resumed=False):
        (out / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="not empty"):
        with sole_use(out, resumed=False):
            pass


# Weights


@pytest.fixture
def shards(tmp_path):
    """A directory with two shards, and a file outside of it."""
    directory = tmp_path / "model"
    (directory / "deep").mkdir(parents=True)
    save_file({"a": LARGE[:3]}, directory / "one.safetensors")
    save_file({"b": LARGE[:2]}, directory / "deep" / "two.safetensors")
    save_file({"b": LARGE[:2]}, tmp_path / "outside.safetensors")
    return directory


def write_index(directory, weight_map):
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def test_shards_inside_of_the_directory_are_read(shards, tmp_path):
    write_index(shards, {"a": "one.safetensors", "b": "deep/two.safetensors"})
    assert set(read_tensors(shards)) == {"a", "b"}
    # The hub's cache is made of links to where the contents are.
    (shards / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    write_index(shards, {"a": "one.safetensors", "b": "link.safetensors"})
    assert set(read_tensors(shards)) == {"a", "b"}


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "deep/../../outside.safetensors",
        "..\\outside.safetensors",
        "C:\\outside.safetensors",
        "absolute",
        "",
        "one.safetensors\0",
        5,
        None,
        ["one.safetensors"],
    ],
    ids=str,
)
def test_a_shard_outside_of_the_directory_is_refused(name, shards, tmp_path):
    if name == "absolute":
        name = str(tmp_path / "outside.safetensors")
    index = write_index(shards, {"a": "one.safetensors", "b": name})
    with pytest.raises(ValueError) as caught:
        read_tensors(shards)
    assert str(index) in str(caught.value) and repr(name) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', DEEP])
def test_an_index_that_is_none_is_named(text, shards):
    index = write_index(shards, {})
    index.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_tensors(shards)
    assert str(index) in str(caught.value)


def raw_safetensors(dtype, size):
    header = {"w": {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "U16"])
def test_a_type_that_cannot_be_used_is_named(dtype, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_safetensors(dtype, 2 if dtype == "U16" else 1))
    with pytest.raises(ValueError) as caught:
        read_tensors(tmp_path)
    assert str(path) in str(caught.value)
    assert dtype in str(caught.value)
    for usable, size in (("F32", 4), ("BF16", 2), ("F16", 2), ("F64", 8), ("I64", 8)):
        path.write_bytes(raw_safetensors(usable, size))
        assert read_tensors(tmp_path)["w"].shape == (1,)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 7, b"\xff" * 16, (2**40).to_bytes(8, "little") + b"{}"],
)
def test_weights_that_are_none_are_named(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_tensors(tmp_path)
    assert str(path) in str(caught.value)


def test_written_weights_are_read_back(tmp_path):
    write_tensors(tmp_path, {"w": LARGE.reshape(50, -1).T})
    found = load_file(tmp_path / "model.safetensors")["w"]
    np.testing.assert_array_equal(found, LARGE.reshape(50, -1).T)


# Tokenizers


def spoiled_tokenizer(path, **parts):
    good = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    path.write_text(json.dumps(json.loads(good.to_str()) | parts))


MARKS = {"type": "RobertaProcessing", "trim_offsets": True, "add_prefix_space": False}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "gone", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"model": {"type": "none"}}, "is no tokenizer"),
        # In these two Rust panics, which is no Exception.
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AA"}}, ""),
        ({"post_processor": TEMPLATE}, ""),
        ({"post_processor": MARKS | {"sep": ["a", 9], "cls": ["b", 1]}}, "token 9"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}}, "UNK"),
    ],
    ids=["model", "panic on loading", "panic on encoding", "marks", "unknown"],
)
def test_a_tokenizer_that_cannot_be_used_is_named(parts, said, tmp_path):
    path = tmp_path / "tokenizer.json"
    spoiled_tokenizer(path)
    check_tokens(read_tokenizer(path), 3, path)
    spoiled_tokenizer(path, **parts)
    with pytest.raises(BadFile) as caught:
        check_tokens(read_tokenizer(path), 3, path)
    assert str(path) in str(caught.value) and said in str(caught.value)
    assert len(str(caught.value)) < 300


# JSON lines, by the three commands

READERS = {
    "pretrain": (lambda path: load_corpus(f"path:{path}", 0), {"text": "good"}),
    "finetune": (read_instructions, {"mr": "good", "ref": "good"}),
    "glue": (
        lambda path: read_examples(path, GLUE["mrpc"]),
        {"sentence1": "good", "sentence2": "good", "label": 1},
    ),
}


@pytest.fixture(params=READERS)
def reader(request):
    read, row = READERS[request.param]
    return read, next(iter(row)), row


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\0"])
def test_separators_inside_of_a_string_are_text(inside, reader, tmp_path):
    read, name, row = reader
    path = tmp_path / "a.jsonl"
    changed = row | {name: f"one{inside}two"}
    lines = [json.dumps(changed, ensure_ascii=False), "", " \r", json.dumps(row)]
    text = "\n".join(lines) + "\n"
    if inside == "\0":
        text = text.replace("\0", "\\u0000")  # JSON has it escaped only
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = read(path)
    if hasattr(found, "train"):
        texts = found.train + found.validation
    elif hasattr(found, "texts"):
        texts = [text for pair in found.texts for text in pair]
    else:
        texts = [example.prompt for example in found]
    assert any(f"one{inside}two" in text for text in texts)


BAD_LINES = {
    "number": 5,
    "null": None,
    "list": ["x"],
    "missing": "missing",
    "surrogate": "\ud800",
    "half pair": "a\udc00b",
    "deep": DEEP,
    "no object": "[1]",
    "half": '{"text": "a',
}


def with_bad_line(path, bad, name, row):
    value = BAD_LINES[bad]
    if bad == "missing":
        line = json.dumps({k: v for k, v in row.items() if k != name})
    elif bad in ("deep", "no object", "half"):
        line = value
    else:
        line = json.dumps(row | {name: value})
    path.write_text(f"{json.dumps(row)}\n\n{line}\n")


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_is_named_with_file_and_line(bad, reader, tmp_path):
    read, name, row = reader
    path = tmp_path / "a.jsonl"
    with_bad_line(path, bad, name, row)
    with pytest.raises(ValueError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith((f"{path}, line 3:", f"{path}: row 3"))
    assert len(message) < 300 and message.isprintable()
    message.encode()


COMMANDS = {
    "pretrain": (pretrain.main, "--data=path:{}"),
    "finetune": (finetune.main, "--data={}"),
    "glue": (glue.main, "--task=mrpc --data={}"),
}


@pytest.mark.parametrize("bad", ["null", "surrogate", "half"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_refuses_a_bad_line_in_one_line(command, bad, tmp_path, capsys):
    main, flags = COMMANDS[command]
    row = READERS[command][1]
    path = tmp_path / "a.jsonl"
    with_bad_line(path, bad, next(iter(row)), row)
    out = tmp_path / "run"
    assert main([*flags.format(path).split(), f"--out={out}"]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith((f"{command}: {path}, line 3:", f"{command}: {path}: row 3"))
    assert line.isprintable() and printed.out == "" and not out.exists()
