"""Adapters against NumPy's SVD, against files of the real PEFT, and loaded by it."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file

from lowrank_optax.adapters import extract_lora, save_peft
from tests.faults import contents, full_disk

FIXTURE = Path(__file__).parent / "data" / "peft-tiny"


def low_rank_plus_noise(rng, shape, rank, noise=0.0):
    *batch, m, n = shape
    signal = rng.standard_normal((*batch, m, rank)) @ rng.standard_normal(
        (*batch, rank, n)
    )
    return np.float32(signal + noise * rng.standard_normal(shape))


def truncated(difference: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(difference.astype(np.float64), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# Extraction


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (3, 6, 8), (2, 3, 5, 4)], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_extraction_is_the_truncated_svd(shape, rank, rng):
    base = {"w": rng.standard_normal(shape).astype(np.float32)}
    change = low_rank_plus_noise(rng, shape, 2, noise=0.1)
    finetuned = {"w": base["w"] + change}
    adapter = extract_lora(finetuned, base, rank=rank)["w"]
    best = truncated(change, rank)
    assert adapter.b.shape == (*shape[:-1], rank)
    assert adapter.a.shape == (*shape[:-2], rank, shape[-1])
    np.testing.assert_allclose(adapter.b @ adapter.a, best, atol=2e-5)
    lost = np.linalg.norm(change - best) / np.linalg.norm(change)
    np.testing.assert_allclose(adapter.residual, lost, rtol=1e-4)


def test_the_factors_share_the_singular_values_evenly(rng):
    change = low_rank_plus_noise(rng, (12, 7), 4)
    adapter = extract_lora({"w": change}, {"w": 0 * change}, rank=4)["w"]
    s = np.linalg.svd(change.astype(np.float64), compute_uv=False)[:4]
    np.testing.assert_allclose(adapter.b.T @ adapter.b, np.diag(s), atol=1e-4)
    np.testing.assert_allclose(adapter.a @ adapter.a.T, np.diag(s), atol=1e-4)


def test_full_rank_gives_the_fine_tuned_weights_back(rng):
    base = {"w": rng.standard_normal((8, 5)).astype(np.float32)}
    finetuned = {"w": rng.standard_normal((8, 5)).astype(np.float32)}
    adapter = extract_lora(finetuned, base, rank=100)["w"]
    assert adapter.b.shape == (8, 5) and adapter.residual == 0
    merged = base["w"] + adapter.b @ adapter.a
    np.testing.assert_allclose(merged, finetuned["w"], atol=1e-5)


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_energy_chooses_the_smallest_rank_that_keeps_it(energy, scale, rng):
    change = rng.standard_normal((16, 10)).astype(np.float32) * np.float32(scale)
    adapter = extract_lora({"w": change}, {"w": 0 * change}, energy=energy)["w"]
    s2 = np.linalg.svd(change.astype(np.float64), compute_uv=False) ** 2
    rank = adapter.a.shape[0]
    assert sum(s2[:rank]) >= energy * sum(s2) > sum(s2[: rank - 1])
    np.testing.assert_allclose(adapter.residual**2, sum(s2[rank:]) / sum(s2), rtol=1e-4)


def test_a_stack_gets_the_largest_rank_that_one_of_it_needs(rng):
    change = np.stack(
        [
            low_rank_plus_noise(rng, (9, 11), 2),
            # Small beside the others: its share counts, not its size.
            1e-6 * low_rank_plus_noise(rng, (9, 11), 5),
            np.zeros((9, 11), np.float32),
        ]
    )
    adapter = extract_lora({"w": change}, {"w": 0 * change}, energy=0.999999)["w"]
    assert adapter.b.shape == (3, 9, 5)
    np.testing.assert_allclose(adapter.b @ adapter.a, change, atol=1e-5)
    np.testing.assert_allclose((adapter.b @ adapter.a)[1], change[1], atol=1e-11)
    np.testing.assert_array_equal((adapter.b @ adapter.a)[2], 0)


def test_what_does_not_differ_is_left_out_and_what_does_not_fit_is_named(rng):
    base = {"a": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "b": jnp.ones(3)}
    finetuned = {"a": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}, "b": jnp.ones(3)}
    with pytest.warns(UserWarning, match=r"leave them as they .* \['a/bias'\]"):
        adapters = extract_lora(finetuned, base)
    assert list(adapters) == ["a/kernel"]
    assert extract_lora(base, base) == {}


def test_bfloat16_weights_are_subtracted_in_float32(rng):
    base = jnp.asarray(rng.standard_normal((6, 6)), jnp.bfloat16)
    finetuned = jnp.asarray(np.float32(base) + 0.5 * np.eye(6), jnp.bfloat16)
    adapter = extract_lora({"w": finetuned}, {"w": base}, rank=6)["w"]
    assert adapter.b.dtype == adapter.a.dtype == jnp.float32
    change = np.float32(finetuned) - np.float32(base)
    np.testing.assert_allclose(adapter.b @ adapter.a, change, atol=1e-6)


def test_an_nnx_state_and_its_pure_form_have_the_same_paths():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    base = nnx.state(model, nnx.Param)
    finetuned = jax.tree.map(lambda x: x + jnp.outer(jnp.ones(4), x[0]), base["kernel"])
    finetuned = nnx.State({"bias": base["bias"], "kernel": finetuned})
    boxed = extract_lora(finetuned, base)
    mixed = extract_lora(nnx.to_pure_dict(finetuned), base)
    assert list(boxed) == list(mixed) == ["kernel"]
    np.testing.assert_array_equal(boxed["kernel"].b, mixed["kernel"].b)


def test_extraction_errors_say_what_is_wrong():
    w = {"w": jnp.ones((3, 3))}
    with pytest.raises(ValueError, match="rank 0"):
        extract_lora(w, w, rank=0)
    with pytest.raises(ValueError, match="share 1.5 of the energy"):
        extract_lora(w, w, energy=1.5)
    with pytest.raises(ValueError, match=r"\['v'\] stand in one of them only"):
        extract_lora({**w, "v": jnp.ones(1)}, w)
    with pytest.raises(ValueError, match=r"'w' of shape \(3, 3\) with the base's of"):
        extract_lora(w, {"w": jnp.ones((3, 4))})
    with pytest.raises(ValueError, match="'w' of shape .* is not finite"):
        extract_lora({"w": jnp.full((3, 3), jnp.nan)}, w)


# Files


def flax_tree(tensors: dict[str, np.ndarray]) -> dict:
    """A torch state dict as nested parameters in the layout and names of Flax."""
    tree: dict = {}
    for name, x in tensors.items():
        *modules, _ = name.split(".")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        if "embed" in name:
            node["embedding"] = x
        else:
            node["kernel" if x.ndim == 2 else "scale"] = x.T
    return tree


def stack_layers(tree: dict) -> dict:
    """The same with one leaf for the same kernel of all layers, layers in front."""
    layers = tree["model"]["layers"]
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *(layers[k] for k in layers))
    return {**tree, "model": {**tree["model"], "layers": stacked}}


def scaling_and_rank(config: dict, module: str) -> tuple[float, int]:
    """Of a module, by PEFT's documented rule: patterns match the end of its name."""

    def of(pattern, default):
        for key, value in config[pattern].items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return default

    rank = of("rank_pattern", config["r"])
    return of("alpha_pattern", config["lora_alpha"]) / rank, rank


def products(directory: Path) -> dict[str, np.ndarray]:
    """The difference of every torch weight that an adapter directory stands for."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    result = {}
    for key, down in tensors.items():
        if "A" not in key.split(".lora_")[1]:
            continue
        up = tensors[
            key.replace("lora_A", "lora_B").replace("_embedding_A", "_embedding_B")
        ]
        module = key.removeprefix("base_model.model.").split(".lora_")[0]
        scaling, rank = scaling_and_rank(config, module)
        assert down.shape[0] == up.shape[1] == rank
        change = scaling * np.float64(up) @ np.float64(down)
        result[module] = change.T if "embedding" in key else change
    return result


@pytest.fixture(scope="module")
def weights():
    """Torch weights of a tiny LLaMA before and after PEFT merged an adapter."""
    return [load_file(FIXTURE / f"{n}.safetensors") for n in ("base", "merged")]


def test_files_are_those_of_the_real_peft(weights, tmp_path):
    """From PEFT's merged weights, the adapter that PEFT had merged comes back."""
    base, merged = weights
    adapters = extract_lora(flax_tree(merged), flax_tree(base), energy=1 - 1e-6)
    save_peft(adapters, tmp_path, base_model_name="tiny/llama", task_type="CAUSAL_LM")

    ours = load_file(tmp_path / "adapter_model.safetensors")
    theirs = load_file(FIXTURE / "adapter_model.safetensors")
    assert {k: x.shape for k, x in ours.items()} == {
        k: x.shape for k, x in theirs.items()
    }
    assert all(x.dtype == np.float32 for x in ours.values())

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    reference = json.loads((FIXTURE / "adapter_config.json").read_text())
    assert config.keys() <= reference.keys()
    same = config.keys() - {"lora_alpha", "alpha_pattern", "rank_pattern"}
    for key in same - {"target_modules"}:
        assert config[key] == reference[key], key
    expected = products(FIXTURE)
    assert set(config["target_modules"]) == expected.keys()

    changes = products(tmp_path)
    assert changes.keys() == expected.keys() and len(changes) == 7
    for module, change in changes.items():
        np.testing.assert_allclose(change, expected[module], atol=1e-5)
        weight = f"{module}.weight"
        np.testing.assert_allclose(base[weight] + change, merged[weight], atol=1e-5)


def test_stacked_layers_give_the_files_of_separate_ones(weights, tmp_path):
    base, merged = (stack_layers(flax_tree(x)) for x in weights)

    def key_map(path):
        *modules, _ = path.split("/")
        if modules[1] == "layers":
            modules.insert(2, "{}")
        return ".".join(modules)

    adapters = extract_lora(merged, base, energy=1 - 1e-6)
    assert adapters["model/layers/mlp/down_proj/kernel"].b.shape == (2, 12, 3)
    save_peft(adapters, tmp_path, base_model_name="tiny/llama", key_map=key_map)
    changes, expected = products(tmp_path), products(FIXTURE)
    assert changes.keys() == expected.keys()
    for module, change in changes.items():
        np.testing.assert_allclose(change, expected[module], atol=1e-5)


def test_a_rank_holds_for_its_module_alone(tmp_path):
    """A module named like the end of another one does not get the other's rank."""
    eye = np.eye(4, dtype=np.float32)
    base = {"x": {"w": 0 * eye}, "block": {"x": {"w": 0 * eye}}, "b.x": {"w": 0 * eye}}
    finetuned = {
        "x": {"w": np.diag([1.0, 0, 0, 0])},
        "block": {"x": {"w": np.diag([1.0, 1, 1, 1])}},
        "b.x": {"w": np.diag([1.0, 1, 0, 0])},
    }
    adapters = extract_lora(finetuned, base, energy=0.99)
    save_peft(adapters, tmp_path, base_model_name="base")
    for module, change in products(tmp_path).items():
        rank = {"x": 1, "block.x": 4, "b.x": 2}[module]
        exact = np.diag([1.0] * rank + [0] * (4 - rank))
        np.testing.assert_allclose(change, exact, rtol=0, atol=1e-6)


def test_links_are_replaced_and_not_written_through(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    directory = tmp_path / "adapter"
    directory.mkdir()
    names = ("adapter_config.json", "adapter_model.safetensors")
    for name in names:
        (directory / name).symlink_to(outside)
    eye = np.eye(3, dtype=np.float32)
    adapters = extract_lora({"x": {"w": eye}}, {"x": {"w": 0 * eye}}, energy=0.99)
    save_peft(adapters, directory, base_model_name="base")
    assert outside.read_text() == "mine"
    assert sorted(path.name for path in directory.iterdir()) == list(names)
    assert not any((directory / name).is_symlink() for name in names)
    np.testing.assert_allclose(products(directory)["x"], eye, atol=1e-6)


@pytest.mark.parametrize("limit", [10, 500])
def test_a_full_disk_leaves_an_older_adapter_whole(limit, tmp_path):
    eye = np.eye(3, dtype=np.float32)
    adapters = extract_lora({"x": {"w": eye}}, {"x": {"w": 0 * eye}}, energy=0.99)
    save_peft(adapters, tmp_path, base_model_name="base")
    before = contents(tmp_path)
    wide = np.eye(40, dtype=np.float32)
    other = extract_lora({"x": {"w": wide}}, {"x": {"w": 0 * wide}}, energy=0.99)
    with full_disk(limit), pytest.raises((OSError, SafetensorError)):
        save_peft(other, tmp_path, base_model_name="base")
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 2


def test_saving_errors_say_what_is_wrong(tmp_path, rng):
    with pytest.raises(ValueError, match="no matrix differs"):
        save_peft({}, tmp_path / "none", base_model_name="base")
    change = {"a": {"w": np.ones((2, 3, 4))}, "b": {"w": np.ones((3, 4))}}
    change = jax.tree.map(np.float32, change)
    adapters = extract_lora(change, jax.tree.map(np.zeros_like, change))
    with pytest.raises(ValueError, match=r"batch axes \(2,\): `key_map` gave 'a'"):
        save_peft(adapters, tmp_path / "none", base_model_name="base")
    with pytest.raises(ValueError, match=r"'b/w' .*gave 'm.\{\}'.* with 0 '\{\}'"):
        save_peft(
            adapters,
            tmp_path / "none",
            base_model_name="base",
            key_map=lambda path: "m.{}",
        )
    with pytest.raises(ValueError, match="'b/w' as module 'same'"):
        save_peft(
            {"a/w": adapters["b/w"], "b/w": adapters["b/w"]},
            tmp_path / "none",
            base_model_name="base",
            key_map=lambda path: "same",
        )
    with pytest.raises(ValueError, match="gave ''"):
        save_peft({"w": adapters["b/w"]}, tmp_path / "none", base_model_name="base")
    assert not (tmp_path / "none").exists()


# Third parties' deprecations are theirs, and these packages are not pinned here.
@pytest.mark.filterwarnings("default")
def test_the_real_peft_loads_and_merges_our_files(tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        vocab_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    base = {k: x.numpy().copy() for k, x in model.state_dict().items()}
    rng = np.random.default_rng(0)
    finetuned = {
        k: np.float32(x + 0.05 * rng.standard_normal(x.shape)) if x.ndim == 2 else x
        for k, x in base.items()
    }
    tokens = torch.arange(24).reshape(2, 12)
    for options, tolerance in (({"energy": 0.9}, None), ({"rank": 99}, 1e-4)):
        adapters = extract_lora(flax_tree(finetuned), flax_tree(base), **options)
        assert len(adapters) == 16 and len({x.a.shape for x in adapters.values()}) > 3
        directory = save_peft(
            adapters, tmp_path, base_model_name="base", task_type="CAUSAL_LM"
        )
        model = transformers.LlamaForCausalLM(config)
        model.load_state_dict({k: torch.tensor(x) for k, x in base.items()})
        with torch.no_grad():
            loaded = peft.PeftModel.from_pretrained(model, directory)
            unmerged = loaded(tokens).logits.numpy()
            merged = loaded.merge_and_unload()
            logits = merged(tokens).logits.numpy()
        np.testing.assert_allclose(unmerged, logits, atol=1e-4)
        state = {k: x.numpy() for k, x in merged.state_dict().items()}
        assert state.keys() == base.keys()
        changes = flax_tree({k: state[k] - base[k] for k in base})
        flat = {
            jax.tree_util.keystr(k, simple=True, separator="/"): x
            for k, x in jax.tree_util.tree_leaves_with_path(changes)
        }
        for path, adapter in adapters.items():
            np.testing.assert_allclose(flat[path], adapter.b @ adapter.a, atol=1e-5)
            np.testing.assert_array_less(0.01, np.linalg.norm(flat[path]))
        if tolerance:
            model.load_state_dict({k: torch.tensor(x) for k, x in finetuned.items()})
            with torch.no_grad():
                expected = model(tokens).logits.numpy()
            np.testing.assert_allclose(logits, expected, atol=tolerance)
