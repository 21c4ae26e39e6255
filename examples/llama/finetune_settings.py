"""Settings of fine-tuning a LLaMA: what can be asked for, and the papers' own."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from examples.common.methods import check_methods, check_rates
from examples.common.processes import Devices
from examples.llama.instructions import ARITHMETIC


@dataclass(frozen=True)
class Finetune(Devices):
    """Fine-tune a LLaMA on instructions with several optimizers; compare them.

    The loss is that of the responses alone. Writes one directory: metrics, checkpoints,
    final model and answers of each method and seed, result.json, report.md and its
    plots. Ctrl-C saves a checkpoint and says how to go on.
    """

    model: str = "tiny"
    """Hugging Face directory or hub name, or a run of examples.llama.pretrain: its
    weights and tokenizer. Or the name of a file in examples/llama/configs, or path of a
    config.json: from scratch, with a tokenizer trained on the data."""
    data: str = ARITHMETIC
    """Examples to train on: arithmetic (word problems that are made up), or a JSONL or
    CSV file, or a JSON array in a .json file, with the columns question, answer
    (GSM8K), query, response (MetaMathQA), query, answer (CodeFeedback), sQuestion,
    lEquations, lSolutions (MAWPS), instruction, output, answer (MAWPS of LLM-Adapters),
    mr, ref (E2E), article, highlights (CNN/DM), document, summary (XSum), or prompt,
    canonical_solution, test, entry_point (HumanEval)."""
    test: str | None = None
    """File of examples to test on. Default: one of twenty of the others."""
    preset: str | None = None
    """Settings of a paper for LLaMA2-7B, which other flags override: mlorc-metamath,
    mlorc-codefeedback, galore-plus-gsm8k, galore-plus-mawps or galore-plus-e2e (see
    examples/llama/finetune_settings.py)."""
    methods: tuple[str, ...] = ("adamw", "mlorc_adamw", "galore_adamw")
    """Methods to compare, by the names in examples/common/methods.py."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the order of the batches, of adapters and of weights from scratch; every
    method is run with each."""
    out: Path | None = None
    """Directory of the run, new or empty but with --resume. Default: runs/ and the
    date; with --resume, the latest there."""
    resume: bool = False
    """Continue the run in --out with the settings it was started with."""
    epochs: int = 2
    """Passes over the data."""
    steps: int | None = None
    """Optimizer steps. Default: what the epochs take."""
    batch_size: int = 16
    """Rows in a batch."""
    seq_len: int = 128
    """Tokens in a row."""
    packing: bool = True
    """Put several examples into a row, kept apart from each other; else one."""
    drop_long: bool = False
    """Leave out examples longer than a row; else they are an error."""
    train_examples: int | None = None
    """Examples to train on, spread over the file. Default: all."""
    test_examples: int | None = 200
    """Examples to test on, spread over the file; None for all."""
    learning_rate: float | None = None
    """Peak learning rate of every method's matrices. Default: the preset's, for a model
    with weights that of mlorc-metamath, from scratch each method's own."""
    dense_learning_rate: float | None = None
    """Peak learning rate of embedding, head and norms. Default: from scratch each
    method's own; for a model with weights that of the matrices, as in the papers."""
    rank: int | None = None
    """Rank of every low-rank method. Default: each method's own."""
    update_every: int = 50
    """Steps between two choices of the subspace, in methods that project gradients;
    between two merges of ReLoRA."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises; it then falls to zero."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """What weights are stored and multiplied in. The optimizer's state is float32."""
    remat: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    layerwise: bool = False
    """Update each layer inside of the backward pass, so that no gradient of the whole
    model exists."""
    max_new_tokens: int = 64
    """Tokens that an answer may take."""
    temperature: float = 0.0
    """Of the sampled answers; 0 takes the most likely token."""
    evaluations: int = 1
    """How often every question is asked, with draws of their own; pass@k for k of 10
    and 100 needs so many."""
    run_programs: bool = False
    """Run the programs in answers to HumanEval's problems, to see which pass. They run
    with this user's rights, within limits of time and memory and no other."""
    export_adapter: str | None = None
    """Directory for what was added to the weights, as LoRA adapters in PEFT's format.
    All of it for lora, the part of 90% of the energy for others; norms are left out."""
    log_every: int = 1
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 50
    """Steps between two validations."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    shrink_every: int = 100
    """Steps between two searches for ranks that are no longer used, in methods that
    adapt them; the memory of these is freed."""
    smoke: bool = False
    """Smaller defaults: all of it in less than a minute, to see that it works."""

    def check(self) -> None:
        """Raises ValueError for a value that means nothing, by name."""
        check_methods(self.methods, self.rank, self.layerwise)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("Name at least one seed, and each at most once.")
        if min(self.seeds) < 0:
            raise ValueError("seeds must be at least 0")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            whole = type(value) is int and field.name != "process_id"
            if whole and value < 1:
                raise ValueError(f"{field.name} must be at least 1, not {value}")
        check_rates(self.learning_rate, self.dense_learning_rate)
        for name in ("weight_decay", "temperature"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"{name} must be at least 0, not {getattr(self, name)}"
                )
        if self.evaluations > 1 and self.temperature == 0:
            raise ValueError(
                f"{self.evaluations} evaluations at temperature 0 would all be the"
                " same: raise --temperature."
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), not {self.warmup}")


SMOKE = Finetune(
    model="smoke",
    methods=("adamw", "mlorc_adamw"),
    epochs=1,
    batch_size=8,
    learning_rate=1e-2,
    test_examples=50,
    max_new_tokens=24,
    rank=4,
)

# Of a pre-trained model, by Table 8 of MLorc (Shen et al. 2025), LLaMA2-7B. The
# methods that are not in it have no rate to start from.
METAMATH_RATES = {
    "adamw": 4e-5,
    "mlorc_adamw": 7e-5,
    "mlorc_as_published": 7e-5,
    "lora": 1e-3,
    "galore_adamw": 3e-3,
    "ldadamw": 3e-4,
    "lion": 3e-5,
    "mlorc_lion": 1e-5,
    "lora_lion": 1e-4,
}
CODEFEEDBACK_RATES = {
    "adamw": 9e-5,
    "mlorc_adamw": 7e-5,
    "mlorc_as_published": 7e-5,
    "lora": 3e-4,
    "galore_adamw": 2e-3,
    "ldadamw": 3e-4,
    "lion": 2e-5,
    "mlorc_lion": 7e-6,
    "lora_lion": 2e-4,
}

# MLorc, Section 4.1 and Appendix D.1: 10,000 examples, one to a row, each question
# asked four times. The memory of an H100 asks for weights in bfloat16. Longer examples
# are left out; the paper does not say whether it cuts them.
_LLAMA2_7B: dict[str, Any] = {
    "model": "meta-llama/Llama-2-7b-chat-hf",
    "methods": ("adamw", "mlorc_adamw", "lora", "galore_adamw", "ldadamw"),
    "train_examples": 10_000,
    "epochs": 2,
    "batch_size": 32,
    "packing": False,
    "drop_long": True,
    "rank": 4,
    "update_every": 300,
    "warmup": 0.03,
    "weight_decay": 0.0,
    "param_dtype": "bfloat16",
    "remat": True,
    "max_new_tokens": 512,
    "test_examples": None,
    "evaluations": 4,
}

# GaLore+ (Liao et al. 2024), Table 5, LLaMA2-7B at rank 128: its alpha, over the scale
# that the methods here have, is in the rate of the matrices. What the paper does not
# say is as GaLore has it: the model before it was tuned to chat, a subspace for 200
# steps. Its rate falls along a cosine, here along a line.
_GALORE_PLUS_RATE, _SCALE = 1e-6, 0.25
_GALORE_PLUS: dict[str, Any] = {
    "model": "meta-llama/Llama-2-7b-hf",
    "methods": ("galore_plus_adamw_8bit", "galore_adamw_8bit"),
    "epochs": 1,
    "batch_size": 1,
    "seq_len": 512,
    "packing": False,
    "drop_long": True,
    "rank": 128,
    "update_every": 200,
    "dense_learning_rate": _GALORE_PLUS_RATE,
    "param_dtype": "bfloat16",
    "remat": True,
    "max_new_tokens": 256,
    "test_examples": None,
}
_ALPHAS = {"gsm8k": 64, "mawps": 32, "e2e": 128}


def _galore_plus_rates(alpha: float) -> dict[str, float]:
    methods = (
        "galore_adamw_8bit",
        "galore_plus_adamw_8bit",
        *(f"galore_plus_8bit_{percent}" for percent in ("0.0", "0.6", "1.8")),
    )
    return dict.fromkeys(methods, _GALORE_PLUS_RATE * alpha / _SCALE)


PRESETS: dict[str, dict[str, Any]] = {
    "mlorc-metamath": _LLAMA2_7B | {"seq_len": 512, "temperature": 0.8},
    "mlorc-codefeedback": _LLAMA2_7B | {"seq_len": 1024, "temperature": 0.1},
    "galore-plus-gsm8k": _GALORE_PLUS,
    "galore-plus-mawps": _GALORE_PLUS | {"epochs": 3},
    "galore-plus-e2e": _GALORE_PLUS | {"max_new_tokens": 96},
}
RATES = {
    "mlorc-metamath": METAMATH_RATES,
    "mlorc-codefeedback": CODEFEEDBACK_RATES,
    **{f"galore-plus-{k}": _galore_plus_rates(alpha) for k, alpha in _ALPHAS.items()},
}
# Of the first score of each, in percent. MLorc, Table 2, rank 4: GSM8K's test set after
# MetaMathQA, HumanEval after CodeFeedback. GaLore+, Tables 1 and 3, rank 128, and its
# Table 8 for other shares of entries in the residual.
PUBLISHED = {
    "mlorc-metamath": {
        "MLorc's paper, LLaMA2-7B": {
            "adamw": 47.69,
            "mlorc_adamw": 47.37,
            "lora": 45.98,
            "galore_adamw": 38.89,
            "ldadamw": 41.85,
            "lion": 46.38,
            "mlorc_lion": 47.75,
            "lora_lion": 45.53,
        }
    },
    "mlorc-codefeedback": {
        "MLorc's paper, LLaMA2-7B": {
            "adamw": 21.96,
            "mlorc_adamw": 20.70,
            "lora": 17.85,
            "galore_adamw": 17.25,
            "ldadamw": 18.60,
            "lion": 18.00,
            "mlorc_lion": 18.75,
            "lora_lion": 16.00,
        }
    },
    "galore-plus-gsm8k": {
        "GaLore+'s paper, LLaMA2-7B": {
            "galore_adamw_8bit": 33.66,
            "galore_plus_adamw_8bit": 34.65,
        },
        "GaLore+'s paper, Table 8": {
            "galore_plus_8bit_0.0": 33.64,
            "galore_plus_8bit_0.6": 33.70,
            "galore_plus_adamw_8bit": 33.80,
            "galore_plus_8bit_1.8": 34.37,
        },
    },
    "galore-plus-mawps": {
        "GaLore+'s paper, LLaMA2-7B": {
            "galore_adamw_8bit": 64.29,
            "galore_plus_adamw_8bit": 67.64,
        },
        "GaLore+'s paper, Table 8": {
            "galore_plus_8bit_0.0": 65.02,
            "galore_plus_8bit_0.6": 65.13,
            "galore_plus_adamw_8bit": 66.10,
            "galore_plus_8bit_1.8": 66.18,
        },
    },
    "galore-plus-e2e": {
        "GaLore+'s paper, LLaMA2-7B": {
            "galore_adamw_8bit": 64.22,
            "galore_plus_adamw_8bit": 64.22,
        },
    },
}
