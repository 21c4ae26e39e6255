"""How answers are judged: data sets in their files' forms, scores, programs."""

import json
import math
import re
import sys
import time
from dataclasses import replace
from decimal import Decimal
from itertools import combinations
from pathlib import Path

import pytest

from examples.llama import overlap
from examples.llama.graders import FinalNumber, grader_of, questions_of
from examples.llama.instructions import read_instructions
from examples.llama.overlap import bleu, cider, likeness, nist, rouge
from examples.llama.programs import PASSED, Limits, outcome, pass_at_k

# Forms: small samples as the files of the data sets have them

MAWPS = [
    {
        "iIndex": 3,
        "sQuestion": "Ann had 7.5 kg of nails and bought 4 more. How many has she?",
        "lEquations": ["X=(7.5+4)"],
        "lSolutions": [11.5],
    },
    {
        "iIndex": 4,
        "sQuestion": "A box has 12 pens. How many have 3 boxes?",
        "lEquations": ["X=(12*3)"],
        "lSolutions": [36.0],
    },
]
ADAPTERS = [
    {
        "instruction": "Ann had 52 coins after paying 6. How many had she before ? ",
        "input": "",
        "answer": ["58.0"],
        "output": "She has 52 coins, so she had 52 + 7 = 59 before. The answer is 59.",
    },
    {"instruction": "One and one ?", "input": "", "answer": 2, "output": "2."},
]
E2E = (
    "mr,ref\n"
    '"name[Aroma], eatType[pub], near[The Hall]",Aroma is a pub near The Hall.\n'
    '"name[Aroma], eatType[pub], near[The Hall]","Near The Hall, there is a pub,'
    ' Aroma."\n'
    '"name[Bibi], food[French], priceRange[cheap]",Bibi has cheap French food.\n'
)
NEWS = {
    "article": "(CNN)Ann went to sea. She came back.",
    "highlights": "Ann went to sea .\nShe is back .",
    "id": "a1",
}
XSUM = {"document": "Ann went to sea.\nShe came back.", "summary": "Back.", "id": "9"}
BEGUN = (
    "from typing import List\n\n\ndef double(x):\n    return 2 * x\n\n\n"
    "def doubled(xs: List[int]) -> List[int]:\n"
    '    """ Every number twice as large.\n    >>> doubled([1])\n    [2]\n    """\n'
)
CHECK = (
    "\n\nMETADATA = {'author': 'x'}\n\n\ndef check(candidate):\n"
    "    assert candidate([1, 2]) == [2, 4]\n    assert candidate([]) == []\n"
)
SOLUTION = "    return [double(x) for x in xs]\n"
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": BEGUN,
    "entry_point": "doubled",
    "canonical_solution": SOLUTION,
    "test": CHECK,
}


def written(path, content):
    if isinstance(content, list):
        content = json.dumps(content, indent=1)
    path.write_text(content if isinstance(content, str) else json.dumps(content) + "\n")
    return path


def test_mawps_is_read_in_both_of_its_forms(tmp_path):
    first, second = read_instructions(written(tmp_path / "mawps.json", MAWPS))
    assert "\nAnn had 7.5 kg" in first.prompt and first.number == Decimal("11.5")
    assert first.response == "X=(7.5+4)\n#### 11.5"
    assert second.response == "X=(12*3)\n#### 36" and second.number == 36
    first, second = read_instructions(written(tmp_path / "adapters.json", ADAPTERS))
    # The label counts, not what a model has written as an explanation.
    assert first.number == 58 and first.response.endswith("The answer is 59.")
    assert second.number == 2 and first.where == f"{tmp_path}/adapters.json, item 1"
    assert isinstance(grader_of([first], False), FinalNumber)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([MAWPS[0] | {"lSolutions": [1, 2]}], "item 1: 'lSolutions' is not one number"),
        ([MAWPS[0], MAWPS[1] | {"lSolutions": ["x"]}], "item 2: 'lSolutions' is not"),
        ([MAWPS[0] | {"lEquations": "X=1"}], "item 1: 'lEquations' is no list"),
        ([{"instruction": "a", "output": "b"}], "item 1: 'answer' is not one number"),
        ([ADAPTERS[0] | {"answer": True}], "item 1: 'answer' is not one number"),
        ([ADAPTERS[0] | {"answer": "NaN"}], "item 1: 'answer' is not one number"),
        ([[1]], "item 1: not a JSON object"),
        ({"a": 1}, "a.json: not a JSON array"),
        ("[1,\n2", "a.json, line 2: not JSON"),
        ("[" * 100_000, "a.json: nested too deeply"),
        ("[" + "9" * 5000 + "]", "a.json: not JSON (Exceeds the limit"),
        ('[{"mr": "\\ud800", "ref": "a"}]', "a.json: half of a surrogate pair"),
        ([{"prompt": "a", "test": "b"}], "item 1: no 'canonical_solution'"),
        ([{"document": "a", "summary": " "}], "item 1: 'summary' is empty"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_a_malformed_row_is_named(content, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)):
        read_instructions(written(tmp_path / "a.json", content))


@pytest.mark.parametrize("row", [NEWS, XSUM], ids=["cnn", "xsum"])
def test_summaries_are_asked_for_and_judged_as_texts(row, tmp_path):
    (found,) = read_instructions(written(tmp_path / "news.jsonl", row))
    long, short = list(row.values())[:2]
    assert "Summarize" in found.prompt and long in found.prompt
    assert found.response == short and found.is_text and found.number is None


def test_a_meaning_is_asked_for_once_and_has_all_its_references(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "has_wordnet", lambda: False)
    test = read_instructions(written(tmp_path / "e2e.csv", E2E))
    grader = grader_of(test, False)
    questions = questions_of(grader, test)
    assert [len(x.references) for x in questions] == [2, 1]
    texts = ["Near The Hall, there is a pub, Aroma.", "Bibi has cheap French food."]
    rows = [
        {"prompt": x.prompt, "response": text, **grader.grade(x, text)}
        for x, text in zip(questions, texts, strict=True)
    ]
    found = grader.scores([rows, rows[::-1]])
    assert list(found) == ["bleu", "nist", "rouge1", "rouge2", "rougeL", "cider"]
    assert found["bleu"] == [pytest.approx(1)] * 2  # each text is one reference
    assert grader.agrees(questions[0], texts[0], {"references": rows[0]["references"]})
    assert not grader.agrees(questions[0], texts[0], {"references": []})


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    test = read_instructions(written(tmp_path / "e2e.csv", E2E))
    monkeypatch.delitem(sys.modules, "examples.llama.overlap")
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ValueError, match=r"without sacrebleu: .*\[scores\]"):
        grader_of(test, False)


# Scores, by hand


def test_scores_of_texts_are_those_of_their_papers(monkeypatch):
    # Of 5, 4, 3, 2 runs of words, 4, 3, 2, 1 are in the reference.
    expected = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert bleu(["a b c d e"], [["z", "a b c d f"]]) == pytest.approx(expected)
    assert bleu(["a b c d", "x y z w"], [["a b c d"], ["q", "x y z w"]]) == (
        pytest.approx(1)
    )
    # In four words, a has 1 bit, c has 2, and c after one of two a 1. The text is half
    # as long, which halves the score as often as two thirds as long does, squared.
    penalty = 0.5 ** (math.log(1 / 2) / math.log(2 / 3)) ** 2
    found = nist([["a", "c"]], [[["a", "b", "a", "c"]]])
    assert found == pytest.approx(((1 + 2) / 2 + 1) * penalty)
    assert nist([[]], [[["a"]]]) == 0
    found = rouge(["the cat on mat"], [["dogs", "the cat sat on mat"]])
    assert found == pytest.approx({"rouge1": 8 / 9, "rouge2": 4 / 7, "rougeL": 8 / 9})
    # Three of three words match three of four, in one piece of three words.
    monkeypatch.setattr(overlap, "has_wordnet", lambda: True)
    found = likeness(["The cat sat"], [["the cat sat down"]])["meteor"]
    expected = 0.75 / (0.9 + 0.1 * 0.75) * (1 - 0.5 * (1 / 3) ** 3)
    assert found == pytest.approx(expected)


def test_cider_is_that_of_its_paper():
    texts = [list("abcd"), list("xy")]
    references = [[list("abcd")], [list("xyzw")]]
    # Of one and two words, of three and four there are none; two words too short.
    second = (2 / math.sqrt(2 * 4) + 1 / math.sqrt(3)) * math.exp(-(2**2) / 72)
    assert cider(texts, references) == pytest.approx(10 * (4 + second) / 8)
    # Of two references the mean; words that all references have weigh nothing.
    both = [[list("abcd"), list("efgh")], references[1]]
    assert cider(texts, both) == pytest.approx(10 * (4 / 2 + second) / 8)
    assert cider([["a"], ["a"]], [[["a"]], [["a"]]]) == 0
    # What is said again counts no more often than it is in the reference.
    again = [list("abcd"), list("xxxx")]
    of_one = 1 / (4 * math.sqrt(2)) * math.exp(-(2**2) / 72)
    found = cider(again, [references[0], [list("xy")]])
    assert found == pytest.approx(10 * (4 + of_one) / 8)


def test_pass_at_k_is_the_share_of_choices_with_one_that_passes():
    results = [True, False, False, True, False]
    for k in range(1, 6):
        choices = list(combinations(results, k))
        share = sum(map(any, choices)) / len(choices)
        assert pass_at_k(5, 2, k) == pytest.approx(share)
    with pytest.raises(ValueError, match="pass@6 from 5"):
        pass_at_k(5, 2, 6)


# Programs


def asked(tmp_path):
    (found,) = read_instructions(written(tmp_path / "humaneval.jsonl", HUMANEVAL))
    return found


RESPONSES = {
    SOLUTION: True,  # it goes on
    f"Here:\n```python\n{BEGUN}{SOLUTION}```\nIt doubles.": True,
    # Its own, with the helper and the import of the beginning.
    "```py\ndef doubled(xs: List[int]):\n    return list(map(double, xs))\n```": True,
    "```\n    return xs\n```": False,
    "    return exit(0)\n": False,
    "    exit(42)\n": False,
    "    import os\n    os._exit(0)\n": False,
    "I do not know.": False,
    "": False,
}


def test_programs_pass_if_their_tests_do(tmp_path):
    test = [asked(tmp_path)]
    assert "```python\nfrom typing" in test[0].prompt and CHECK not in test[0].prompt
    with pytest.raises(ValueError, match="Allow it by --run-programs, best in a cont"):
        grader_of(test, run_programs=False)
    grader = grader_of(test, run_programs=True)
    (question,) = questions_of(grader, test)
    grades = [grader.grade(question, response) for response in RESPONSES]
    assert [x["passed"] for x in grades] == list(RESPONSES.values())
    assert all((x["outcome"] == PASSED) == x["passed"] for x in grades)
    assert "AssertionError" in grades[3]["outcome"]
    assert all(grader.agrees(question, "", grade) for grade in grades)
    assert not grader.agrees(question, "", grades[0] | {"passed": False})
    found = grader.scores([[x] for x in [*grades, *grades[:2]]])
    assert found["pass@1"] == [1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1]
    assert found["pass@10"] == [1.0]
    assert grader.scores([[grades[0], grades[3]]]) == {"pass@1": [0.5]}


LIMITS = Limits(seconds=30, memory=1 << 28, file=1 << 16)
STARTED = "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', {}])"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("open('x', 'wb').write(bytes(1 << 20))", "OSError: .*File too large"),
        ("import os\nassert not os.environ.get('SECRET')", PASSED),
        ("import os\nassert set(os.listdir()) == {'program.py'}", PASSED),
        ("import os\nos.remove('program.py')\nos.mkdir('program.py')", PASSED),
        ("import os, shutil\nshutil.rmtree(os.getcwd())\nassert 0", "AssertionError"),
        ("assert not input()", "EOFError: .*"),
        ("raise ValueError('x' * 10_000)", "ValueError: x{100,190}"),
        ("def f(:", "SyntaxError: invalid syntax"),
    ],
)
def test_programs_have_limits(program, said, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    assert re.fullmatch(said, outcome(program, LIMITS))


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_programs_end_in_time(program):
    limits = replace(LIMITS, seconds=2)
    assert outcome(program, limits) == "not done after 2 seconds"


def test_what_a_program_has_started_ends_with_it():
    sleep = repr("import time; time.sleep(60)")
    said = outcome(f"{STARTED.format(sleep)}\nraise ValueError(child.pid)", LIMITS)
    if said.startswith("BlockingIOError"):
        return  # A user who is not root may start none.
    process = Path("/proc", said.removeprefix("ValueError: "), "stat")

    def ended():
        try:
            return ") Z " in process.read_text()  # killed, and not yet waited for
        except (FileNotFoundError, ProcessLookupError):
            return True

    deadline = time.monotonic() + 30
    while not ended() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended()
