"""A small encoder made on the spot: masked language modelling on docstrings."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer

from examples.common.errors import BadFile
from examples.common.files import file_sha256, read_object, write_json
from examples.common.interrupt import StopRequest
from examples.common.loop import CHECKPOINTS, Task, Timetable, train
from examples.common.mesh import Placement
from examples.common.processes import by_first, of_first
from examples.common.schedule import warmup_linear
from examples.common.tokens import Packed
from examples.roberta.config import EncoderConfig
from examples.roberta.model import Encoder, MaskedLM
from examples.roberta.tokenizer import END, MASK, PAD, SPECIAL, START, token_id
from examples.roberta.weights import save_model

_PAD_ID = SPECIAL.index(PAD)
_MASKED = 0.15  # of the tokens; of these
_HIDDEN, _REPLACED = 0.8, 0.1  # are a mask, or any other token; the rest stay
_LEARNING_RATE, _WEIGHT_DECAY, _WARMUP = 2e-3, 0.01, 0.06
_VALIDATIONS, _VALIDATION_BATCHES = 5, 4
_HELD_OUT = 20  # one row of so many
_SUMS, _SUFFIXES = "checksums.json", (".safetensors", ".json")


def _config(vocab_size: int, width: int, layers: int, length: int) -> EncoderConfig:
    return EncoderConfig(
        model_type="roberta",
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=length + _PAD_ID + 1,
        type_vocab_size=1,
        pad_token_id=_PAD_ID,
        layer_norm_eps=1e-5,
        # Of such narrow matrices 0.02, for ten times the width, would be too small a
        # start: attention stays even, and the model does not get past word counts.
        initializer_range=0.06,
        # A model that does not even fit its data has no need of it.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


ENCODERS = {
    "small": _config(4096, width=128, layers=2, length=128),
    "smoke": _config(512, width=32, layers=2, length=64),
}


@dataclass(frozen=True)
class Masking:
    """Rows of text with some of their tokens to be predicted.

    Attributes:
      rows: the text.
      batch_size: rows in a batch.
      seed: of the order of the rows and of what is masked.
      start, mask: ids of the first token of a row, and of the mask.
      vocab_size: of the replacements.
    """

    rows: Packed
    batch_size: int
    seed: int
    start: int
    mask: int
    vocab_size: int

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """`input_ids` (B, T), and the tokens that were `at` (B, K), as `labels`."""
        return self.masked(self.rows.batch(self.seed, step, self.batch_size), step)

    def masked(self, rows: np.ndarray, step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, step, 1))
        ids = np.insert(rows, 0, self.start, axis=1)
        count = max(1, round(_MASKED * rows.shape[1]))
        order = np.argsort(rng.random(rows.shape), axis=1)
        at = 1 + order[:, :count]
        labels = np.take_along_axis(ids, at, axis=1)
        draw = rng.random(at.shape)
        other = rng.integers(len(SPECIAL), self.vocab_size, at.shape)
        shown = np.where(draw < _HIDDEN + _REPLACED, other, labels)
        shown = np.where(draw < _HIDDEN, self.mask, shown)
        np.put_along_axis(ids, at, shown, axis=1)
        return {
            "input_ids": ids.astype(np.int32),
            "at": at.astype(np.int32),
            "labels": labels.astype(np.int32),
        }


def pretrain(
    directory: Path,
    config: EncoderConfig,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    steps: int,
    batch_size: int,
    seed: int,
    stop: StopRequest,
    placement: Placement | None = None,
) -> None:
    """Makes a base checkpoint in the directory, or goes on with it; once only.

    Raises:
      BadFile: what was made is not as it was written.
      ValueError: too little text.
      Interrupted: on request of `stop`.
    """
    if of_first((directory / _SUMS).exists):
        _check(directory)
    else:
        task = _task(config, tokenizer, texts, batch_size, seed)
        rate = warmup_linear(_LEARNING_RATE, steps, _WARMUP)
        tx = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(rate, weight_decay=_WEIGHT_DECAY),
        )
        often = max(1, steps // _VALIDATIONS)
        timetable = Timetable(steps, 1, often, often, steps)
        label = "masked tokens"
        state = train(
            task, tx, timetable, None, directory, label, stop, placement=placement
        )
        model = MaskedLM(config, rngs=nnx.Rngs(seed))
        nnx.update(model, state.params)
        by_first(partial(_save, model.encoder, directory, tokenizer))
    by_first(partial(shutil.rmtree, directory / CHECKPOINTS, ignore_errors=True))


def _save(encoder: Encoder, directory: Path, tokenizer: Tokenizer) -> None:
    """The checkpoint, and last the hashes of its files, by which it is whole."""
    save_model(encoder, directory, tokenizer)
    files = sorted(x for x in directory.iterdir() if x.suffix in _SUFFIXES)
    write_json(directory / _SUMS, {x.name: file_sha256(x) for x in files})


def _check(directory: Path) -> None:
    for name, written in read_object(directory / _SUMS).items():
        path = directory / name
        if not path.is_file() or file_sha256(path) != written:
            raise BadFile(
                f"{path} is not as it was written. Delete {directory}, and what was "
                "trained from it, to make it anew."
            )


def _task(
    config: EncoderConfig,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    batch_size: int,
    seed: int,
) -> Task:
    end = token_id(tokenizer, END)
    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    parts = [np.array([*x.ids, end], np.int32) for x in encoded]
    cut = len(parts) - max(1, len(parts) // _HELD_OUT)
    # One for the mark at the start of a row, and one that rows of a stream share.
    length = config.max_length - 2
    train_rows, validation = (
        Packed(np.concatenate(part), length) for part in (parts[:cut], parts[cut:])
    )
    masking = Masking(
        train_rows,
        batch_size,
        seed,
        token_id(tokenizer, START),
        token_id(tokenizer, MASK),
        config.vocab_size,
    )
    graph = nnx.graphdef(nnx.eval_shape(lambda: MaskedLM(config, rngs=nnx.Rngs(0))))

    @jax.jit
    def init() -> Any:
        return nnx.to_pure_dict(
            nnx.state(MaskedLM(config, rngs=nnx.Rngs(seed)), nnx.Param)
        )

    def loss(params: Any, batch: Any) -> jax.Array:
        logits = nnx.merge(graph, params)(batch["input_ids"], batch["at"])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["labels"]
        ).mean()

    rows = validation.fixed_batches(_VALIDATION_BATCHES, batch_size)
    first = masking.batch(0)
    return Task(
        init=init,
        loss=loss,
        batch=masking.batch,
        validation=[masking.masked(part, i) for i, part in enumerate(rows)],
        tokens_per_step=first["labels"].size,
        unit="masked tokens",
    )
