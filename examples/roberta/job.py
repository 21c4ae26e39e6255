"""One fine-tuning job: how each method trains the encoder, and what comes of it."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike
from tokenizers import Tokenizer

import lowrank_optax as lro
from examples.common.adapters import (
    adapt,
    all_but,
    freeze,
    held,
    is_frozen,
    merge,
    trained_parameters,
)
from examples.common.interrupt import StopRequest
from examples.common.loop import (
    CHECKPOINTS,
    METRICS_FILE,
    Best,
    Task,
    Timetable,
    train,
)
from examples.common.mesh import Placement
from examples.common.methods import METHODS, matrix_state_bytes
from examples.common.metrics import read_metrics, summed_up
from examples.common.processes import by_first
from examples.common.report import Run
from examples.common.schedule import warmup_linear
from examples.common.typed import checked_fields
from examples.roberta.batches import Batch, Encoded
from examples.roberta.config import EncoderConfig
from examples.roberta.masked import pretrain
from examples.roberta.model import Classifier
from examples.roberta.scores import SCORES
from examples.roberta.settings import SCRATCH, Glue
from examples.roberta.weights import Weights, load_classifier, save_model

PRETRAINED = "pretrained"
BEST = "best"
SUMMARY = "summary.json"

_HEADS = ("pooler", "classifier")  # trained beside adapters
_ALPHA = 16.0  # of LoRA, MLorc's Appendix D.2
_PRETRAIN_BATCH = 32


@dataclass(frozen=True)
class Trained:
    """What came of one method.

    Attributes:
      learning_rate: the one that was used.
      tried: the score of each that was tried, on the first seed; one where none was
        searched for.
      runs: of each seed, at that rate.
    """

    learning_rate: float
    tried: Mapping[float, float]
    runs: Mapping[int, Run]


@dataclass(frozen=True)
class Job:
    """Checked settings with all that training needs.

    Attributes:
      settings: what was asked for.
      out: the directory of the run.
      config: the classifier's.
      tokenizer: the model's.
      train: the training set.
      validation: the validation sets by name.
      docstrings: what a model that is made here is pre-trained on.
      weights: the model's; None for one that is made here.
      facts: what a reader of the result must know: settings, model, data, versions.
    """

    settings: Glue
    out: Path
    config: EncoderConfig
    tokenizer: Tokenizer
    train: Encoded
    validation: Mapping[str, Encoded]
    docstrings: Sequence[str]
    weights: Weights | None
    facts: dict[str, Any]

    @cached_property
    def placement(self) -> Placement | None:
        """Where all of it lies, as `--mesh` says."""
        return Placement.of(self.settings.mesh)

    @property
    def batch_size(self) -> int:
        return self.settings.chosen_task.preset.batch_size

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        epochs = self.settings.chosen_task.preset.epochs
        return max(1, round(epochs * self.train.steps(self.batch_size)))

    @property
    def score(self) -> str:
        """The score that decides which validation is the best."""
        return self.settings.chosen_task.scores[0]

    def optimizer(
        self, method: str, learning_rate: ArrayLike, dense: ArrayLike | None = None
    ) -> optax.GradientTransformation:
        """The method under its schedule, behind a clip of the gradient's norm at 1.

        Args:
          method: by its name.
          learning_rate: of the matrices.
          dense: of all else, by default as the settings say.
        """
        s, preset = self.settings, self.settings.chosen_task.preset
        own = METHODS["adamw" if method == SCRATCH else method]
        dense = s.dense_learning_rate if dense is None else dense
        tx = own.build(
            self._schedule(learning_rate),
            s.rank_of(method),
            preset.update_every,
            s.weight_decay,
            dense=None if dense is None else self._schedule(dense),
            heads=(self.config.num_attention_heads,) * 2,
            steps=self.steps,
        )
        if adapters_only(method):
            tx = freeze(tx, all_but(*_HEADS))
        return optax.chain(optax.clip_by_global_norm(1.0), tx)

    def _schedule(self, peak: ArrayLike) -> optax.Schedule:
        unit = warmup_linear(1.0, self.steps, self.settings.warmup)
        return lambda step: peak * unit(step)

    def model(self, method: str, seed: int, weights: Weights) -> Classifier:
        """The initial classifier, as the method trains it."""
        return _initial(method, self.settings.rank_of(method), seed, weights)

    def graph(self, method: str) -> nnx.GraphDef:
        """The classifier as the method trains it, without its weights."""
        return _abstract(method, self.settings.rank_of(method), self.config)[0]

    def shapes(self, method: str) -> Any:
        """Shapes and types of the parameters that the method starts from."""
        return _abstract(method, self.settings.rank_of(method), self.config)[1]

    def check(self) -> None:
        """Raises ValueError for a method that does not fit the model, or a batch that
        does not fit the mesh."""
        if self.placement is not None:
            rows = [self.batch_size, *[_PRETRAIN_BATCH] * self.settings.made_here]
            for size in rows:
                self.placement.check_rows(size)
        for method in self.settings.methods:
            rate, *_ = self.settings.rates(method)
            jax.eval_shape(self.optimizer(method, rate).init, self.shapes(method))

    def load(self, stop: StopRequest) -> Weights:
        """The weights; of a model that is made here after it is made.

        Raises:
          Interrupted: on request of `stop`.
        """
        if self.weights is not None:
            return self.weights
        directory, s = self.out / PRETRAINED, self.settings
        pretrain(
            directory,
            self.config,
            self.tokenizer,
            self.docstrings,
            steps=s.pretrain_steps,
            batch_size=_PRETRAIN_BATCH,
            seed=s.seeds[0],
            stop=stop,
            placement=self.placement,
        )
        return load_classifier(directory, self.config.labels)

    def loss(self, method: str) -> Callable[[Any, Batch], jax.Array]:
        """The mean loss of a training batch, with dropout."""
        return partial(weighted_loss, self.graph(method), adapters_only(method))

    def task(
        self,
        method: str,
        weights: Weights,
        loss: Callable[[Any, Batch], jax.Array],
        seed: int,
    ) -> Task:
        """What a run trains, from the weights on; `loss` is the method's."""
        size = self.batch_size
        return Task(
            init=lambda: params_of(self.model(method, seed, weights)),
            loss=loss,
            batch=lambda step: self.train.training_batch(seed, step, size),
            validation=(),
            tokens_per_step=size,
            evaluate=partial(self.evaluate, self.graph(method)),
            shapes=self.train.shapes(size),
            unit="examples",
        )

    def run(self, method: str, weights: Weights, stop: StopRequest) -> Trained:
        """Trains with one method, or goes on with it: each rate, then each seed.

        Raises:
          Interrupted: on request of `stop`.
        """
        first, *other_seeds = self.settings.seeds
        loss = self.loss(method)
        optimizers = {
            rate: self.optimizer(method, rate) for rate in self.settings.rates(method)
        }

        def one(rate: float, seeds: Sequence[int], stop: StopRequest) -> dict[int, Run]:
            # Of the same objects, so that runs share what is compiled for them.
            return {
                seed: self._run(
                    method, weights, loss, optimizers[rate], rate, seed, stop
                )
                for seed in seeds
            }

        tried = {rate: one(rate, [first], stop) for rate in self.settings.rates(method)}
        found = {
            rate: self.best(runs[first])[self.score] for rate, runs in tried.items()
        }
        # Of equal ones the smallest.
        best = min(found, key=lambda rate: (-found[rate], rate))
        for rate in found:
            if rate != best:
                loser = self._directory(method, rate, first) / BEST
                by_first(partial(shutil.rmtree, loser, ignore_errors=True))
        return Trained(best, found, tried[best] | one(best, other_seeds, stop))

    def best(self, run: Run) -> dict[str, Any]:
        """The record of the best validation after the start."""
        validated = [r for r in run.records[1:] if self.score in r]
        return max(validated, key=lambda record: record[self.score])

    def _directory(self, method: str, rate: float, seed: int) -> Path:
        return self.out / method / f"lr-{rate:g}-seed-{seed}"

    def _run(
        self,
        method: str,
        weights: Weights,
        loss: Callable[[Any, Batch], jax.Array],
        tx: optax.GradientTransformation,
        rate: float,
        seed: int,
        stop: StopRequest,
    ) -> Run:
        """One run, or what is on disk of it if it is done."""
        s = self.settings
        directory = self._directory(method, rate, seed)
        task = self.task(method, weights, loss, seed)
        timetable = Timetable(
            self.steps,
            s.log_every,
            self.train.steps(self.batch_size),
            s.checkpoint_every,
            s.shrink_every,
        )
        save = partial(self._save, self.graph(method), directory / BEST)
        best = Best(self.score, save)

        def summary() -> dict[str, Any]:
            label = f"{method}, rate {rate:g}, seed {seed}"
            where = self.placement
            train(task, tx, timetable, None, directory, label, stop, best, where)
            return self._sum_up(method, rate, tx, directory)

        found, records = summed_up(
            directory / SUMMARY,
            directory / METRICS_FILE,
            summary,
            partial(checked_fields, Run, but=("records",)),
        )
        # Of use only to a run that is under way, and larger than all else.
        leftover = directory / CHECKPOINTS
        by_first(partial(shutil.rmtree, leftover, ignore_errors=True))
        return Run(**found, records=records)

    def evaluate(self, graph: nnx.GraphDef, params: Any) -> dict[str, float]:
        """Loss and scores over all validation sets, and of each if there are more."""
        predictions = {
            name: _predict(graph, params, part, self.batch_size, self.placement)
            for name, part in self.validation.items()
        }
        losses, predicted = map(np.concatenate, zip(*predictions.values(), strict=True))
        labels = np.concatenate([part.labels for part in self.validation.values()])
        names = self.settings.chosen_task.scores
        record = {"validation_loss": float(np.mean(losses))}
        record |= {name: SCORES[name](predicted, labels) for name in names}
        for part, (_, predicted) in predictions.items():
            if part:
                labels = self.validation[part].labels
                for name in names:
                    record[f"{name}_{part}"] = SCORES[name](predicted, labels)
        return record

    def _save(self, graph: nnx.GraphDef, directory: Path, params: Any) -> None:
        model = nnx.merge(graph, params)
        merge(model.encoder)
        save_model(model, directory, self.tokenizer)

    def _sum_up(
        self, method: str, rate: float, tx: Any, directory: Path
    ) -> dict[str, Any]:
        """What `Run` takes besides the records."""
        params = self.shapes(method)
        frozen = all_but(*_HEADS) if adapters_only(method) else is_frozen
        records = read_metrics(directory / METRICS_FILE)
        freed = sum(record.get("freed_bytes", 0) for record in records)
        return {
            "method": method,
            "rank": self.settings.rank_of(method),
            "learning_rate": rate,
            "dense_learning_rate": self.settings.dense_learning_rate or rate,
            "trained_parameters": trained_parameters(params, frozen),
            "state_bytes": lro.state_bytes(tx, params) - freed,
            "matrix_state_bytes": matrix_state_bytes(tx, params) - freed,
            "tokens_per_step": self.batch_size,
        }


def adapters_only(method: str) -> bool:
    """Whether nothing but adapters and head is trained, as fine-tuning has it; others
    that take the linear maps' place train the rest too."""
    return method != SCRATCH and METHODS[method].adapters_only


def _initial(method: str, rank: int | None, seed: int, weights: Weights) -> Classifier:
    if method == SCRATCH:
        weights = Weights(weights.config, {})
    rngs = nnx.Rngs(seed)
    model = weights.model(rngs)
    kind = None if method == SCRATCH else METHODS[method].linear
    if kind is not None and rank is not None:
        if adapters_only(method):
            kind = partial(kind, alpha=_ALPHA)
        adapt(model.encoder, kind, rank, rngs=rngs)
    return model


@lru_cache
def _abstract(
    method: str, rank: int | None, config: EncoderConfig
) -> tuple[nnx.GraphDef, Any]:
    model = nnx.eval_shape(lambda: _initial(method, rank, 0, Weights(config, {})))
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params_of(model)
    )
    return nnx.graphdef(model), shapes


def params_of(model: nnx.Module) -> Any:
    """A model's weights as a tree of dicts."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def weighted_loss(
    graph: nnx.GraphDef, adapters_only: bool, params: Any, batch: Batch
) -> jax.Array:
    """The mean loss of a training batch, with dropout."""
    if adapters_only:
        # Else gradients of what is frozen would be formed, and counted in the clip.
        params = held(params, all_but(*_HEADS))
    # On CPU far cheaper to draw from than the default.
    key = jax.random.key(batch["seed"], impl="rbg")
    losses = _losses(_logits(graph, params, batch, key), batch["labels"])
    return jnp.sum(losses * batch["weights"]) / jnp.sum(batch["weights"])


def _logits(graph: nnx.GraphDef, params: Any, batch: Batch, key: Any) -> jax.Array:
    inputs = [batch[n] for n in ("input_ids", "attention_mask", "token_type_ids")]
    return nnx.merge(graph, params)(*inputs, key=key)


def _losses(logits: jax.Array, labels: Any) -> jax.Array:
    """Cross entropy of classes; of numbers the squared error."""
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return (logits[:, 0] - labels) ** 2
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


# Methods that train the same model share what is compiled.
@lru_cache(maxsize=2)
def _predictor(graph: nnx.GraphDef, out: Any) -> Callable[..., Any]:
    @partial(jax.jit, out_shardings=out)
    def predict(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits = _logits(graph, params, batch, None)
        numbers = jnp.issubdtype(batch["labels"].dtype, jnp.floating)
        predicted = logits[:, 0] if numbers else jnp.argmax(logits, axis=-1)
        return _losses(logits, batch["labels"]), predicted

    return predict


def _predict(
    graph: nnx.GraphDef,
    params: Any,
    data: Encoded,
    size: int,
    placement: Placement | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The loss and the prediction of every example."""
    losses = np.zeros(len(data), np.float32)
    predicted = np.zeros_like(data.labels)
    for rows in data.validation_rows(size):
        batch, out = data.batch(rows, size), None
        if placement is not None:
            batch, out = placement.batch(batch), placement.replicated
        found = _predictor(graph, out)(params, batch)
        for all_rows, own in zip((losses, predicted), found, strict=True):
            all_rows[rows] = np.asarray(own)[: len(rows)]
    return losses, predicted
