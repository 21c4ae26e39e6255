"""Kauldron trains with low-rank methods by its configuration: docs/trainers.md."""

import numpy as np
from kauldron import konfig
from page import run_sections

STEPS = 6


def test_a_configuration_trains_with_thin_states_split_along_their_long_side(tmp_path):
    cfg = run_sections("trainers.md", "Kauldron")["cfg"]
    with konfig.imports():
        import of_kauldron
        from kauldron import kd

    cfg.model = of_kauldron.Model()
    cfg.train_ds = kd.data.InMemoryPipeline(
        loader=of_kauldron.data, batch_size=8, seed=0
    )
    cfg.train_losses = {"l2": kd.losses.L2(preds="preds.y", targets="batch.y")}
    cfg.writer = kd.train.metric_writer.NoopWriter()
    cfg.workdir = str(tmp_path)
    cfg.num_train_steps = STEPS
    for split in (cfg.sharding.params, cfg.sharding.opt_state):
        split.min_size_to_shard_mb = 0
    trainer = konfig.resolve(cfg)
    before = trainer.init_state()
    state, _ = trainer.train()
    assert int(state.step) == STEPS + 1
    kernel = "kernel"
    assert not np.array_equal(before.params["up"][kernel], state.params["up"][kernel])
    projected = state.opt_state[0]
    basis = projected.basis["up"][kernel]
    mu = projected.inner_state.mu["up"][kernel]
    assert basis.shape == (16, 4) and mu.shape == (4, 48)
    assert {x.data.shape for x in basis.addressable_shards} == {(8, 4)}
    assert {x.data.shape for x in mu.addressable_shards} == {(4, 24)}
