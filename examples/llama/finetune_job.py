"""One fine-tuning job: how each method trains the model, and what comes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lowrank_optax as lro
from examples.common.adapters import (
    LoRALinear,
    adapt,
    all_but,
    freeze,
    held,
    is_frozen,
    merge,
    trained_parameters,
)
from examples.common.files import read_or_make
from examples.common.interrupt import StopRequest
from examples.common.loop import METRICS_FILE, Task, Timetable, train
from examples.common.mesh import Placement
from examples.common.methods import METHODS, matrix_state_bytes
from examples.common.metrics import read_metrics
from examples.common.precision import in_float32
from examples.common.processes import by_first
from examples.common.report import Run
from examples.common.schedule import warmup_linear
from examples.common.settings import write_record
from examples.common.tokens import TOKENIZER, save_tokenizer
from examples.llama.answers import answer, checked_answers
from examples.llama.base import Base
from examples.llama.config import LlamaConfig
from examples.llama.finetune_report import Finetuned
from examples.llama.finetune_settings import METAMATH_RATES, RATES, Finetune
from examples.llama.graders import Grader, Question, Scores
from examples.llama.layerwise import separate, stacked, step_of
from examples.llama.model import Llama
from examples.llama.pretrain import MODEL
from examples.llama.rows import Batch, Rows
from examples.llama.weights import save_llama, tensor_name

_ANSWERS = "answers.json"
_CLIP = 1.0  # the largest norm of the gradient


@dataclass(frozen=True)
class Job:
    """Checked settings with all that training needs.

    Attributes:
      settings: what was asked for.
      out: the directory of the run.
      base: the model that is trained.
      train: the examples to train on.
      test: those to test on.
      grader: judges the answers; None where nothing does.
      questions: what is asked of the model.
      prompts: the token ids of their prompts.
      facts: what a reader of the result must know: settings, model, data, versions.
    """

    settings: Finetune
    out: Path
    base: Base
    train: Rows
    test: Rows
    grader: Grader | None
    questions: Sequence[Question]
    prompts: Sequence[Sequence[int]]
    facts: dict[str, Any]

    @cached_property
    def placement(self) -> Placement | None:
        """Where all of it lies, as `--mesh` says."""
        return Placement.of(self.settings.mesh)

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        s = self.settings
        epoch = len(self.train.layout) // s.batch_size
        return s.epochs * epoch if s.steps is None else s.steps

    def rank(self, method: str) -> int | None:
        """The rank, the method's own where none was asked for."""
        return METHODS[method].rank_of(self.settings.rank)

    def rates(self, method: str) -> tuple[float, float]:
        """Peak learning rates of matrices and of all else; where none was asked for,
        the preset's one for both or the method's own.

        Raises:
          ValueError: a model with weights, and no rate for the method.
        """
        s, own = self.settings, METHODS[method]
        if self.base.params is None:
            return s.learning_rate or own.learning_rate, (
                s.dense_learning_rate or own.dense_learning_rate
            )
        rate = s.learning_rate or self._published_rate(method)
        return rate, s.dense_learning_rate or rate

    def _published_rate(self, method: str) -> float:
        s = self.settings
        rates = METAMATH_RATES if s.preset is None else RATES[s.preset]
        if method not in rates:
            raise ValueError(
                f"There is no learning rate to fine-tune with {method}: give one by"
                " --learning-rate."
            )
        return rates[method]

    def optimizer(self, method: str) -> optax.GradientTransformation:
        """The method under its schedule, behind a clip of the gradient's norm."""
        s, config = self.settings, self.base.config
        rate, dense = self.rates(method)
        tx = METHODS[method].build(
            warmup_linear(rate, self.steps, s.warmup),
            self.rank(method),
            s.update_every,
            s.weight_decay,
            dense=None if dense == rate else warmup_linear(dense, self.steps, s.warmup),
            heads=(config.num_attention_heads, config.kv_heads),
            steps=self.steps,
        )
        if METHODS[method].adapters_only:
            tx = freeze(tx, self.frozen(method))
        if not s.layerwise:  # else the step clips
            tx = optax.chain(optax.clip_by_global_norm(_CLIP), tx)
        return tx if s.param_dtype == "float32" else in_float32(tx)

    def frozen(self, method: str) -> Callable[[Any], Any]:
        """What the method leaves as it is, as `is_frozen` says it."""
        return all_but() if METHODS[method].adapters_only else is_frozen

    def adapted(self, method: str, model: Llama, rngs: nnx.Rngs) -> Llama:
        """The model as the method trains it."""
        linear, rank = METHODS[method].linear, self.rank(method)
        if linear is not None and rank is not None:
            adapt(model.layers, linear, rank, rngs=rngs)
        return model

    @property
    def config(self) -> LlamaConfig:
        """The base's, with the layers as one where they are updated one by one."""
        return replace(self.base.config, scan_layers=self.settings.layerwise)

    def graph(self, method: str) -> nnx.GraphDef:
        """The model as the method trains it, without its weights."""
        return nnx.graphdef(
            nnx.eval_shape(
                lambda: self.adapted(method, Llama(self.config), nnx.Rngs(0))
            )
        )

    @cached_property
    def step_of(self) -> Callable[..., Any] | None:
        """What makes steps of per-layer updates, if they are asked for."""
        if not self.settings.layerwise:
            return None
        return step_of(self.config, _CLIP, Batch.text, self.placement)

    def init(self, method: str) -> Callable[[int], Any]:
        """Of a seed, the parameters that the method starts from."""

        @jax.jit
        def start(params: Any, seed: int) -> Any:
            key = jax.random.key(seed)
            if params is None:
                model = Llama(self.base.config, rngs=nnx.Rngs(key))
            else:
                # Copies: the training step is given the memory of what it starts from.
                model = self.base.model(jax.tree.map(jnp.copy, params))
            found = params_of(self.adapted(method, model, nnx.Rngs(key)))
            return stacked(found) if self.settings.layerwise else found

        return partial(start, self.base.params)

    def trained(self, graph: nnx.GraphDef, params: Any) -> Llama:
        """The plain model that a method's parameters stand for."""
        if self.settings.layerwise:
            return self.base.model(separate(params))
        model = nnx.merge(graph, params)
        merge(model.layers)
        return model

    def check(self) -> None:
        """Raises ValueError for what would fail later: too little data, answers that
        are too long, a method that does not fit the model."""
        s = self.settings
        if self.steps == 0 or len(self.train.layout) < s.batch_size:
            raise ValueError(
                f"Cannot fill a batch of {s.batch_size} rows of {s.seq_len} tokens: the"
                f" examples make {len(self.train.layout)}. Lower --batch-size."
            )
        if self.placement is not None:
            self.placement.check_rows(s.batch_size)
        limit = self.base.config.max_position_embeddings
        for question, prompt in zip(self.questions, self.prompts, strict=True):
            if len(prompt) + s.max_new_tokens > limit:
                raise ValueError(
                    f"{question.instruction.where}: a prompt of {len(prompt)} tokens"
                    f" and an answer of {s.max_new_tokens} exceed the model's {limit}"
                    " positions. Lower --max-new-tokens."
                )
        if s.export_adapter is not None and self.base.params is None:
            raise ValueError(
                "Cannot export an adapter of a model from scratch: nobody has the"
                " weights that it adds to. Give a --model with weights."
            )
        for method in s.methods:
            params = jax.eval_shape(self.init(method), 0)
            tx = self.optimizer(method)
            state = jax.eval_shape(tx.init, params)
            if self.step_of is not None:
                batch = self.train.batch(0, 0, s.batch_size)
                jax.eval_shape(self.step_of(tx), params, state, batch)

    def save(self) -> None:
        """Makes the directory, with what `--resume` needs."""
        self.out.mkdir(parents=True, exist_ok=True)
        save_tokenizer(self.base.tokenizer, self.out / TOKENIZER)
        # The record last: what it is missing from is no run.
        write_record(self.out, self.facts)

    def before(self, stop: StopRequest) -> Scores:
        """The scores of a model with weights before it is fine-tuned."""
        if self.base.params is None:
            return {}
        model = self.base.model(self.base.params)
        return self.evaluate(model, self.out, self.settings.seeds[0], "before", stop)

    def evaluate(
        self, model: Llama, directory: Path, seed: int, label: str, stop: StopRequest
    ) -> Scores:
        """The scores of the answers that are then in the directory; none where nothing
        is judged."""
        if self.grader is None or not self.questions:
            return {}
        grader, s, key = self.grader, self.settings, jax.random.key(seed)
        options = {
            "stop_request": stop,
            "max_new_tokens": s.max_new_tokens,
            "stop": self.base.stop,
            "temperature": s.temperature,
        }
        found = []
        for number in range(s.evaluations):
            name, own, which = _ANSWERS, key, label
            if number > 0:
                name = f"answers-{number + 1}.json"
                own = jax.random.fold_in(key, number)
                which = f"{label}, evaluation {number + 1}"
            make = partial(
                answer,
                model,
                self.base.tokenizer,
                grader,
                self.questions,
                self.prompts,
                label=which,
                key=own,
                **options,
            )
            check = partial(checked_answers, grader, self.questions)
            found.append(read_or_make(directory / name, make, check))
        return grader.scores(found)

    def run(self, method: str, stop: StopRequest) -> list[Finetuned]:
        """Trains with one method, or goes on with it, once a seed, and sums it up.

        Raises:
          Interrupted: on request of `stop`.
          ForeignCheckpoint: what it would go on from is of something else.
        """
        s, graph, tx = self.settings, self.graph(method), self.optimizer(method)
        init = self.init(method)
        sums, where = partial(loss_sums, graph), self.placement
        compiled = jax.jit(sums)
        validation = self.test.batches(s.batch_size)

        def loss(params: Any, batch: Batch) -> jax.Array:
            # Else gradients of what is frozen would be formed, and counted in the clip.
            total, count = sums(held(params, self.frozen(method)), batch)
            return total / jnp.maximum(count, 1)

        def evaluate(params: Any) -> dict[str, float]:
            batches = validation if where is None else map(where.batch, validation)
            parts = [compiled(params, batch) for batch in batches]
            total, count = (sum(map(float, x)) for x in zip(*parts, strict=True))
            return {"validation_loss": total / count}

        def one(seed: int) -> Finetuned:
            directory = self.out / method / f"seed-{seed}"
            label = f"{method}, seed {seed}"
            task = Task(
                init=partial(init, seed),
                loss=loss,
                batch=lambda step: self.train.batch(seed, step, s.batch_size),
                validation=(),
                tokens_per_step=s.batch_size * s.seq_len,
                evaluate=evaluate,
                step_of=self.step_of,
            )
            timetable = Timetable(
                self.steps,
                s.log_every,
                s.eval_every,
                s.checkpoint_every,
                s.shrink_every,
            )
            # Only the parameters: the optimizer's memory is for the answers.
            params = train(
                task, tx, timetable, None, directory, label, stop, placement=where
            ).params
            model = self.trained(graph, params)
            by_first(lambda: self.save_model(method, seed, model, directory / MODEL))
            scores = self.evaluate(model, directory, seed, label, stop)
            shapes = jax.eval_shape(lambda x: x, params)
            return self.sum_up(method, seed, tx, shapes, scores)

        return [one(seed) for seed in s.seeds]

    def save_model(self, method: str, seed: int, model: Llama, directory: Path) -> None:
        """Writes a model that is trained, and its adapter if one is asked for."""
        save_llama(model, directory, self.base.tokenizer)
        if self.settings.export_adapter is not None:
            self.export(method, seed, params_of(model))

    def export(self, method: str, seed: int, params: Any) -> None:
        """Writes what was added to the base's weights as an adapter."""
        s = self.settings

        def matrices(tree: Any) -> Any:
            return jax.tree.map(lambda x: x if x.ndim > 1 else None, tree)

        own = METHODS[method]
        # Of LoRA an adapter of its rank is all that was added.
        is_lora = own.adapters_only and own.linear is LoRALinear
        adapters = lro.adapters.extract_lora(
            matrices(params),
            matrices(self.base.params),
            rank=self.rank(method) if is_lora else None,
        )
        lro.adapters.save_peft(
            adapters,
            Path(s.export_adapter or "", method, f"seed-{seed}"),
            base_model_name=s.model,
            key_map=module_name,
            task_type="CAUSAL_LM",
        )

    def sum_up(
        self, method: str, seed: int, tx: Any, params: Any, scores: Scores
    ) -> Finetuned:
        """What the report has to say of a run that is done."""
        rate, dense = self.rates(method)
        records = read_metrics(self.out / method / f"seed-{seed}" / METRICS_FILE)
        freed = sum(record.get("freed_bytes", 0) for record in records)
        run = Run(
            method=method,
            rank=self.rank(method),
            learning_rate=rate,
            dense_learning_rate=dense,
            trained_parameters=trained_parameters(params, self.frozen(method)),
            state_bytes=lro.state_bytes(tx, params) - freed,
            matrix_state_bytes=matrix_state_bytes(tx, params) - freed,
            tokens_per_step=self.settings.batch_size * self.settings.seq_len,
            records=records,
        )
        return Finetuned(run, seed, scores)


def module_name(path: str) -> str:
    """The name in Hugging Face's model of the module that a matrix belongs to."""
    return tensor_name(tuple(path.split("/"))).removesuffix(".weight")


def params_of(model: Llama) -> Any:
    """A model's weights as a tree of dicts."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def loss_sums(
    graph: nnx.GraphDef, params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """The losses of all tokens that are to be predicted, summed, and their number."""
    text = batch.text()
    return text.loss_sums(nnx.merge(graph, params)(text.ids, text.segments))
