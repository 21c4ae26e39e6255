"""Tunix trains with low-rank methods, and resumes: docs/trainers.md."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from page import run_sections
from tunix.cli.config import HyperParameters
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

import lowrank_optax as lro

VOCABULARY, WIDTH, INNER, RANK = 32, 16, 48, 4
STEPS = 6
SCHEDULE = optax.linear_schedule(1e-2, 0.0, 100)
SPLIT = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", None))


class Model(nnx.Module):
    """Called as Tunix calls a language model."""

    def __init__(self, rngs):
        self.embedder = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, INNER, kernel_init=SPLIT, rngs=rngs)
        self.down = nnx.Linear(INNER, WIDTH, kernel_init=SPLIT, rngs=rngs)
        self.lm_head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens, positions, cache, attention_mask):
        x = self.embedder(tokens)
        x = x + self.down(nnx.relu(self.up(x)))
        return self.lm_head(x), cache


def inputs(batch):
    rows, length = batch.input_tokens.shape
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": jnp.arange(length)[None],
        "attention_mask": jnp.ones((rows, length, length), bool),
    }


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCABULARY, (8, 12)).astype(np.int32)
    return [TrainingInput(tokens, np.ones_like(tokens))] * STEPS


@pytest.fixture(autouse=True)
def mesh():
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), mesh:  # Flax asks for the one, Tunix for the other
        yield mesh


def trainer_by_page(mesh, **changes):
    """The trainer that the page makes."""
    config = TrainingConfig(eval_every_n_steps=100, **{"max_steps": STEPS} | changes)
    given = dict(model=Model(nnx.Rngs(0)), schedule=SCHEDULE, config=config, mesh=mesh)
    found = run_sections("trainers.md", "What trainers ask for", "Tunix", **given)
    return found["trainer"].with_gen_model_input_fn(inputs)


def weights(trainer):
    return jax.tree.leaves(nnx.state(trainer.model, nnx.Param))


def test_training_lowers_the_loss_with_thin_states_split_as_the_weights(batches, mesh):
    trainer = trainer_by_page(mesh)
    loss = nnx.jit(lambda model: trainer.loss_fn(model, **inputs(batches[0])))
    before = loss(trainer.model)
    trainer.train(batches)
    assert loss(trainer.model) < before
    assert trainer._try_get_learning_rate() == pytest.approx(SCHEDULE(STEPS - 1))
    projected = nnx.as_pure(trainer.optimizer.opt_state.inner_state[0])
    basis, mu = projected.basis["up"]["kernel"], projected.inner_state.mu
    assert basis.shape == (WIDTH, RANK)
    assert mu["up"]["kernel"].shape == (RANK, INNER)
    assert {x.data.shape for x in basis.addressable_shards} == {(WIDTH // 2, RANK)}


def test_a_resumed_run_is_the_uninterrupted_one(batches, mesh, tmp_path):
    options = ocp.CheckpointManagerOptions(save_interval_steps=STEPS // 2)
    saved = dict(checkpoint_root_directory=str(tmp_path), checkpointing_options=options)
    trainer_by_page(mesh, max_steps=STEPS // 2, **saved).train(batches)
    resumed, whole = trainer_by_page(mesh, **saved), trainer_by_page(mesh)
    assert resumed.train_steps == STEPS // 2
    for trainer in (resumed, whole):
        trainer.train(batches)
    for x, y in zip(weights(resumed), weights(whole), strict=True):
        np.testing.assert_array_equal(x, y)


def configured(**config):
    settings = HyperParameters.__new__(HyperParameters)
    settings.config = {"optimizer_config": config}
    return settings.create_optimizer("optimizer_config")


def test_the_command_line_finds_a_function_of_the_learning_rate(batches, monkeypatch):
    found = run_sections("trainers.md", "What trainers ask for")
    monkeypatch.setattr(optax, "galore", found["galore"], raising=False)
    tx = configured(opt_type="galore", learning_rate=1e-2)
    trainer = PeftTrainer(
        Model(nnx.Rngs(0)), tx, TrainingConfig(eval_every_n_steps=100, max_steps=STEPS)
    ).with_gen_model_input_fn(inputs)
    before = weights(trainer)
    trainer.train(batches)
    assert not np.array_equal(before[-1], weights(trainer)[-1])
    # What takes a rank is told that it must be a number.
    monkeypatch.setattr(optax, "galore", lro.galore_adamw)
    params = {"w": jnp.ones((WIDTH, INNER))}
    with pytest.raises(TypeError, match="`rank` must be a Python int"):
        configured(opt_type="galore", learning_rate=1e-2, rank=RANK).init(params)
