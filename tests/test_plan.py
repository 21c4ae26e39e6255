"""What the planner says of a step's memory, beside counts and compiled programs."""

import json
import re

import jax
import pytest
from flax import nnx

import lowrank_optax as lro
from benchmarks.plan import shallow
from benchmarks.record import RECORDS
from examples.common.methods import METHODS
from examples.llama.config import CONFIGS, LlamaConfig
from examples.llama.model import Llama
from examples.llama.plan import Plan, in_words, main, needs

SMALL = {"model": "smoke", "seq_len": 16}


def shapes(**fields):
    config = LlamaConfig.from_json(CONFIGS / "smoke.json", **fields)
    model = nnx.eval_shape(lambda: Llama(config))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("method", METHODS)
def test_weights_and_state_are_those_of_the_library(method):
    plan = Plan(**SMALL, method=method, rank=4)
    need = needs(plan)
    params = plan.model_shapes()
    state = jax.eval_shape(plan.optimizer().init, params)
    assert need.state == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert need.weights == sum(4 * x.size for x in jax.tree.leaves(params))
    assert need.gathered == 0 < need.activations
    if METHODS[method].linear is None:
        assert need.gradients == need.weights == 4 * plan.config.parameters
        assert need.state == lro.state_bytes(plan.optimizer(), shapes())
    elif method in ("lora", "dora", "relora"):
        assert need.gradients < need.weights


def test_a_device_has_its_part_of_a_mesh():
    parts = {"weights": {}, "state": {}, "gradients": {}}
    for mesh in ("data=8", "fsdp=8", "model=8", "fsdp=4,model=2"):
        found = needs(Plan(**SMALL, method="adamw", mesh=mesh))
        for name, values in parts.items():
            values[mesh] = getattr(found, name)
    # Norms, of 32 each, are everywhere, and the two counts of AdamW's state.
    matrices, norms = Plan(**SMALL).config.parameters - 96, 96
    for mesh, part in {"data=8": 1, "fsdp=8": 8, "fsdp=4,model=2": 8}.items():
        weights = 4 * (matrices // part + norms)
        assert parts["weights"][mesh] == parts["gradients"][mesh] == weights
        assert parts["state"][mesh] == 2 * weights + 8
    # 32 * 88 is split by 88 = 8 * 11 too.
    assert parts["weights"]["model=8"] == parts["weights"]["fsdp=8"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda x: x.stem)
def test_every_configuration_has_a_plan(path, capsys):
    flags = ["--method", "mlorc_lion", "--mesh", "data=8", "--seq-len", "64"]
    assert main(["--model", str(path), *flags]) == 0
    shown = capsys.readouterr().out
    sizes = dict(re.findall(r"\| ([a-z ]+?) +\| +([\d.,]+ \wiB) \|", shown))
    parameters = LlamaConfig.from_json(path).parameters
    assert f"({parameters:,} parameters" in shown
    assert sizes["weights"] == sizes["gradients"] == in_words(4 * parameters)
    assert "Per-layer updates would save" in shown


def test_a_plan_asks_for_shapes_alone(tmp_path):
    assert Plan(model="7b").config == Plan(model="llama_7b").config
    # Llama 3 turns its frequencies, which takes no memory.
    raw = json.loads((CONFIGS / "smoke.json").read_text())
    rope = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw | {"rope_scaling": rope}))
    plan = Plan(model=str(path), seq_len=16)
    assert needs(plan) == needs(Plan(**SMALL))


def test_per_layer_updates_have_no_gradient_of_the_whole_model():
    ordinary, small = (
        needs(Plan("llama_7b", "mlorc_adamw", 4, batch_size=4, layerwise=x))
        for x in (False, True)
    )
    assert small.weights == ordinary.weights
    assert small.gradients < ordinary.gradients / 10
    assert small.total < 0.6 * ordinary.total


RECORD = json.loads((RECORDS / "plan.json").read_text())["figures"]


@pytest.mark.parametrize(
    "found", RECORD, ids=lambda x: ",".join(map(str, x["case"].values()))
)
def test_the_total_is_that_of_the_program_for_an_h100(found, tmp_path):
    need = needs(shallow(found["case"], tmp_path))
    assert need.total == pytest.approx(found["compiled"], rel=0.05)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "huge"], "'huge': choose from"),
        (["--method", "adamv"], "'adamv': choose from"),
        (["--mesh", "fsdp=x"], "as in fsdp=2, not 'x'"),
        (["--mesh", "fsdp=16"], "batch of 8 rows over data=1, fsdp=16"),
        (["--rank", "0"], "rank 0"),
        (["--seq-len", "4096"], "the model takes 2048"),
        (["--layerwise", "--method", "lora"], "Cannot train lora layerwise"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(flags, said, capsys):
    assert main(flags) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert said in printed.err
