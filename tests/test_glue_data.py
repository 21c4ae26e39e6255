"""GLUE's files, scores and batches, and the task made of the standard library."""

import csv
import json
import math
import re

import numpy as np
import pytest
from scipy import stats

from examples.common.data import stdlib_documents
from examples.common.tokens import Packed
from examples.roberta import stdlib
from examples.roberta.batches import Encoded, bucket_lengths, encode
from examples.roberta.data import Examples, load_dataset, read_examples
from examples.roberta.masked import ENCODERS, Masking
from examples.roberta.scores import SCORES, accuracy, f1, pearson, spearman
from examples.roberta.settings import Glue
from examples.roberta.tasks import GLUE
from examples.roberta.tokenizer import train_tokenizer

# Scores


def test_scores_are_their_definitions():
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 1])
    predicted = np.array([1, 0, 1, 1, 0, 0, 0, 1])
    tp, tn, fp, fn = 3, 3, 1, 1
    assert accuracy(predicted, labels) == (tp + tn) / 8
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    expected = 2 * precision * recall / (precision + recall)
    assert f1(predicted, labels) == pytest.approx(expected)
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    matthews = SCORES["matthews"](predicted, labels)
    assert matthews == pytest.approx((tp * tn - fp * fn) / root)


def test_correlations_are_scipys_with_ties_too():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 50).astype(np.float32)
    predicted = (labels + rng.normal(size=50)).round(1).astype(np.float32)
    expected = stats.pearsonr(predicted, labels).statistic
    assert pearson(predicted, labels) == pytest.approx(expected, rel=1e-5)
    expected = stats.spearmanr(predicted, labels).statistic
    assert spearman(predicted, labels) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman"])
def test_a_constant_or_a_failed_model_has_no_correlation(name):
    labels = np.array([0.0, 1, 1, 0])
    assert SCORES[name](np.ones(4), labels) == 0
    assert SCORES[name](np.array([1, np.nan, 0, 1]), labels) == 0


def test_f1_of_a_model_that_never_says_yes_is_zero():
    assert f1(np.zeros(3), np.array([1, 0, 1])) == 0
    assert f1(np.zeros(3), np.zeros(3)) == 0


# Files

QUOTED = 'He said "no", and left.'
# For each task the columns of its TSV, and rows with their labels' numbers.
FILES = {
    "cola": (None, [(["gj04", "1", "", QUOTED], 1), (["gj04", "0", "*", "No."], 0)]),
    "mnli": (
        "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse"
        " sentence1_parse sentence2_parse sentence1 sentence2 label1 gold_label",
        [
            ([*"01234567", QUOTED, "b", "neutral", "neutral"], 1),
            ([*"01234567", "c", "d", "neutral", "contradiction"], 2),
        ],
    ),
    "mrpc": (
        ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
        [(["1", "7", "8", QUOTED, "b"], 1), (["0", "9", "10", "c", "d"], 0)],
    ),
    "qnli": (
        "index question sentence label",
        [(["0", QUOTED, "b", "not_entailment"], 1), (["1", "c", "d", "entailment"], 0)],
    ),
    "qqp": (
        "id qid1 qid2 question1 question2 is_duplicate",
        [(["0", "1", "2", QUOTED, "b", "1"], 1), (["3", "4", "5", "", "d", "0"], 0)],
    ),
    "rte": (
        "index sentence1 sentence2 label",
        [(["0", QUOTED, "b", "entailment"], 0), (["1", "c", "d", "not_entailment"], 1)],
    ),
    "sst2": ("sentence label", [([QUOTED, "1"], 1), (["c ", "0"], 0)]),
    "stsb": (
        "index genre filename year old_index source1 source2 sentence1 sentence2 score",
        [([*"0123456", QUOTED, "b", "2.500"], 2.5), ([*"0123456", "c", "d", "5"], 5.0)],
    ),
}


def columns_of(task):
    names = FILES[task][0]
    return names.split() if isinstance(names, str) else names


def write_tsv(path, task, rows=None, *, start="", end="\n"):
    header, own = columns_of(task), [cells for cells, _ in FILES[task][1]]
    lines = [*([header] if header else []), *(own if rows is None else rows)]
    text = start + "".join("\t".join(cells) + end for cells in lines)
    path.write_bytes(text.encode())


def texts_of(task):
    """Where the texts stand in a row of the file."""
    names = columns_of(task) or GLUE[task].header
    places = [[names.index(n) for n in o if n in names] for o in GLUE[task].texts]
    return [place for (place,) in places]


@pytest.mark.parametrize("task", GLUE)
def test_every_task_reads_its_own_tsv(task, tmp_path):
    folder = tmp_path / GLUE[task].title
    folder.mkdir()
    write_tsv(folder / "train.tsv", task)
    rows = FILES[task][1]
    for part, (stem, *_) in GLUE[task].validation.items():
        # The parts in another order, to be told apart.
        write_tsv(folder / f"{stem}.tsv", task, [rows[part != ""][0]])
    data = load_dataset(GLUE[task], str(tmp_path))
    expected = [tuple(cells[i] for i in texts_of(task)) for cells, _ in rows]
    assert data.train.texts == expected
    assert data.train.labels.tolist() == [label for _, label in rows]
    kind = np.int32 if GLUE[task].labels else np.float32
    assert data.train.labels.dtype == kind
    assert set(data.validation) == set(GLUE[task].validation)
    for part, examples in data.validation.items():
        assert examples.texts == [expected[part != ""]]


@pytest.mark.parametrize("task", GLUE)
@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_every_task_reads_the_hubs_columns(task, form, tmp_path):
    texts = [options[-1] for options in GLUE[task].texts]
    cells, label = FILES[task][1][0]
    row = dict(zip(texts, (cells[i] for i in texts_of(task)), strict=True))
    row["label"] = label
    path = tmp_path / f"{task}_train.{form}"
    if form == "jsonl":
        path.write_text(json.dumps(row) + "\n\n")
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*row])
            writer.writeheader()
            writer.writerow(row)
    examples = read_examples(path, GLUE[task])
    assert examples.texts == [tuple(row[name] for name in texts)]
    assert examples.labels.tolist() == [label]


def test_microsofts_own_file_is_read_as_it_is(tmp_path):
    rows = [["1", "1", "2", 'The "x', "a\u2028b"], ["0", "3", "4", "'c", 'd" "']]
    for split in ("train", "test"):
        path = tmp_path / f"mrpc_{split}.tsv"
        write_tsv(path, "mrpc", rows, start="\ufeff", end="\r\n")
    data = load_dataset(GLUE["mrpc"], str(tmp_path))
    expected = [('The "x', "a\u2028b"), ("'c", 'd" "')]
    assert data.train.texts == data.validation[""].texts == expected
    assert data.source == "mrpc_train.tsv, mrpc_test.tsv"


def test_a_single_file_is_split(tmp_path):
    path = tmp_path / "some.jsonl"
    rows = [{"sentence": f"number {i}", "label": i % 2} for i in range(25)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_dataset(GLUE["sst2"], str(path))
    assert data.validation[""].texts == [("number 9",), ("number 19",)]
    assert len(data.train) == 23 and ("number 9",) not in data.train.texts


BAD_ROWS = [
    ("mrpc", "1\t2\t3\tonly four", "row 3 has 4 columns, expected 5: Quality, #1 ID"),
    ("mrpc", "1\t2\t3\ta\tb\tc", "row 3 has 6 columns, expected 5"),
    ("mrpc", "2\t2\t3\ta\tb", "row 3: the label '2' is none of not_equivalent"),
    ("rte", "0\ta\tb\tmaybe", "row 3: the label 'maybe' is none of entailment"),
    (
        "stsb",
        "\t".join([*"0123456", "a", "b", "5.5"]),
        "'5.5' is no number from 0",
    ),
    (
        "stsb",
        "\t".join([*"0123456", "a", "b", "nan"]),
        "'nan' is no number from 0",
    ),
    ("mrpc", b"1\t2\t3\ta\xe9\tb", "line 3: not UTF-8"),
    ("cola", "x\t1\t*", "row 2 has 3 columns, expected 4: source, label"),
]


@pytest.mark.parametrize(("task", "row", "said"), BAD_ROWS)
def test_a_malformed_row_is_named(task, row, said, tmp_path):
    path = tmp_path / "train.tsv"
    write_tsv(path, task, [FILES[task][1][0][0]])
    row = row if isinstance(row, bytes) else row.encode()
    path.write_bytes(path.read_bytes() + row + b"\n")
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        read_examples(path, GLUE[task])
    assert str(caught.value).startswith((f"{path}: ", f"{path}, line "))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train.tsv", "", "it has no rows"),
        ("train.tsv", "index\tsentence1\tsentence2\tlabel\n", "it has no rows"),
        ("train.tsv", "index\tsentence1\tlabel\n", "no column 'sentence2' for RTE"),
        ("train.jsonl", '{"sentence1": "a"\n', "line 1: not JSON"),
        ("train.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("train.jsonl", '{"sentence1": "a"}\n', "row 1: there is no 'sentence2'"),
        (
            "train.jsonl",
            '{"sentence1": "a", "sentence2": 3, "label": 1}\n',
            "row 1: its text is no string",
        ),
        (
            "train.jsonl",
            '{"sentence1": "a", "sentence2": "b", "label": -1}\n',
            "row 1: the label -1 is none of",
        ),
        ("train.csv", "sentence1,sentence2,label\na,b\n", "row 2 does not have 3"),
        ("train.csv", 'sentence1,sentence2,label\n"a,b,1\n', "row 2: unexpected end"),
    ],
)
def test_a_malformed_file_is_named(name, content, said, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        read_examples(tmp_path / name, GLUE["rte"])
    assert str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("value", [True, None, "one", [1]])
def test_a_label_of_no_number_is_named(value, tmp_path):
    row = {"sentence1": "a", "sentence2": "b", "label": value}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="row 1: the label .* is no number from 0"):
        read_examples(tmp_path / "train.jsonl", GLUE["stsb"])


def test_a_few_broken_rows_are_left_out_of_qqp_only(tmp_path):
    path = tmp_path / "train.tsv"
    good, broken = ["0", "1", "2", "a", "b", "1"], ["0", "1"]
    write_tsv(path, "qqp", [*[good] * 1500, broken])
    examples = read_examples(path, GLUE["qqp"])
    assert len(examples) == 1500 and examples.left_out == 1
    write_tsv(path, "qqp", [*[good] * 1500, broken, broken])
    with pytest.raises(ValueError, match="row 1503 has 2 columns, expected 6"):
        read_examples(path, GLUE["qqp"])


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match="no file for RTE called train or rte_train"):
        load_dataset(GLUE["rte"], str(tmp_path))
    with pytest.raises(ValueError, match="no such file or directory"):
        load_dataset(GLUE["rte"], str(tmp_path / "nowhere"))


# Presets


def test_learning_rates_are_those_of_the_papers_table():
    rates = {m: Glue(task="mrpc").rates(m) for m in ("adamw", "lora", "galore_adamw")}
    assert rates == {"adamw": [7e-5], "lora": [1e-3], "galore_adamw": [5e-4]}
    assert Glue(task="cola").rates("mlorc_adamw") == [3e-5]
    assert Glue(task="rte").rates("ldadamw") == [5e-4]
    assert Glue(task="sst2").rates("scratch") == [7e-6]
    assert Glue(task="mrpc").rates("i3s_adamw") == [5e-4]  # as GaLore's
    assert Glue(task="mrpc").rates("lion") == [1e-5]  # a seventh of AdamW's
    assert Glue(task="mrpc", grid=(0.5, 2)).rates("adamw") == [3.5e-5, 1.4e-4]
    assert Glue(task="mrpc", learning_rate=1e-2).rates("lora") == [1e-2]
    preset = Glue(task="mnli").chosen_task.preset
    assert (preset.epochs, preset.batch_size, preset.max_length) == (5, 128, 256)
    assert preset.update_every == 100
    assert GLUE["mrpc"].published["MLorc, Table 5 (rank 8)"]["mlorc_adamw"] == 90.77
    table = GLUE["stsb"].published["AdaRankGrad, Table 2 (rank 4)"]
    assert table["adarankgrad_adamw"] == 90.97


# Batches


@pytest.fixture(scope="module")
def encoded():
    texts = [" ".join(["word"] * (1 + i * 7 % 29)) for i in range(83)]
    pairs = [(text, "a short one") for text in texts]
    tokenizer = train_tokenizer(texts, 300)
    parts = {
        "train": Examples(pairs, np.arange(83, dtype=np.int32)),
        "validation": Examples(pairs[:10], np.arange(10, dtype=np.int32)),
    }
    return encode(tokenizer, parts, 28, ENCODERS["smoke"]), tokenizer, pairs


def test_token_ids_are_the_tokenizers_cut_to_the_length(encoded):
    parts, tokenizer, pairs = encoded
    tokenizer.enable_truncation(28)
    for row in (0, 5, 40, 82):
        batch = parts["train"].batch(np.array([row]), 2)
        ids = tokenizer.encode(*pairs[row]).ids
        assert batch["input_ids"][0, : len(ids)].tolist() == ids
        assert batch["attention_mask"][0].sum() == len(ids) <= 28
        assert set(batch["input_ids"][0, len(ids) :].tolist()) <= {1}
        assert batch["labels"][0] == row
        assert batch["weights"].tolist() == [1, 0]
    assert max(np.diff(parts["train"].starts)) == 28


def test_an_epoch_has_every_example_once_in_few_shapes(encoded):
    data = encoded[0]["train"]
    steps = data.steps(8)
    assert steps == 11
    batches = [data.training_batch(3, step, 8) for step in range(2 * steps)]
    for epoch in (batches[:steps], batches[steps:]):
        rows = [r for b in epoch for r in b["labels"][b["weights"] > 0].tolist()]
        assert sorted(rows) == list(range(83))
    assert len({batch["seed"].item() for batch in batches}) == 2 * steps
    labels = [batch["labels"].tolist() for batch in batches]
    assert labels[:steps] != labels[steps:]
    again = data.training_batch(3, 5, 8)
    assert all(np.array_equal(again[k], batches[5][k]) for k in again)
    assert np.any(data.training_batch(4, 5, 8)["labels"] != again["labels"])

    shapes = {batch["input_ids"].shape for batch in batches}
    assert shapes == {batch["input_ids"].shape for batch in data.shapes(8)}
    assert 1 < len(shapes) <= 4
    real = sum(batch["attention_mask"].sum() for batch in batches)
    assert real / sum(batch["input_ids"].size for batch in batches) > 0.8


def test_validation_has_every_example_once(encoded):
    data = encoded[0]["validation"]
    rows = data.validation_rows(4)
    assert sorted(np.concatenate(rows)) == list(range(10))
    assert [len(part) for part in rows] == [4, 4, 2]


def test_lengths_are_few_and_enough():
    lengths = np.array([5, 9, 17, 17, 30, 31, 40, 61])
    assert bucket_lengths(lengths, 64) == (24, 32, 40, 64)
    assert bucket_lengths(lengths, 61) == (24, 32, 40, 61)
    assert bucket_lengths(np.array([7]), 128) == (8,)
    assert isinstance(bucket_lengths(lengths, 64)[0], int)
    buckets = Encoded(
        np.zeros(16), np.zeros(16), np.array([0, 8, 16]), np.zeros(2), 0, (8, 16)
    ).buckets
    assert buckets.tolist() == [0, 0]  # as long as a length fits in it


# Masked tokens


def test_tokens_are_masked_at_the_rate_and_predicted_as_they_were():
    rows = Packed(np.random.default_rng(0).integers(5, 400, 60_000), 98)
    masking = Masking(rows, 32, seed=0, start=0, mask=4, vocab_size=400)
    batch = masking.batch(7)
    original = rows.batch(0, 7, 32)
    ids, at = batch["input_ids"], batch["at"]
    assert ids.shape == (32, 100) and at.shape == (32, 15)
    assert np.all(ids[:, 0] == 0) and at.min() >= 1
    assert all(len(set(row)) == 15 for row in at.tolist())
    np.testing.assert_array_equal(
        batch["labels"], np.take_along_axis(original, at - 1, axis=1)
    )
    shown = np.take_along_axis(ids, at, axis=1)
    assert np.mean(shown == 4) == pytest.approx(0.8, abs=0.06)
    assert np.mean(shown == batch["labels"]) == pytest.approx(0.1, abs=0.05)
    restored = ids[:, 1:].copy()
    np.put_along_axis(restored, at - 1, batch["labels"], axis=1)
    np.testing.assert_array_equal(restored, original)
    again = masking.batch(7)
    assert all(np.array_equal(again[k], batch[k]) for k in batch)


# The standard library


def test_the_standard_library_is_split_by_file_with_its_names_masked():
    data, docstrings = stdlib.load_stdlib()
    assert 2 <= len(data.labels) <= 10
    text = "\n".join(t for (t,) in (*data.train.texts, *data.validation[""].texts))
    assert not re.search("|".join(data.labels), text, re.IGNORECASE)
    for part in (data.train, data.validation[""]):
        assert set(part.labels.tolist()) == set(range(len(data.labels)))
        assert {len(t) for (t,) in part.texts} == {400}
    # No file gives to both: each is known by its first snippet.
    mask = re.compile("|".join(data.labels), re.IGNORECASE)
    starts = {
        mask.sub("PACKAGE", source)[:400]: name for name, source in stdlib_documents()
    }
    found = [
        {starts[t] for (t,) in part.texts if t in starts}
        for part in (data.train, data.validation[""])
    ]
    assert all(len(names) >= len(data.labels) for names in found)
    assert not found[0] & found[1]
    # Some docstrings are repeated in files that are not held out.
    own, others = set(), set()
    for name, source in stdlib_documents():
        (own if name in found[1] else others).update(stdlib._docstrings(source))
    assert len(own - others) > 50 and not (own - others) & set(docstrings)
    assert len(docstrings) > 1000
