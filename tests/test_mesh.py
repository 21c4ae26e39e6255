"""The examples on many devices and in several processes: the same steps as on one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from examples.common.adapters import LoRALinear, adapt
from examples.common.mesh import AXES, Placement, mesh_sizes, spec_of
from examples.common.metrics import read_metrics
from examples.llama import finetune, pretrain
from examples.llama.config import CONFIGS, LlamaConfig
from examples.llama.model import Llama
from examples.llama.weights import load_llama
from examples.roberta.masked import ENCODERS
from examples.roberta.model import MaskedLM

ROOT = Path(pretrain.__file__).parents[2]
METHODS = ("mlorc_adamw", "galore_adamw")
STEPS, KILLED = 4, 3
# Measured: 3e-7 at most, of losses and of the gradient's norm.
CLOSE = 1e-5


# What a mesh is


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data=2,tensor=2", "no axis 'tensor', choose from data, fsdp, model"),
        ("data", "size of data must be a number of devices, as in data=2, not ''"),
        ("data=two", "as in data=2, not 'two'"),
        ("fsdp=0", "as in fsdp=2, not '0'"),
        ("fsdp=2,fsdp=2", "fsdp is in it twice"),
        ("", "no axis ''"),
    ],
)
def test_a_mesh_that_is_none_is_named(text, said):
    with pytest.raises(ValueError) as caught:
        mesh_sizes(text)
    assert f"Cannot use mesh {text!r}: " in str(caught.value)
    assert said in str(caught.value)


def specs(make, **sizes):
    """The spec of every parameter by its path, without what is on every device."""
    sizes = dict.fromkeys(AXES, 1) | sizes
    mesh = AbstractMesh(tuple(sizes.values()), AXES)
    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(make), nnx.Param))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): spec_of(
            path, x.shape, mesh
        )
        for path, x in leaves
    }
    return {path: spec for path, spec in found.items() if spec != P()}


def llama(**fields):
    return LlamaConfig.from_json(CONFIGS / "smoke.json", **fields)


def test_matrices_are_split_by_their_place_in_the_model():
    columns, rows = P("fsdp", "model"), P("model", "fsdp")
    one = {
        **dict.fromkeys(("self_attn/q_proj", "self_attn/k_proj"), columns),
        **dict.fromkeys(("self_attn/v_proj", "mlp/gate_proj", "mlp/up_proj"), columns),
        **dict.fromkeys(("self_attn/o_proj", "mlp/down_proj"), rows),
    }
    outer = {"embed_tokens/embedding": rows, "lm_head/kernel": columns}
    apart = {f"layers/0/{name}/kernel": spec for name, spec in one.items()}
    stack = {f"layers/{name}/kernel": P(None, *spec) for name, spec in one.items()}
    sizes = {"fsdp": 2, "model": 2}
    assert specs(lambda: Llama(llama()), **sizes) == outer | apart
    assert specs(lambda: Llama(llama(scan_layers=True)), **sizes) == outer | stack

    encoder = specs(lambda: MaskedLM(ENCODERS["smoke"], rngs=nnx.Rngs(0)), **sizes)
    layer = "encoder/layers/1"
    assert encoder[f"{layer}/attention/query/kernel"] == columns
    assert encoder[f"{layer}/attention/dense/kernel"] == rows
    assert encoder[f"{layer}/up/kernel"] == columns
    assert encoder[f"{layer}/down/kernel"] == rows


def test_adapters_are_whole_and_what_they_are_added_to_is_split():
    def model():
        found = Llama(llama())
        adapt(found.layers, LoRALinear, 4, rngs=nnx.Rngs(0))
        return found

    layers = [x for x in specs(model, fsdp=2, model=2) if x.startswith("layers")]
    assert len(layers) == 7
    assert all(path.endswith("/frozen") for path in layers)


def test_an_axis_that_does_not_divide_a_matrix_does_not_split_it():
    # 88 = 11 * 8 is the width of the feed-forward, 32 that of the model.
    found = specs(lambda: Llama(llama()), fsdp=8, model=16)
    assert found["layers/0/mlp/up_proj/kernel"] == P("fsdp", None)
    assert found["layers/0/mlp/down_proj/kernel"] == P(None, "fsdp")


def test_a_batch_that_cannot_be_split_is_refused():
    placement = Placement(AbstractMesh((2, 4, 2), AXES))
    placement.check_rows(16)
    with pytest.raises(ValueError, match="batch of 12 rows over data=2, fsdp=4: 8"):
        placement.check_rows(12)


# What is trained on it


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    lines = (f"Line {i} of a text has {i * i} words.\n" for i in range(900))
    file.write_text("".join(lines))
    return f"path:{file}"


@pytest.fixture(scope="module")
def flags(text):
    """Of a run of four steps on a batch of eight rows."""
    often = ["--eval-every", "2", "--checkpoint-every", "2", "--update-every", "2"]
    sizes = ["--steps", str(STEPS), "--batch-size", "8"]
    return ["--smoke", "--data", text, *sizes, *often, "--methods", *METHODS]


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory):
    """A run on a single device, of `adamw` too."""
    out = tmp_path_factory.mktemp("alone") / "run"
    asked = ["--methods", "adamw", *METHODS, "--out", str(out)]
    assert pretrain.main([*flags, *asked]) == 0
    return out


PROGRAM = """
import os, signal, sys
import jax
from examples.common.tokens import Packed
from examples.llama.pretrain import main

devices, killed, *flags = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices))
original = Packed.batch

def batch(self, seed, step, size):
    if step == int(killed):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, seed, step, size)

Packed.batch = batch
sys.exit(main(flags))
"""


def start(devices, *flags, killed=-1):
    """A process that pre-trains, on so many simulated devices of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(devices), str(killed), *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_same_steps(run, expected, method):
    found, wanted = (
        read_metrics(x / method / "metrics.jsonl") for x in (run, expected)
    )
    assert [r["step"] for r in found] == [r["step"] for r in wanted]
    assert [r["step"] for r in found] == list(range(STEPS + 1))
    for a, b in zip(found, wanted, strict=True):
        for name in {"loss", "validation_loss", "grad_norm"} & b.keys():
            assert a[name] == pytest.approx(b[name], rel=CLOSE), (method, a["step"])
    ids = jax.random.randint(jax.random.key(0), (2, 16), 0, 512)
    models = (load_llama(x / method / "model") for x in (run, expected))
    a, b = (model(ids) for model in models)
    assert abs(a - b).max() < 20 * CLOSE


@pytest.fixture(scope="module")
def eight(flags, tmp_path_factory):
    """The same run on eight devices."""
    out = tmp_path_factory.mktemp("eight") / "run"
    mesh = ["--mesh", "data=2,fsdp=2,model=2", "--out", str(out)]
    process = start(8, *flags, *mesh)
    said = process.communicate(timeout=1500)
    assert process.returncode == 0, said
    return out


@pytest.mark.parametrize("method", METHODS)
def test_eight_devices_take_the_steps_of_one(method, alone, eight):
    assert_same_steps(eight, alone, method)
    device = json.loads((eight / "result.json").read_text())["device"]
    assert device.startswith("8 x ") and "mesh data=2,fsdp=2,model=2" in device
    # A device has an eighth of the matrices and of their moments.
    peaks = (read_metrics(x / method / "metrics.jsonl") for x in (eight, alone))
    a, b = (records[0]["peak_bytes"] for records in peaks)
    assert a < 0.7 * b


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param([], id="one"),
        pytest.param(["--mesh", "fsdp=2"], id="two", marks=pytest.mark.long),
    ],
)
def test_a_run_goes_on_with_fewer_devices(mesh, alone, eight, tmp_path, capsys):
    out = shutil.copytree(eight, tmp_path / "run")
    (out / "result.json").unlink()
    for method in METHODS:
        shutil.rmtree(out / method / "checkpoints" / str(STEPS))
    assert pretrain.main(["--resume", "--out", str(out), *mesh]) == 0
    assert "damaged" not in capsys.readouterr().err
    for method in METHODS:
        assert_same_steps(out, alone, method)


def test_per_layer_updates_on_two_devices_take_the_same_steps(flags, alone, tmp_path):
    out, mesh = tmp_path / "run", ["--mesh", "fsdp=2", "--layerwise"]
    assert pretrain.main([*flags, *mesh, "--methods", "adamw", "--out", str(out)]) == 0
    assert_same_steps(out, alone, "adamw")


def test_fine_tuning_on_two_devices_takes_the_steps_of_one(tmp_path):
    losses = {}
    flags = ["--smoke", "--steps", "3", "--test-examples", "8", "--train-examples"]
    flags += ["64", "--methods", "lora", "--param-dtype", "bfloat16"]
    for name, mesh in (("one", []), ("two", ["--mesh", "model=2"])):
        out = tmp_path / name
        assert finetune.main([*flags, "--out", str(out), *mesh]) == 0
        losses[name] = [
            [r["loss"] for r in read_metrics(x)[1:]]
            for x in sorted(out.glob("*/seed-0/metrics.jsonl"))
        ]
    assert len(losses["one"]) == 1
    for a, b in zip(*losses.values(), strict=True):
        # Sums of bfloat16 products are rounded at each device.
        assert a == pytest.approx(b, rel=2e-3)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--mesh", "data=3"], "it is one of 3 devices, and there are 2"),
        (["--mesh", "data=2,tp=1"], "no axis 'tp'"),
        (["--mesh", "data=2", "--batch-size", "3"], "batch of 3 rows over data=2"),
        (["--num-processes", "2"], "--process-id: give all of them, or none"),
        (
            ["--coordinator", "x:1", "--num-processes", "2", "--process-id", "2"],
            "Cannot be process 2 of 2",
        ),
        (
            ["--coordinator", "x:1", "--num-processes", "2", "--process-id", "0"],
            "Several processes need --mesh",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("command", [pretrain, finetune], ids=["pretrain", "finetune"])
def test_devices_that_cannot_be_are_refused_in_one_line(
    command, flags, said, text, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    data = ["--data", text] if command is pretrain else ["--train-examples", "40"]
    assert command.main(["--smoke", *data, *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]
    assert list(tmp_path.iterdir()) == []


# In several processes


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def both(flags, killed=-1):
    """Two processes of one device each; the second may be killed at a step."""
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2"]
    return [
        start(1, *flags, *where, "--process-id", str(i), killed=i * (killed + 1) - 1)
        for i in range(2)
    ]


def test_two_processes_of_which_one_is_killed_take_the_same_steps(
    flags, alone, tmp_path
):
    out = tmp_path / "run"
    flags = [*flags, "--methods", METHODS[-1], "--mesh", "fsdp=2", "--out", str(out)]
    first, second = both(flags, killed=KILLED)
    second.communicate(timeout=1500)
    assert second.returncode == -signal.SIGKILL
    _, said = first.communicate(timeout=1500)
    # The other one ends by itself, and says how both go on.
    assert first.returncode == 130, said
    last = [line for line in said.splitlines() if line.startswith("pretrain: ")][-1]
    assert "process 0 has lost the others" in last and "--resume --out" in last
    assert "Traceback" not in said
    # Each has written its part of the checkpoint.
    saved = out / METHODS[-1] / "checkpoints" / "2"
    assert {x.name for x in saved.rglob("ocdbt.process_*")} == {
        "ocdbt.process_0",
        "ocdbt.process_1",
    }
    assert read_metrics(out / METHODS[-1] / "metrics.jsonl")[-1]["step"] == KILLED

    first, second = both([*flags, "--resume"])
    printed = [process.communicate(timeout=1500) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], printed
    assert_same_steps(out, alone, METHODS[-1])
    shown, silent = (stdout for stdout, _ in printed)
    assert str(out / "result.json") in shown
    assert [x for x in silent.splitlines() if x and "Gloo" not in x] == []
