"""What the default rule makes of the models that people train, and `matrix_rules`."""

import functools
import json
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowrank_optax as lro
from lowrank_optax import MatrixAxes
from lowrank_optax._src.leaves.choose import view_dense, view_leaves
from lowrank_optax._src.leaves.matrix import MatrixView

ROOT = Path(__file__).parent


def abstract(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def tree_of(shapes):
    """Nested dicts with an abstract leaf at each of some ``/``-separated paths."""
    tree = {}
    for path, shape in shapes.items():
        *parents, last = path.split("/")
        node = functools.reduce(lambda n, part: n.setdefault(part, {}), parents, tree)
        node[last] = abstract(*shape)
    return tree


def seen(tree, matrices=None):
    """``(*batch, rows, cols)`` of each leaf that is a matrix, by path."""
    views = view_leaves(tree, matrices, "left")
    return {
        v.path: (*v.batch_shape, v.m, v.n) for v in views if isinstance(v, MatrixView)
    }


# Models of frameworks ----------------------------------------------------------------


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        x = x + nn.Dense(64)(nn.gelu(nn.Dense(256)(nn.LayerNorm()(x))))
        return x, None


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x, _ = LinenBlock(name="block")(nn.Embed(1000, 64)(tokens))
        stack = nn.scan(
            LinenBlock, {"params": 0}, split_rngs={"params": True}, length=12
        )
        x, _ = stack(name="layers")(x, None)
        x = nn.Conv(32, (3,), name="conv")(x)
        return nn.Dense(1000, name="lm_head")(x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(64, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
        self.mlp = nnx.List([nnx.Linear(64, 256, rngs=rngs)])


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(1000, 64, rngs=rngs)
        self.block = NnxBlock(rngs)
        stack = nnx.split_rngs(splits=12)(nnx.vmap(lambda rngs: NnxBlock(rngs)))
        self.layers = stack(rngs)
        self.query = nnx.LinearGeneral(64, (4, 16), rngs=rngs)
        self.lora = nnx.LoRA(64, 8, 64, rngs=rngs)
        self.head = nnx.Linear(64, 1000, rngs=rngs)


def linen_params():
    tokens = abstract(2, 8).update(dtype=jnp.int32)
    return jax.eval_shape(LinenModel().init, jax.random.key(0), tokens)["params"]


def nnx_params():
    model = nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0)))
    return nnx.state(model, (nnx.Param, nnx.LoRAParam))


BUILT = {"Flax Linen": linen_params, "Flax NNX": nnx_params}
MODELS = json.loads((ROOT / "data/models.json").read_text())


@pytest.mark.parametrize("name", BUILT)
def test_recorded_models_are_those_of_the_installed_framework(name):
    views = view_dense(BUILT[name]())
    assert {v.path: list(v.shape) for v in views} == MODELS[name]


@pytest.mark.parametrize("name", BUILT)
def test_recorded_models_are_seen_as_the_frameworks_own(name):
    assert seen(BUILT[name]()) == seen(tree_of(MODELS[name]))


# By hand, from the einsum of each layer.
KERNELS = {
    "Flax Linen": {
        "block/MultiHeadDotProductAttention_0/query/kernel": (64, 64),
        "layers/MultiHeadDotProductAttention_0/out/kernel": (12, 64, 64),
    },
    "Flax NNX": {
        "block/attn/query/kernel": (64, 64),
        "layers/attn/value/kernel": (12, 64, 64),
        "layers/attn/out/kernel": (12, 64, 64),
        "query/kernel": (64, 64),
        "lora/lora_a": (64, 8),
    },
    "Keras": {
        "grouped_attention/key/kernel": (64, 32),
        "grouped_attention/attention_output/kernel": (64, 64),
    },
    "Equinox": {"block/attention/query_proj/weight": (64, 64)},
    "Haiku": {"attention/query/w": (64, 64)},
    "Tunix Llama 3.2 1B": {
        "layers/0/attn/q_proj/w": (2048, 2048),
        "layers/0/attn/k_proj/w": (2048, 512),
        "layers/0/attn/o_proj/w": (2048, 2048),
    },
    "Tunix Llama 3, heads first": {
        "layers/0/attn/q_proj/w": (2048, 2048),
        "layers/0/attn/kv_proj/w": (2, 2048, 512),
        "layers/0/attn/o_proj/w": (2048, 2048),
    },
    "Tunix Gemma 3 1B": {
        "layers/0/attn/q_einsum/w": (1152, 1024),
        "layers/0/attn/kv_einsum/w": (2, 1152, 256),
        "layers/0/attn/attn_vec_einsum/w": (1024, 1152),
    },
    "Tunix Gemma 7B": {"layers/0/attn/qkv_einsum/w": (3, 3072, 4096)},
    "MaxText Mistral 7B, scanned": {
        "params/decoder/layers/self_attention/query/kernel": (32, 4096, 4096),
        "params/decoder/layers/self_attention/key/kernel": (32, 4096, 1024),
        "params/decoder/layers/self_attention/out/kernel": (32, 4096, 4096),
    },
    "MaxText DeepSeek V3": {
        "params/decoder/dense_layers_0/self_attention/wq_b/kernel": (1536, 24576),
        "params/decoder/dense_layers_0/self_attention/out/kernel": (16384, 7168),
    },
    "Hugging Face BERT": {
        "bert/encoder/layer/0/attention/output/dense/kernel": (768, 768),
        "bert/encoder/layer/0/output/dense/kernel": (3072, 768),
    },
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_have_the_rows_and_columns_of_their_product(name):
    views = seen(tree_of(MODELS[name]))
    assert KERNELS[name].items() <= views.items()


@pytest.mark.parametrize("name", MODELS)
def test_vectors_tables_and_heads_are_matrices_in_no_model(name):
    for path in seen(tree_of(MODELS[name])):
        assert not re.search(
            r"bias|scale|norm(?!al)|gamma|beta|offset|/b$|embed|\bw[tp]e\b|head\b"
            r"|logits|classifier|pooler|vocab|shared/embedding",
            path,
            re.I,
        )


def test_rows_and_columns_are_those_that_the_layers_multiply():
    """An input times the matrix is what the layer gives, reshaped."""
    model = nnx.MultiHeadAttention(4, 64, decode=False, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    views = {v.path: v for v in view_leaves(params, side="left")}
    x = jax.random.normal(jax.random.key(1), (5, 64))
    kernel = params["query"]["kernel"].get_value()
    heads = x @ views["query/kernel"].matrix(kernel)
    np.testing.assert_allclose(heads, model.query(x).reshape(5, -1), atol=1e-5)
    kernel = params["out"]["kernel"].get_value()
    out = heads @ views["out/kernel"].matrix(kernel)
    np.testing.assert_allclose(out, model.out(heads.reshape(5, 4, 16)), atol=1e-5)


def test_stacks_of_merged_kernels_are_no_split_heads():
    layers = {f"{n}_proj": {"w": abstract(12, 64, 64)} for n in "qkvo"}
    assert seen({"layers": layers}) == {}
    assert len(seen({"layers": layers}, MatrixAxes())) == 4


def test_stacks_of_adapters_have_no_heads():
    adapters = {"lora_a": abstract(32, 256, 8), "lora_b": abstract(32, 8, 256)}
    assert seen({"layers": {"q_proj": adapters, "out": dict(adapters)}}) == {}
    assert len(seen({"layers": {"q_proj": adapters}}, MatrixAxes())) == 2


def test_one_matrix_axes_leaves_attention_its_own():
    tree = {"query": {"kernel": abstract(12, 64, 4, 16)}, "mlp": abstract(12, 64, 32)}
    assert seen(tree, MatrixAxes()) == {
        "query/kernel": (12, 64, 64),
        "mlp": (12, 64, 32),
    }
    # What takes an axis of heads is meant for them.
    tree = {"query": abstract(64, 4, 16), "bias": abstract(4, 16)}
    assert seen(tree, MatrixAxes((0, 2), 1)) == {"query": (1024, 4)}


# The page ----------------------------------------------------------------------------


def page():
    """What the default rule makes of each recorded model, as Markdown tables."""
    for name, shapes in MODELS.items():
        yield f"### {name}"
        yield ""
        yield "| leaf | shape | seen as |"
        yield "|---|---|---|"
        tree = tree_of({path: x for path, x in shapes.items() if len(x) > 1})
        for v in view_leaves(tree, side="left"):
            if isinstance(v, MatrixView):
                stack = "".join(f"{size} of " for size in v.batch_shape)
                what = f"**{stack}{v.m} x {v.n}**"
            else:
                what = v.why if "names a" in v.why else "to be told"
            shape = " x ".join(map(str, v.shape))
            yield f"| `{v.path}` | {shape} | {what} |"
        yield ""


def test_the_page_says_what_is_chosen():
    text = (ROOT.parent / "MATRICES.md").read_text()
    tables = text[text.index("### ") :]
    assert tables.splitlines() == "\n".join(page()).strip().splitlines()


# Rules -------------------------------------------------------------------------------

TREE = {
    "embed": abstract(9, 4),
    "layers": [{"up": abstract(3, 6, 4), "down": abstract(4, 6)} for _ in range(2)],
    "b": abstract(4),
}


def test_rules_are_searched_in_paths_and_the_first_counts():
    rules = lro.matrix_rules(
        {r"^layers/1/up$": None, r"/up": MatrixAxes(0, (1, 2)), "": None}
    )
    assert seen(TREE, rules) == {"layers/0/up": (3, 24)}


def test_the_default_rule_holds_for_what_no_rule_names():
    rules = lro.matrix_rules({"up": MatrixAxes()})
    ups = {f"layers/{i}/up": (3, 6, 4) for i in range(2)}
    downs = {f"layers/{i}/down": (4, 6) for i in range(2)}
    assert seen(TREE, rules) == ups | downs
    others = lro.matrix_rules({"down": None}, otherwise=MatrixAxes())
    assert seen(TREE, others) == ups
    inner = lro.matrix_rules({"embed": MatrixAxes()}, otherwise=rules)
    assert seen(TREE, inner) == ups | downs | {"embed": (9, 4)}


def test_a_partial_tree_keeps_the_default_rule():
    spec = {"layers": [{"up": MatrixAxes()}]}
    assert seen(TREE, spec) == {
        "layers/0/up": (3, 6, 4),
        "layers/0/down": (4, 6),
        "layers/1/down": (4, 6),
    }
    # None speaks for all that stands below it.
    assert seen(TREE, spec | {"layers": None, "embed": MatrixAxes()}) == {
        "embed": (9, 4)
    }


def test_rules_give_a_tree_of_specs():
    rules = lro.matrix_rules({"up": MatrixAxes(), "down": None})
    assert rules(TREE) == {
        "embed": None,
        "layers": [{"up": MatrixAxes(), "down": None}] * 2,
        "b": None,
    }
    assert seen(TREE, rules(TREE)) == seen(TREE, rules)


def test_a_rule_that_matches_nothing_is_an_error_at_init():
    tx = lro.mlorc_lion(1e-2, matrices=lro.matrix_rules({"up": None, "upp": None}))
    with pytest.raises(ValueError, match=r"\['upp'\] of `matrix_rules`.*'layers/0/up'"):
        jax.eval_shape(tx.init, TREE)
    assert seen({}, lro.matrix_rules({"upp": None})) == {}


def test_a_rule_may_name_what_another_transformation_has_left_out():
    params = {"a": {"w": jnp.ones((4, 6))}, "c": {"w": jnp.ones((4, 6))}}
    rules = lro.matrix_rules({"a/w": MatrixAxes(), "c/w": MatrixAxes(1, 0)})
    tx = lro.mlorc_lion(1e-2, rank=2, matrices=rules)
    masked = optax.masked(tx, {"a": True, "c": False})
    masked.update(params, masked.init(params), params)
    parts = optax.partition({"x": tx, "y": tx}, {"a": "x", "c": "y"})
    parts.update(params, parts.init(params), params)
    # A None of the parameters' own is at its path, as `eqx.filter` leaves it.
    assert seen({"a": {"w": abstract(4, 6)}, "c": {"w": None}}, rules)
    with pytest.raises(ValueError, match="'c/w'"):
        seen({"a": {"w": abstract(4, 6)}, "static": None}, rules)


@pytest.mark.parametrize(
    "rules, error, match",
    [
        ({"w": "left"}, TypeError, "'left' for 'w'"),
        ({"w": (0, 1)}, TypeError, r"\(0, 1\) for 'w'"),
        ({"(w": None}, ValueError, r"'\(w' as a regular expression"),
    ],
)
def test_wrong_rules_are_errors_when_made(rules, error, match):
    with pytest.raises(error, match=match):
        lro.matrix_rules(rules)


@jax.tree_util.register_pytree_with_keys_class
class Module:
    """A callable tree, as an Equinox module is."""

    def __init__(self, weight, head):
        self.weight, self.head = weight, head

    def __call__(self, x):
        raise AssertionError("a tree is read, and not called")

    def tree_flatten_with_keys(self):
        names = "weight", "head"
        key = jax.tree_util.GetAttrKey
        return [(key(n), getattr(self, n)) for n in names], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_a_callable_tree_of_specs_is_a_tree():
    model = Module(jnp.ones((4, 6)), jnp.ones((6, 9)))
    specs = lro.default_matrices(model)
    assert isinstance(specs, Module)
    tx = lro.galore_adamw(1e-2, rank=2, matrices=specs)
    _, state = tx.update(model, tx.init(model), model)
    assert seen(model, specs) == seen(model) == {"weight": (4, 6)}


# Stacks of vectors, and what is said of others ----------------------------------------


@pytest.mark.parametrize("rule", [lro.default_matrices, lro.matrix_rules({})])
def test_a_leaf_that_is_no_array_is_refused_by_its_path(rule):
    for other in (2.0, jax.nn.relu):  # as of an Equinox model that was not filtered
        with pytest.raises(TypeError, match="'layers/1/f': it must be an array"):
            rule({"layers": [jnp.ones((4, 4)), {"f": other}]})


def test_vectors_of_layers_are_told_by_their_names_and_the_weights_beside_them():
    shapes = {
        **{"rms/weight": (12, 64), "rms/gain": (12, 64), "gru/bias_ih": (12, 64)},
        **{"pos_encoding": (128, 64), "positional_encoding/table_": (128, 64)},
        **{"w1": (12, 64, 96), "b1": (12, 96), "up_w": (12, 64, 96), "up_b": (12, 96)},
        **{"wq": (12, 64, 4, 16), "bq": (12, 4, 16), "attn_norm_weight": (12, 64)},
        **{"norm_ffn/weight": (12, 64), "ln_attn/w": (12, 64), "ln_f": (12, 64)},
    }
    assert set(seen(tree_of(shapes))) == {"wq"}
    # What only looks like it: no weights beside it, or a matrix beside a norm.
    others = {"b1": (64, 96), "up_b": (64, 96), "norm_ffn/kernel": (64, 96)}
    assert set(seen(tree_of(others))) == set(others)
    assert set(seen(tree_of({"w1": (64, 96), "b1": (64, 96)}))) == {"w1", "b1"}


@pytest.mark.filterwarnings("ignore:No name tells")
@pytest.mark.parametrize(
    "shapes",
    [
        {"0": (40, 32), "1": (32, 4, 8), "2": (64,)},
        {"layers/0/x": (24, 4, 8), "layers/1/x": (24, 32), "layers/2/x": (24, 4, 8)},
        {"layers/0/x": (24, 4, 8), "layers/1/x": (24, 4, 8), "layers/2/y": (24, 32)},
        {"layers/0/x": (24, 4, 8), "layers/1/x": (4, 4, 24, 8)},
    ],
)
def test_the_advice_for_what_is_unknown_can_be_followed(shapes):
    params = tree_of(shapes)
    with pytest.warns(UserWarning, match="nothing tells which") as said:
        lro.describe(lro.galore_adamw(1e-2, 2), params)
    text = str(said[0].message)
    (advice,) = re.findall(r"matrices=(lro.matrix_rules\(.*\)); None", text)
    rules = eval(advice, {"lro": lro})
    rows = lro.describe(lro.galore_adamw(1e-2, 2, matrices=rules), params)
    assert all(row.view for row in rows if len(row.shape) > 1)


@pytest.mark.filterwarnings("ignore:No name tells")
def test_the_advice_sees_heads_that_make_up_the_width_of_the_model():
    shapes = {
        "blocks/attend": (32, 4, 8),
        "blocks/post": (4, 8, 32),
        "towers/attend": (2, 32, 4, 8),
        "towers/post": (2, 4, 8, 32),
        "blocks/up": (4, 16, 64),  # a stack of as many layers as up is wide
    }
    with pytest.warns(UserWarning, match="nothing tells which") as said:
        lro.describe(lro.galore_adamw(1e-2, 2), tree_of(shapes))
    (advice,) = re.findall(
        r"matrices=(lro.matrix_rules\(.*\)); None", str(said[0].message)
    )
    chosen = seen(tree_of(shapes), eval(advice, {"lro": lro}))
    assert chosen == {
        "blocks/attend": (32, 32),
        "blocks/post": (32, 32),
        "towers/attend": (2, 32, 32),
        "towers/post": (2, 32, 32),
        "blocks/up": (4, 16, 64),
    }


@pytest.mark.filterwarnings("ignore:No name tells")
def test_depthwise_convolutions_are_given_no_rows_and_columns():
    shapes = {"conv": (3, 3, 1, 64), "one": (3, 3, 32, 1), "up": (3, 3, 32, 64)}
    with pytest.warns(UserWarning, match="nothing tells which") as said:
        lro.describe(lro.galore_adamw(1e-2, 2), tree_of(shapes))
    (advice,) = re.findall(
        r"matrices=(lro.matrix_rules\(.*\)); None", str(said[0].message)
    )
    assert all(f"'^{name}$': None" in advice for name in ("conv", "one"))
    assert "'^up$': lro.MatrixAxes(rows=(0, 1, 2), cols=3)" in advice


@pytest.mark.parametrize("specs", [{"nope": None}, {"w": {"x": None}}])
def test_nothing_at_a_path_that_is_not_there_is_refused(specs):
    params = {x: jnp.ones((16, 16)) for x in "vw"} | {"a": {"b": jnp.ones((16, 16))}}
    with pytest.raises(ValueError, match="names .* which the tree does not have"):
        lro.galore_adamw(1e-2, 4, matrices=specs).init(params)
    # All below a path, whether it is there or left out.
    tx = lro.galore_adamw(1e-2, 4, matrices={"a": {"b": None}, "w": None})
    for tree in (params, params | {"a": None}, params | {"a": optax.MaskedNode()}):
        assert [row.path for row in lro.describe(tx, tree) if row.view] == ["v"]


# Lists -------------------------------------------------------------------------------


def test_a_list_is_told_to_have_no_names_and_takes_specs_by_place():
    shapes = MODELS["Keras"]
    variables = [abstract(*shape) for shape in shapes.values() if len(shape) < 3]
    with pytest.warns(UserWarning, match="No name tells which of these 2"):
        jax.eval_shape(lro.mlorc_lion(1e-2, rank=1).init, [abstract(9, 8)] * 2)
    rule = lro.default_matrices({p: abstract(*x) for p, x in shapes.items()})
    specs = [rule[path] for path, shape in shapes.items() if len(shape) < 3]
    tx = lro.mlorc_lion(1e-2, rank=1, matrices=specs)
    rows = lro.describe(tx, variables)
    named = [path for path, shape in shapes.items() if len(shape) < 3]
    chosen = {path for path, row in zip(named, rows, strict=True) if row.view}
    assert chosen == {p for p in seen(tree_of(shapes)) if len(shapes[p]) == 2}
