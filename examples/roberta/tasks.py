"""GLUE's tasks: columns, labels, scores, and the papers' settings and figures."""

from collections.abc import Mapping
from dataclasses import dataclass, field

# Methods whose learning rate the papers do not give take that of the nearest.
_NEAREST = {
    "full": ("adamw", "scratch", "adamw_8bit", "adam_mini", "factorized"),
    "mlorc": ("mlorc_adamw", "mlorc_m", "mlorc_v", "mlorc_as_published"),
    "lora": ("lora", "dora", "relora"),
    "ldadamw": ("ldadamw",),
}
# Lion moves by signs: LLaMA2-7B takes a seventh of AdamW's rate (MLorc, Table 8).
_LION = 1 / 7
_LION_OF = {"lion": "full", "mlorc_lion": "mlorc", "lora_lion": "lora"}


@dataclass(frozen=True)
class Preset:
    """How a task is fine-tuned.

    Attributes:
      epochs: passes over the training set.
      batch_size: examples in a batch.
      max_length: tokens kept of an example.
      update_every: steps between two choices of the subspace.
      full, mlorc, lora, galore, ldadamw: peak learning rates of these methods.
      train_examples, validation_examples: so many are used at most; all if None.
    """

    epochs: float
    batch_size: int
    max_length: int
    update_every: int
    full: float
    mlorc: float
    lora: float
    galore: float
    ldadamw: float
    train_examples: int | None = None
    validation_examples: int | None = None

    def learning_rate(self, method: str) -> float:
        """The rate for any method of examples/common/methods.py."""
        if method in _LION_OF:
            return getattr(self, _LION_OF[method]) * _LION
        named = [name for name, methods in _NEAREST.items() if method in methods]
        # What projects gradients is scaled as GaLore is.
        return getattr(self, named[0] if named else "galore")


@dataclass(frozen=True)
class Task:
    """One classification or regression task.

    Attributes:
      name: what `--task` calls it.
      title: what GLUE calls it, and its directory.
      preset: how it is fine-tuned.
      scores: names of its scores; the first decides which validation is the best.
      texts: for the one text, or for each of two, the names its column may have.
      label: the names the label's column may have.
      labels: names of the classes in the order of their numbers; none where a number
        from 0 to 5 is predicted.
      header: the columns of a TSV file that has no line with them.
      train: what the training file may be called, without its ending.
      validation: for each validation set, what its file may be called.
      tolerated: share of a file's rows that may have too few or too many columns and
        are then left out.
      published: what papers report, of RoBERTa-Base, by source and method.
    """

    name: str
    title: str
    preset: Preset
    scores: tuple[str, ...] = ("accuracy",)
    texts: tuple[tuple[str, ...], ...] = (("sentence1",), ("sentence2",))
    label: tuple[str, ...] = ("label",)
    labels: tuple[str, ...] = ()
    header: tuple[str, ...] | None = None
    train: tuple[str, ...] = ("train",)
    validation: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"": ("dev", "validation")}
    )
    tolerated: float = 0.0
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


# MLorc, Table 9; subspaces chosen anew every 50 or 100 steps (Appendix D.2).
_PRESETS = {
    "cola": Preset(10, 128, 64, 50, 3e-5, 3e-5, 1e-3, 3e-4, 7e-5),
    "mnli": Preset(5, 128, 256, 100, 3e-5, 1e-4, 3e-4, 3e-4, 7e-5),
    "mrpc": Preset(20, 128, 64, 50, 7e-5, 7e-5, 1e-3, 5e-4, 3e-4),
    "qnli": Preset(5, 128, 256, 100, 1e-5, 5e-5, 5e-4, 3e-4, 7e-5),
    "qqp": Preset(5, 128, 256, 100, 7e-5, 7e-5, 5e-4, 3e-4, 1e-4),
    "rte": Preset(10, 128, 256, 50, 3e-5, 5e-5, 7e-4, 5e-4, 5e-4),
    "sst2": Preset(10, 128, 128, 100, 7e-6, 5e-5, 3e-4, 3e-4, 7e-5),
    "stsb": Preset(20, 128, 128, 50, 1e-4, 7e-5, 5e-4, 3e-4, 1e-4),
}

_SOURCES = {
    "MLorc, Table 5 (rank 8)": {
        "adamw": (62.33, 87.62, 91.11, 92.92, 90.26, 75.81, 95.18, 90.50),
        "mlorc_adamw": (62.07, 87.53, 90.77, 93.19, 88.99, 77.98, 95.18, 90.59),
        "lora": (61.53, 87.51, 90.10, 92.75, 89.45, 76.53, 94.72, 90.74),
        "galore_adamw": (60.34, 86.84, 90.10, 92.42, 88.15, 71.12, 94.38, 90.50),
        "ldadamw": (60.82, 87.33, 90.35, 93.03, 90.06, 76.53, 94.61, 90.74),
    },
    "MLorc, Table 7 (rank 8)": {
        # The paper repeats four figures of MLorc-AdamW here: QNLI, QQP, SST2, STSB.
        "mlorc_m": (61.07, 87.51, 91.34, 93.19, 88.99, 78.70, 95.18, 90.59),
        "mlorc_v": (59.14, 87.67, 91.31, 92.38, 90.32, 75.81, 95.07, 90.58),
    },
    "AdaRankGrad, Table 2 (rank 4)": {
        "adamw": (62.24, 87.18, 91.30, 92.33, 92.28, 79.42, 94.57, 90.92),
        "lora": (61.38, 86.82, 91.07, 92.18, 91.29, 78.70, 92.89, 90.57),
        "galore_adamw": (60.35, 87.00, 92.25, 92.24, 91.06, 79.42, 94.00, 90.73),
        "adarankgrad_adamw": (61.40, 86.60, 92.60, 92.50, 90.40, 81.23, 94.80, 90.97),
    },
    "AdaRankGrad, Tables 5 and 6 (rank 4)": {
        "adarankgrad_fixed_interval": (
            61.20,
            86.91,
            92.58,
            92.37,
            90.39,
            81.18,
            94.63,
            90.89,
        ),
        "adarankgrad_fixed_rank": (
            61.12,
            87.12,
            92.17,
            92.41,
            91.29,
            80.13,
            94.00,
            90.81,
        ),
    },
    "AdaRankGrad, Table 2 (rank 8)": {
        "lora": (61.83, 86.94, 91.90, 92.25, 91.22, 79.06, 93.46, 90.80),
        "galore_adamw": (60.06, 87.17, 92.00, 92.20, 91.11, 79.78, 94.38, 90.82),
        "adarankgrad_adamw": (62.00, 86.50, 92.50, 92.60, 89.70, 81.23, 94.80, 90.89),
    },
}


def _published(name: str) -> dict[str, dict[str, float]]:
    column = list(_PRESETS).index(name)
    return {
        source: {method: values[column] for method, values in methods.items()}
        for source, methods in _SOURCES.items()
    }


def _task(name: str, title: str, **rest) -> Task:
    return Task(name, title, _PRESETS[name], published=_published(name), **rest)


GLUE = {
    task.name: task
    for task in (
        _task(
            "cola",
            "CoLA",
            scores=("matthews", "accuracy"),
            texts=(("sentence",),),
            labels=("unacceptable", "acceptable"),
            header=("source", "label", "star", "sentence"),
        ),
        _task(
            "mnli",
            "MNLI",
            texts=(("sentence1", "premise"), ("sentence2", "hypothesis")),
            label=("gold_label", "label"),
            labels=("entailment", "neutral", "contradiction"),
            validation={
                "matched": ("dev_matched", "validation_matched"),
                "mismatched": ("dev_mismatched", "validation_mismatched"),
            },
        ),
        _task(
            "mrpc",
            "MRPC",
            scores=("f1", "accuracy"),
            texts=(("#1 String", "sentence1"), ("#2 String", "sentence2")),
            label=("Quality", "label"),
            labels=("not_equivalent", "equivalent"),
            train=("train", "msr_paraphrase_train"),
            # As Microsoft gives it, without GLUE's division, its test set has labels.
            validation={"": ("dev", "validation", "test", "msr_paraphrase_test")},
        ),
        _task(
            "qnli",
            "QNLI",
            texts=(("question",), ("sentence",)),
            labels=("entailment", "not_entailment"),
        ),
        _task(
            "qqp",
            "QQP",
            scores=("accuracy", "f1"),
            texts=(("question1",), ("question2",)),
            label=("is_duplicate", "label"),
            labels=("not_duplicate", "duplicate"),
            # GLUE's own file has some questions broken at line ends.
            tolerated=1e-3,
        ),
        _task("rte", "RTE", labels=("entailment", "not_entailment")),
        _task("sst2", "SST-2", texts=(("sentence",),), labels=("negative", "positive")),
        _task(
            "stsb", "STS-B", scores=("pearson", "spearman"), label=("score", "label")
        ),
    )
}
