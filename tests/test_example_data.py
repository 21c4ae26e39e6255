"""The examples' text: sources, split, tokenizer, packing, order of the batches."""

import hashlib
import socket
import sys
import sysconfig
import tokenize as python_tokenize
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from examples.common.data import Corpus, load_corpus
from examples.common.tokens import Packed, TokenizedCorpus, tokenize


@pytest.fixture(scope="module")
def stdlib():
    return load_corpus("stdlib", hub_bytes=0)


@pytest.fixture
def books(tmp_path):
    """A directory of forty short files of three kinds, and one that is no text."""
    root = tmp_path / "books"
    (root / "deep").mkdir(parents=True)
    for number in range(38):
        (root / f"{number}.txt").write_text(f"This is book {number}. " * 20)
    (root / "deep" / "notes.md").write_text("Notes.")
    (root / "deep" / "lines.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (root / "cover.png").write_bytes(b"\x89PNG\xff")
    return root


def read_source(path):
    with python_tokenize.open(path) as file:
        return file.read()


# Sources and split


def test_stdlib_is_pythons_own_source(stdlib):
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = set(stdlib.train + stdlib.validation)
    for wanted in ("ast.py", "json/decoder.py", "email/message.py"):
        assert read_source(root / wanted) in texts
    assert read_source(Path(np.__file__).parent / "matlib.py") not in texts
    assert sum(map(len, texts)) > 5_000_000


def test_stdlib_leaves_out_packages_tests_and_tables(tmp_path, monkeypatch):
    for name in (
        "kept.py",
        "package/kept.py",
        "package/not_python.txt",
        "site-packages/numpy/left_out.py",
        "test/left_out.py",
        "package/tests/left_out.py",
        "encodings/left_out.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "old.py").write_bytes("# coding: latin-1\n# é".encode("latin-1"))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = load_corpus("stdlib", 0)
    assert set(corpus.train + corpus.validation) == {
        "kept.py",
        "package/kept.py",
        "# coding: latin-1\n# é",
    }


def test_stdlib_holds_out_a_twentieth_of_the_files(stdlib):
    files = len(stdlib.train) + len(stdlib.validation)
    assert len(stdlib.validation) == files // 20
    # No file is on both sides; a few empty or equal files may be.
    long = {text for text in stdlib.train if len(text) > 1000}
    assert not long & set(stdlib.validation)


def test_the_split_is_deterministic_and_follows_the_names_alone(books):
    before = load_corpus(f"path:{books}", 0)
    assert load_corpus(f"path:{books}", 0) == before
    held_out = {text.split(".")[0] for text in before.validation}
    for file in books.glob("*.txt"):
        file.write_text(file.read_text() + "A new ending.")
    after = load_corpus(f"path:{books}", 0)
    assert {text.split(".")[0] for text in after.validation} == held_out
    assert after.sha256 != before.sha256


def test_a_directory_gives_every_text_file_in_it(books):
    corpus = load_corpus(f"path:{books}", 0)
    texts = corpus.train + corpus.validation
    assert len(texts) == 38 + 1 + 2
    assert {"one", "two", "Notes."} <= set(texts)
    assert corpus.source == f"path:{books}"


def test_of_a_single_text_the_end_is_held_out(tmp_path):
    file = tmp_path / "book.txt"
    lines = [f"line {number}\n" for number in range(100)]
    file.write_text("".join(lines))
    corpus = load_corpus(f"path:{file}", 0)
    assert corpus.train == ("".join(lines[:95]),)
    assert corpus.validation == ("".join(lines[95:]),)


def test_sha256_tells_splits_and_boundaries_apart():
    corpora = [
        Corpus("", ("ab", "c"), ("d",)),
        Corpus("", ("a", "bc"), ("d",)),
        Corpus("", ("ab", "c", "d"), ()),
        Corpus("", ("ab", "c"), ("e",)),
    ]
    assert len({corpus.sha256 for corpus in corpora}) == 4
    assert Corpus("elsewhere", ("ab", "c"), ("d",)).sha256 == corpora[0].sha256


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "line 1: not UTF-8"),
        (b"  \n", "no text in it"),
    ],
)
def test_text_that_cannot_be_used_is_named(tmp_path, content, said):
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        load_corpus(f"path:{file}", 0)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("line", ["{", "[]", '"text"', '{"content": "x"}', "3"])
def test_a_bad_line_of_jsonl_is_named(tmp_path, line):
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl.*line 2"):
        load_corpus(f"path:{file}", 0)


@pytest.mark.parametrize("spec", ["", "books", "path:", "hf:", "http://x"])
def test_an_unknown_source_is_refused(spec):
    with pytest.raises(ValueError, match="expected auto, stdlib, path:"):
        load_corpus(spec, 0)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_corpus(f"path:{tmp_path / 'nowhere'}", 0)


# The hub, played by a module of our own


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for `datasets`: the splits it has, and what it was asked for."""
    module = types.ModuleType("datasets")
    module.asked = []
    module.splits = {
        "train": [{"text": f"document {n}"} for n in range(1000)],
        "validation": [{"text": "held out"}],
    }

    def load_dataset(name, configuration, *, split, streaming):
        assert streaming
        module.asked.append((name, configuration, split))
        if split not in module.splits:
            raise ValueError(f"Bad split: {split}")
        return iter(module.splits[split])

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_the_hub_is_read_up_to_the_bound(hub):
    corpus = load_corpus("hf:someone/books/large", hub_bytes=100)
    assert hub.asked == [
        ("someone/books", "large", "train"),
        ("someone/books", "large", "validation"),
    ]
    assert corpus.train == tuple(f"document {n}" for n in range(10))  # 10 bytes each
    assert corpus.validation == ("held out",)
    assert corpus.source == "hf:someone/books/large"


def test_c4_means_its_english_part(hub):
    assert load_corpus("hf:allenai/c4", 1).source == "hf:allenai/c4/en"
    assert hub.asked[0] == ("allenai/c4", "en", "train")


def test_a_hub_dataset_without_validation_split_is_split_here(hub):
    del hub.splits["validation"]
    corpus = load_corpus("hf:someone/books", hub_bytes=1000)
    assert len(corpus.validation) > 0
    texts = {row["text"] for row in hub.splits["train"]}
    assert set(corpus.train) | set(corpus.validation) <= texts
    assert not set(corpus.train) & set(corpus.validation)


def test_a_hub_dataset_without_text_is_refused(hub):
    hub.splits["train"] = [{"content": "x", "label": 0}]
    with pytest.raises(ValueError, match="no column 'text' but content, label"):
        load_corpus("hf:someone/books", 1)


def test_a_row_of_the_hub_without_text_is_named(hub):
    hub.splits["train"] = [{"text": "good"}, {"text": None}]
    with pytest.raises(ValueError, match="'hf:a/b': train, row 2: no text under"):
        load_corpus("hf:a/b", 1000)


def test_an_unreachable_hub_is_an_error_where_it_was_asked_for(hub):
    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    hub.load_dataset = load_dataset
    with pytest.raises(ValueError, match="Cannot read data 'hf:a/b': no route"):
        load_corpus("hf:a/b", 1)


def test_without_the_datasets_package_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="package `datasets` is missing"):
        load_corpus("hf:a/b", 1)


@pytest.mark.parametrize("reachable", [True, False])
def test_auto_says_what_it_uses(hub, stdlib, monkeypatch, capsys, reachable):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def connect(address, timeout):
        assert address == ("huggingface.co", 443)
        if not reachable:
            raise TimeoutError
        return types.SimpleNamespace(close=lambda: None)

    def offline(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr(socket, "create_connection", connect)
    if not reachable:
        hub.load_dataset = offline
    corpus = load_corpus("auto", hub_bytes=1)
    expected = "hf:allenai/c4/en" if reachable else "stdlib"
    assert corpus.source == expected
    assert f"using {expected}" in capsys.readouterr().out
    if not reachable:
        assert corpus.sha256 == stdlib.sha256


# Tokenizer


def corpus_of(train, validation):
    return Corpus("test", tuple(train), tuple(validation))


def test_the_tokenizer_is_trained_on_the_training_split_only():
    words = ["alphabetagamma " * 50, "deltaepsilon " * 50]
    tokens = tokenize(corpus_of(words[:1], words[1:]), 400)
    vocabulary = tokens.tokenizer.get_vocab()
    assert any("gamma" in entry for entry in vocabulary)
    assert not any("delta" in entry for entry in vocabulary)


def test_ids_decode_to_the_documents_each_ended_by_the_mark():
    train = ["naïve café\n", "日本語 and\ttabs  ", "plain"]
    tokens = tokenize(corpus_of(train, ["more café"]), 300)
    end = tokens.tokenizer.token_to_id("<|endoftext|>")
    ids = tokens.train.tolist()
    assert ids.count(end) == 3 and ids[-1] == end
    text = tokens.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "".join(document + "<|endoftext|>" for document in train)
    assert tokens.tokenizer.decode(tokens.validation.tolist()) == "more café"


def test_the_tokenizer_is_deterministic_and_bounded(stdlib):
    some = corpus_of(stdlib.train[:30], stdlib.validation[:3])
    first, second = tokenize(some, 600), tokenize(some, 600)
    assert first.tokenizer.to_str() == second.tokenizer.to_str()
    assert first.tokenizer.get_vocab_size() == 600
    assert first.train.max() < 600
    # Merging bytes must have paid.
    assert len(first.train) < 0.6 * sum(len(text.encode()) for text in some.train)


def test_a_saved_corpus_is_read_back(tmp_path):
    tokens = tokenize(corpus_of(["some text, some text"], ["more"]), 270)
    digest = tokens.save(tmp_path / "data")
    loaded = TokenizedCorpus.load(tmp_path / "data", digest)
    np.testing.assert_array_equal(loaded.train, tokens.train)
    np.testing.assert_array_equal(loaded.validation, tokens.validation)
    assert loaded.tokenizer.to_str() == tokens.tokenizer.to_str()


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ValueError, match="256 entries.*257"):
        tokenize(corpus_of(["text"], ["text"]), 256)


# Packing and order

PACKED = Packed(np.arange(1003, dtype=np.uint16), length=10)


def test_rows_predict_every_token_once():
    rows = PACKED.take(np.arange(PACKED.rows))
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows[:, :-1].ravel(), np.arange(1000))
    np.testing.assert_array_equal(rows[:, 1:].ravel(), np.arange(1, 1001))


def test_the_last_row_needs_its_last_target():
    assert Packed(np.arange(21), 10).rows == 2
    assert Packed(np.arange(20), 10).rows == 1


def test_an_epoch_visits_every_row_at_most_once_and_the_next_in_another_order():
    steps = 100 // 7
    epochs = [
        [tuple(row) for s in range(steps) for row in PACKED.batch(0, e * steps + s, 7)]
        for e in range(3)
    ]
    for epoch in epochs:
        assert len(epoch) == steps * 7
        assert Counter(epoch).most_common(1)[0][1] == 1
    assert epochs[0] != epochs[1] != epochs[2]
    # Over the epochs, rows left out of one come up in another.
    assert len(set(sum(epochs, []))) > steps * 7


def test_batches_are_a_pure_function_of_seed_and_step():
    order = [int(s) for s in np.random.default_rng(0).permutation(60)]
    batches = {step: PACKED.batch(3, step, 8) for step in order}
    for step in range(60):
        np.testing.assert_array_equal(PACKED.batch(3, step, 8), batches[step])
    digest = hashlib.sha256(np.stack([batches[s] for s in range(60)]).tobytes())
    other = np.stack([PACKED.batch(4, s, 8) for s in range(60)])
    assert digest.digest() != hashlib.sha256(other.tobytes()).digest()


def test_fixed_batches_spread_over_the_stream():
    batches = PACKED.fixed_batches(3, 5)
    assert [batch.shape for batch in batches] == [(5, 11)] * 3
    starts = np.concatenate(batches)[:, 0]
    assert starts[0] == 0 and starts[-1] == 990
    assert np.all(np.diff(starts) >= 60)
    assert len(PACKED.fixed_batches(1000, 40)) == 2


@pytest.mark.parametrize(
    "fill", [lambda p: p.batch(0, 0, 4), lambda p: p.fixed_batches(2, 4)]
)
def test_too_little_text_for_a_batch_is_refused(fill):
    with pytest.raises(ValueError, match="batch of 4 rows of 10 tokens.*3 rows"):
        fill(Packed(np.arange(31), 10))
