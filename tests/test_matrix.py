"""Which leaves are matrices, how they are seen, and what is told about it."""

import itertools
import warnings

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import lowrank_optax as lro
from lowrank_optax import MatrixAxes
from lowrank_optax._src.leaves.choose import view_leaves
from lowrank_optax._src.leaves.matrix import SIDES, DenseLeaf, MatrixView
from lowrank_optax._src.leaves.paths import flatten, path_parts


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def tree_of(paths, leaf):
    """Nested dicts that hold ``leaf`` at each of some ``/``-separated paths."""
    tree = {}
    for path in paths:
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def seen(tree, **kwargs):
    """The views of a tree by path."""
    return {v.path: v for v in view_leaves(tree, **kwargs)}


# The default rule -------------------------------------------------------------------

MATRICES = """
model.layers.0.self_attn.q_proj.weight
model/layers/11/self_attn/o_proj/weight
model/layers/0/mlp/gate_proj/weight
params/Dense_0/kernel
params/encoder/layer_3/attention/query/kernel
params/decoder/layers/mlp/wi_0/kernel
blocks/0/mlp/linear_in/kernel
transformer/h/0/attn/c_attn/weight
transformer/h/0/mlp/c_proj/weight
encoder/block/0/layer/0/SelfAttention/q/weight
encoder/block/0/layer/1/DenseReluDense/wo/weight
bert.encoder.layer.0.attention.output.dense.weight
bert/encoder/layer/0/attention/output/dense/kernel
bert/encoder/layer/0/output/dense/kernel
bert/encoder/layer/0/intermediate/dense/kernel
outputProjection/kernel
attention/multihead/kernel
attention/num_heads_proj/kernel
scores/kernel
overhead/kernel
reembed/kernel
moe/shared_expert/up_proj/kernel
shared_transformer/dense/kernel
score_net/dense/kernel
attention/heads/kernel
attention/heads/0/kernel
encoder/attention/output/kernel
ada_norm/linear/kernel
normalize_net/dense/kernel
bias_net/dense/kernel
b
w
""".split()

DENSE = """
model.embed_tokens.weight
model/embed_tokens/weight
lm_head/weight
lm_head.weight
params/lm_head/kernel
params/Embed_0/embedding
params/token_embedder/embedding
tokenEmbedding/weight
positionEmbeddings2D/kernel
PosEmbed/kernel
embedding
transformer/wte/weight
transformer.wpe.weight
shared/weight
params/shared/embedding
bert/embeddings/word_embeddings/weight
bert/pooler/dense/kernel
classifier/out_proj/weight
score/weight
params/logits_dense/kernel
finalLogits/kernel
cls/predictions/transform/dense/weight
head/kernel
heads/kernel
heads/qa/kernel
output/kernel
output.weight
params/model/output/kernel
output
unembed/kernel
lm_head_proj/kernel
posemb
decoder/unembedding/kernel
pos_embs
vocab_proj/kernel
tok_emb/weight
emb/weight
value_head/kernel
mlm_head/dense/kernel
qa_outputs/kernel
lm_out/kernel
discriminator_predictions/dense/kernel
transformer/output_layer/weight
decoder/output_projection/weight
relative_position_bias_table
layers/norm/scale
layers/norm/weight
layers/LayerNorm_0/scale
layers/RMSNorm/w
layers/input_layernorm/weight
layers/ln_1/weight
transformer/ln_f/scale
layers/batch_normalization/gamma
layers/batch_normalization/beta
layers/dense/bias
attention/query/bias
layers/self_attn/q_proj/bias
layers/layer_scale
layer_norm/offset
""".split()


@pytest.mark.parametrize("path", MATRICES + DENSE)
def test_default_rule_goes_by_the_words_of_the_path(path):
    view = seen(tree_of([path], abstract(6, 4)))[path]
    if path in MATRICES:
        assert isinstance(view, MatrixView)
    else:
        assert isinstance(view, DenseLeaf)
        assert "names a" in view.why and any(
            f"'{piece}'" in view.why for piece in path.replace(".", "/").split("/")
        )


def test_default_rule_takes_float_leaves_of_two_axes():
    tree = {
        "scalar": abstract(),
        "vector": abstract(4),
        "matrix": abstract(4, 3),
        "half": abstract(4, 3, dtype=jnp.bfloat16),
        "kernel": abstract(3, 3, 4, 8),
        "count": abstract(4, 3, dtype=jnp.int32),
        "mask": abstract(4, 3, dtype=jnp.bool_),
    }
    why = {p: getattr(v, "why", None) for p, v in seen(tree).items()}
    assert why == {
        "scalar": "it is a scalar",
        "vector": "it is a vector",
        "matrix": None,
        "half": None,
        "kernel": "it has 4 axes and nothing tells which are rows and columns",
        "count": "its dtype int32 is not floating",
        "mask": "its dtype bool is not floating",
    }


def test_default_matrices_is_the_default_rule():
    tree = tree_of(MATRICES + DENSE, abstract(6, 4)) | {"bias": abstract(4)}
    specs = lro.default_matrices(tree)
    assert specs["bias"] is None
    flat, _ = flatten(specs), None
    is_matrix = {p for p, v in seen(tree).items() if isinstance(v, MatrixView)}
    named = {"/".join(p) for p, s in zip(*flat[:2], strict=True) if s == MatrixAxes()}
    assert named == is_matrix == set(MATRICES)
    assert seen(tree, matrices=specs).keys() == seen(tree).keys()
    for path, view in seen(tree, matrices=specs).items():
        assert isinstance(view, MatrixView) == (path in is_matrix)


def test_default_matrices_can_be_edited():
    params = {"lm_head": jnp.ones((4, 6)), "w": jnp.ones((4, 6))}
    specs = lro.default_matrices(params)
    assert specs == {"lm_head": None, "w": MatrixAxes()}
    specs |= {"lm_head": MatrixAxes(), "w": None}
    state = lro.mlorc_scale_by_lion(rank=2, matrices=specs).init(params)
    assert state.inner_state.mu["lm_head"].left.shape == (4, 2)
    assert state.inner_state.mu["w"].shape == (4, 6)


def test_one_matrix_axes_holds_for_all_but_named_dense_leaves():
    tree = {
        "embed": abstract(2, 5, 3),
        "scanned": abstract(2, 5, 3),
        "flat": abstract(5, 3),
        "bias": abstract(5),
        "index": abstract(5, 3, dtype=jnp.int32),
    }
    views = seen(tree, matrices=MatrixAxes())
    assert {p for p, v in views.items() if isinstance(v, MatrixView)} == {
        "scanned",
        "flat",
    }


# Shapes ------------------------------------------------------------------------------

LAYOUTS = {
    "matrix": ((6, 4), MatrixAxes(), (), 6, 4),
    "transposed": ((6, 4), MatrixAxes(1, 0), (), 4, 6),
    "scanned": ((3, 6, 4), MatrixAxes(), (3,), 6, 4),
    "scanned last": ((6, 4, 3), MatrixAxes(0, 1), (3,), 6, 4),
    "experts": ((3, 5, 6, 4), MatrixAxes(), (3, 5), 6, 4),
    "DenseGeneral query": ((8, 2, 3), MatrixAxes(0, (1, 2)), (), 8, 6),
    "DenseGeneral out": ((2, 3, 8), MatrixAxes((0, 1), 2), (), 6, 8),
    "MaxText query": ((8, 3, 2, 5), MatrixAxes(0, (2, 3)), (3,), 8, 10),
    "convolution": ((3, 3, 4, 8), MatrixAxes((0, 1, 2), -1), (), 36, 8),
}


def entry_by_entry(leaf, rows, cols):
    """``(*batch, m, n)`` by moving one entry after the other."""
    batch = [a for a in range(leaf.ndim) if a not in (*rows, *cols)]
    sizes = [[leaf.shape[a] for a in group] for group in (batch, rows, cols)]
    m, n = int(np.prod(sizes[1])), int(np.prod(sizes[2]))
    result = np.zeros((*sizes[0], m, n), leaf.dtype)
    for index in np.ndindex(*leaf.shape):
        b, i, j = (tuple(index[a] for a in group) for group in (batch, rows, cols))
        row = np.ravel_multi_index(i, sizes[1])
        col = np.ravel_multi_index(j, sizes[2])
        result[(*b, row, col)] = leaf[index]
    return result


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_common_models(name):
    shape, axes, batch, m, n = LAYOUTS[name]
    leaf = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    view = seen({"w": leaf}, matrices={"w": axes}, side="left")["w"]
    assert (view.batch_shape, view.m, view.n) == (batch, m, n)
    assert view.size == leaf.size
    rows, cols = (
        [a % leaf.ndim for a in np.atleast_1d(group)]
        for group in (axes.rows, axes.cols)
    )
    matrix = view.matrix(leaf)
    np.testing.assert_array_equal(matrix, entry_by_entry(leaf, rows, cols))
    np.testing.assert_array_equal(view.leaf(matrix), leaf)


@st.composite
def assignments(draw):
    """A shape, and an assignment of its axes to rows, columns and batch."""
    shape = draw(st.lists(st.integers(1, 3), min_size=2, max_size=5))
    axes = draw(st.permutations(range(len(shape))))
    rows = draw(st.integers(1, len(shape) - 1))
    cols = draw(st.integers(1, len(shape) - rows))
    groups = axes[:rows], axes[rows : rows + cols]
    signed = [
        tuple(a - len(shape) * draw(st.booleans()) for a in group) for group in groups
    ]
    bare = [g[0] if len(g) == 1 and draw(st.booleans()) else g for g in signed]
    return tuple(shape), groups, MatrixAxes(*bare)


@hypothesis.settings(max_examples=60)
@hypothesis.given(assignments(), st.sampled_from(SIDES))
def test_matrix_and_leaf_are_inverse_for_any_axes(assignment, side):
    shape, (rows, cols), axes = assignment
    leaf = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    view = seen({"w": leaf}, matrices={"w": axes}, side=side)["w"]
    matrix = np.asarray(view.matrix(leaf))
    assert matrix.shape == (*view.batch_shape, view.m, view.n)
    by_rows = entry_by_entry(leaf, rows, cols)
    on_left = view.left == tuple(rows)
    np.testing.assert_array_equal(matrix if on_left else matrix.mT, by_rows)
    np.testing.assert_array_equal(view.leaf(matrix), leaf)
    m, n = by_rows.shape[-2:]
    assert (
        on_left
        == {
            "left": True,
            "right": False,
            "short": m < n,
            "short_left": m <= n,
            "long": m >= n,
        }[side]
    )


@pytest.mark.parametrize(
    "side, wide, tall, square",
    [
        ("short", "left", "right", "right"),  # as the GaLore code has ties
        ("short_left", "left", "right", "left"),  # as the LDAdam code has them
        ("long", "right", "left", "left"),
        ("left", "left", "left", "left"),
        ("right", "right", "right", "right"),
    ],
)
def test_sides_and_ties(side, wide, tall, square):
    params = {"wide": abstract(4, 6), "tall": abstract(6, 4), "square": abstract(5, 5)}
    tx = lro.project_gradients(optax.scale_by_adam(), rank=2, side=side)
    rows = {row.path: row for row in lro.describe(tx, params)}
    assert {p: row.side for p, row in rows.items()} == {
        "wide": wide,
        "tall": tall,
        "square": square,
    }
    state = jax.eval_shape(tx.init, params)
    assert state.basis["wide"].shape == ((4, 2) if wide == "left" else (6, 2))
    assert state.basis["tall"].shape == ((6, 2) if tall == "left" else (4, 2))


def test_views_compute_in_float32_and_return_the_leafs_dtype():
    leaf = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)), jnp.bfloat16)
    view = seen({"w": leaf})["w"]
    assert view.matrix(leaf).dtype == view.compute_dtype == jnp.float32
    back = view.leaf(view.matrix(leaf))
    assert back.dtype == jnp.bfloat16
    np.testing.assert_array_equal(back, leaf)
    assert view.leaf(view.matrix(leaf), jnp.float32).dtype == jnp.float32
    with jax.enable_x64(True):
        wide = seen({"w": abstract(6, 4, dtype=jnp.float64)})["w"]
        assert wide.compute_dtype == jnp.float64


def test_zeros_have_the_views_batch_axes():
    view = seen({"w": abstract(3, 6, 4)}, matrices=MatrixAxes(), side="left")["w"]
    assert view.zeros("m", 2).shape == (3, 6, 2)
    assert view.zeros(2, "n").shape == (3, 2, 4)
    assert view.zeros("m", "n").dtype == jnp.float32
    assert view.zeros(1, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert [view.rank(r) for r in (1, 4, 9)] == [1, 4, 4]


# Specs -------------------------------------------------------------------------------


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.query = nnx.LinearGeneral(8, (2, 3), use_bias=False, rngs=rngs)
        self.out = nnx.LinearGeneral((2, 3), 8, axis=(-2, -1), rngs=rngs)
        self.mlp = nnx.List(
            [nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 8, rngs=rngs)]
        )

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.out(self.query(x))
        for layer in self.mlp:
            x = nnx.relu(layer(x))
        return self.embed.attend(x)


def general(path, x):
    """Axes by a leaf's own path: what a callable spec typically does."""
    named = "/".join(path_parts(path))
    if "query/kernel" in named:
        return MatrixAxes(0, (1, 2))
    if "out/kernel" in named:
        return MatrixAxes((0, 1), 2)
    return MatrixAxes() if named.startswith("mlp") and x.ndim == 2 else None


SPECS = {
    "callable": lambda tree: jax.tree_util.tree_map_with_path(general, tree),
    "nested dict": {
        "query": {"kernel": MatrixAxes(0, (1, 2))},
        "out": {"kernel": MatrixAxes((0, 1), 2)},
        "mlp": {
            0: {"kernel": MatrixAxes()},
            1: {"kernel": MatrixAxes(), "bias": None},
        },
    },
}
KERNELS = {"query/kernel", "out/kernel", "mlp/0/kernel", "mlp/1/kernel"}


@pytest.mark.parametrize("spec", SPECS)
def test_nnx_optimizer_selects_the_same_leaves_at_init_and_update(spec):
    calls = []

    def record(tree):
        matrices = SPECS[spec](tree) if callable(SPECS[spec]) else SPECS[spec]
        views = view_leaves(tree, matrices)
        calls.append({v.path: v for v in views if isinstance(v, MatrixView)})
        return matrices

    model = Attention(nnx.Rngs(0))
    tx = lro.mlorc_adamw(1e-2, rank=2, matrices=record)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    at_init = calls[-1]
    assert set(at_init) == KERNELS

    tokens = jnp.arange(6)[None]
    grads = nnx.grad(lambda model: (model(tokens) ** 2).mean())(model)
    calls.clear()
    optimizer.update(model, grads)
    assert calls and all(views == at_init for views in calls)

    moved = jax.tree.map(
        lambda a, b: bool(jnp.any(a != b)), before, nnx.state(model, nnx.Param)
    )
    assert all(jax.tree.leaves(moved))


def test_a_spec_from_the_models_own_state():
    model = Attention(nnx.Rngs(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        specs = lro.default_matrices(nnx.state(model, nnx.Param))
        tx = lro.mlorc_adamw(1e-2, rank=2, matrices=specs)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
        optimizer.update(model, grads)
    rows = lro.describe(tx, nnx.state(model, nnx.Param))
    assert {row.path for row in rows if row.view} == KERNELS


def test_a_callable_spec_needs_shapes_only():
    params = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 4))}
    tx = lro.mlorc_scale_by_lion(
        rank=2,
        matrices=lambda tree: jax.tree.map(
            lambda x: MatrixAxes() if x.shape[0] == 4 else None, tree
        ),
    )
    state = jax.eval_shape(tx.init, params)
    _, state = jax.eval_shape(tx.update, params, state)
    assert state.inner_state.mu["a"].left.shape == (4, 2)
    assert state.inner_state.mu["b"].shape == (6, 4)


# Errors ------------------------------------------------------------------------------

CUBE = {"layer": {"kernel": abstract(3, 6, 4)}}


@pytest.mark.parametrize(
    "axes",
    [
        MatrixAxes(0, 0),
        MatrixAxes(-1, 2),
        MatrixAxes((0, 1), 1),
        MatrixAxes((0, 0), 1),
        MatrixAxes(3, 1),
        MatrixAxes(-4, 1),
        MatrixAxes((), 1),
    ],
    ids=str,
)
def test_axes_must_be_distinct_and_in_range(axes):
    with pytest.raises(ValueError) as error:
        view_leaves(CUBE, {"layer": {"kernel": axes}})
    message = str(error.value)
    for part in ("'layer/kernel'", "(3, 6, 4)", str(axes), "distinct axes"):
        assert part in message


def test_one_matrix_axes_that_does_not_fit_a_leaf_names_it():
    tree = CUBE | {"flat": abstract(6, 4)}
    with pytest.raises(ValueError, match=r"'flat' of shape \(6, 4\).*among its 2"):
        view_leaves(tree, MatrixAxes(0, (1, 2)))


def test_integer_leaves_cannot_be_matrices():
    tree = {"layer": {"index": abstract(6, 4, dtype=jnp.int32)}}
    with pytest.raises(
        ValueError, match=r"'layer/index' of shape \(6, 4\).*int32.*Give None"
    ):
        view_leaves(tree, {"layer": {"index": MatrixAxes()}})


def test_unknown_paths_are_errors():
    tree = {"layer": {"kernel": abstract(6, 4), "bias": abstract(4)}}
    with pytest.raises(ValueError) as error:
        view_leaves(tree, {"layer": {"kernel": MatrixAxes()}, "laier": MatrixAxes()})
    message = str(error.value)
    assert "'laier'" in message and "does not have" in message
    assert "'layer/bias'" in message and "'layer/kernel'" in message
    # What was to be left out would be projected.
    with pytest.raises(ValueError, match="'x'.* does not have"):
        view_leaves(tree, {"layer": {"kernel": MatrixAxes()}, "x": None})


@pytest.mark.parametrize("wrong", [(0, 1), "kernel", 3])
def test_leaves_of_a_spec_are_matrix_axes_or_none(wrong):
    with pytest.raises(TypeError, match="must be MatrixAxes or None"):
        view_leaves({"w": abstract(6, 4)}, {"w": wrong})


@pytest.mark.parametrize(
    "matrices",
    [MatrixAxes(), {}, {"bias": None}, lambda tree: jax.tree.map(lambda x: None, tree)],
    ids=["axes", "empty", "none", "callable"],
)
def test_a_spec_that_matches_nothing_is_an_error(matrices):
    tree = {"bias": abstract(4), "embed": abstract(6, 4)}
    with pytest.raises(ValueError) as error:
        view_leaves(tree, matrices)
    message = str(error.value)
    for part in ("matches no parameter", "'bias' (4,)", "'embed' (6, 4)"):
        assert part in message


@pytest.mark.parametrize("side", ["auto", "Short", "", None, "up"])
def test_unknown_sides_are_errors(side):
    with pytest.raises(ValueError, match="it must be one of short, .*left, right"):
        lro.galore_project(optax.trace(0.9), rank=2, side=side).init(
            {"w": jnp.ones((4, 6))}
        )


@pytest.mark.parametrize("matrices", [None, MatrixAxes(), {}, {"w": MatrixAxes()}])
def test_empty_trees_match_any_spec(matrices):
    assert view_leaves({}, matrices) == []


# Placeholders ------------------------------------------------------------------------


@pytest.mark.parametrize("placeholder", [None, optax.MaskedNode()], ids=str)
def test_specs_of_left_out_leaves_are_no_error(placeholder):
    spec = {"w": MatrixAxes(), "b": None}
    tree = {"w": placeholder, "b": abstract(4)}
    assert [v.path for v in view_leaves(tree, spec)] == ["b"]
    views = seen({"w": abstract(4, 6), "x": placeholder}, matrices=MatrixAxes())
    assert isinstance(views["w"], MatrixView) and set(views) == {"w"}


@pytest.mark.parametrize("placeholder", [None, optax.MaskedNode()], ids=str)
def test_unknown_paths_are_errors_beside_placeholders(placeholder):
    with pytest.raises(ValueError, match="'typo'"):
        view_leaves({"w": placeholder, "b": abstract(4)}, {"typo": MatrixAxes()})


def test_one_spec_serves_every_branch_of_a_partition():
    params = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 4)), "c": jnp.ones(3)}
    spec = {"a": MatrixAxes(), "b": MatrixAxes(), "c": None}
    tx = optax.partition(
        {
            "low": lro.mlorc_scale_by_lion(rank=2, matrices=spec),
            "other": lro.galore_project(optax.trace(0.9), rank=3, matrices=spec),
        },
        {"a": "low", "b": "other", "c": "low"},
    )
    rows = {row.path: row for row in lro.describe(tx, params)}
    assert [rows[p].rank for p in "abc"] == [2, 3, None]
    updates, _ = tx.update(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


# The warning -------------------------------------------------------------------------


LEFT_DENSE = {
    "scanned": (jnp.ones((2, 3, 4)), (2, 3, 4)),
    "behind": (jnp.ones((6, 2, 4)), (2, 6, 4)),
    "conv.1": (jnp.ones((3, 2, 4)), (6, 4)),
    "kernel": (jnp.ones((3, 3, 4, 8)), (36, 8)),
    "weight": (jnp.ones((8, 4, 3, 3)), (8, 36)),
    "depthwise": (jnp.ones((3, 4, 1)), None),
    "layers": ([jnp.ones((3, 3, 4, 8))] * 2, (36, 8)),
}


def test_what_is_left_dense_is_told_once_with_what_makes_it_a_matrix():
    params = {p: x for p, (x, _) in LEFT_DENSE.items()}
    params |= {"embed": jnp.ones((2, 3, 4)), "w": jnp.ones((4, 6))}
    tx = lro.mlorc_scale_by_lion(rank=1)
    with pytest.warns(UserWarning) as told:
        state = tx.init(params)
    assert len(told) == 1
    message = str(told[0].message)
    for path in LEFT_DENSE.keys() - {"layers"}:
        assert f"'{path}' {params[path].shape}" in message
    assert "'layers/0' (3, 3, 4, 8) and 1 like it" in message
    assert "'w'" not in message and "'embed'" not in message
    advice = message[message.index("lro.matrix_rules(") : message.index("; None")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tx.update(params, state, params)
        tx = lro.project_gradients(
            optax.trace(0.9),
            rank=1,
            side="left",
            matrices=eval(advice, {"lro": lro}),
        )
        rows = {row.path: row.view for row in lro.describe(tx, params)}
    expected = {p: view for p, (_, view) in LEFT_DENSE.items() if p != "layers"}
    expected |= {"layers/0": (36, 8), "layers/1": (36, 8)}
    assert rows == expected | {"embed": None, "w": (4, 6)}


@pytest.mark.parametrize(
    "matrices",
    [MatrixAxes(), {"scanned": None}, lro.matrix_rules({"scanned": None})],
    ids=["axes", "none", "rule"],
)
def test_what_is_asked_for_is_not_told(matrices):
    params = {"scanned": jnp.ones((2, 3, 4)), "w": jnp.ones((4, 6))}
    lro.mlorc_scale_by_lion(rank=2, matrices=matrices).init(params)


# Tables ------------------------------------------------------------------------------

PARAMS = {
    "embed": {"weight": abstract(20, 8)},
    "mlp": {"kernel": abstract(8, 12), "bias": abstract(12)},
    "scan": abstract(3, 10, 6, dtype=jnp.bfloat16),
}
SPEC = {"mlp": {"kernel": MatrixAxes()}, "scan": MatrixAxes()}


def test_describe_galore():
    tx = lro.galore_adamw(1e-2, rank=4, matrices=SPEC, weight_decay=0.1)
    rows = {row.path: row for row in lro.describe(tx, PARAMS)}
    assert list(rows) == ["embed/weight", "mlp/bias", "mlp/kernel", "scan"]
    embed, bias, kernel, scan = rows.values()
    assert (kernel.shape, kernel.view, kernel.side) == ((8, 12), (8, 12), "left")
    assert (kernel.rank, kernel.why) == (4, "")
    assert kernel.state_bytes == 4 * (8 * 4 + 2 * 4 * 12)
    assert (scan.view, scan.side, scan.rank) == ((3, 6, 10), "right", 4)
    assert scan.dtype == "bfloat16"
    assert scan.state_bytes == 3 * 4 * (6 * 4 + 2 * 4 * 10)  # float32 all the same
    assert (embed.view, embed.side, embed.rank) == (None, "", None)
    assert embed.state_bytes == 2 * 4 * 20 * 8
    assert embed.why == "'embed' names an embedding or a head"
    assert bias.why == "it is a vector"
    assert bias.state_bytes == 2 * 4 * 12


@pytest.mark.parametrize(
    "tx, bytes_of_kernel",
    [
        (lro.mlorc_scale_by_adam(rank=3, matrices=SPEC), 4 * 2 * 3 * (8 + 12)),
        (lro.mlorc_scale_by_lion(rank=3, matrices=SPEC), 4 * 3 * (8 + 12)),
        (
            lro.project_gradients(optax.trace(0.9), rank=3, side="long", matrices=SPEC),
            4 * (12 * 3 + 3 * 8),
        ),
    ],
    ids=["mlorc_adam", "mlorc_lion", "project"],
)
def test_describe_other_methods(tx, bytes_of_kernel):
    kernel = lro.describe(tx, PARAMS)[2]
    assert (kernel.path, kernel.rank) == ("mlp/kernel", 3)
    assert kernel.state_bytes == bytes_of_kernel


def test_describe_says_why_a_leaf_is_dense():
    params = PARAMS | {"scan": abstract(4, 4, dtype=jnp.int8)}
    why = {r.path: r.why for r in lro.describe(lro.galore_adamw(1e-2, 4), params)}
    assert why == {
        "embed/weight": "'embed' names an embedding or a head",
        "mlp/bias": "it is a vector",
        "mlp/kernel": "",
        "scan": "its dtype int8 is not floating",
    }
    plain = lro.describe(optax.adamw(1e-2), params)
    assert {row.why for row in plain} == {"no low-rank method sees it"}
    assert [row.rank for row in plain] == [None] * 4


def test_tables_print_in_columns():
    table = lro.describe(lro.galore_adamw(1e-2, rank=4, matrices=SPEC), PARAMS)
    header, *lines = str(table).splitlines()
    assert repr(table) == str(table) and len(lines) == len(table)
    starts = [header.index(name) for name in header.split()]
    assert header.split()[:2] == ["path", "shape"]
    for line, row in zip(lines, table, strict=True):
        padded = line.ljust(starts[-1])
        cells = [
            padded[a:b].strip()
            for a, b in itertools.zip_longest(starts, starts[1:], fillvalue=None)
        ]
        shown = [row.path, row.shape, row.dtype, row.view, row.side, row.rank]
        assert cells[:6] == ["" if x is None else str(x) for x in shown]
        assert cells[6:] == [str(row.state_bytes), row.why]
    assert str(lro.describe(optax.adam(1e-2), {})) == "(no parameters)"


@pytest.mark.parametrize(
    "tx",
    [
        lro.galore_adamw(1e-2, rank=4, matrices=SPEC),
        lro.mlorc_adamw(1e-2, rank=4, matrices=SPEC, weight_decay=0.1),
        lro.mlorc_compress(optax.trace(0.9), rank=2, matrices=SPEC),
        lro.compress_state(
            optax.adam(1e-2), {"mu": lro.Cast(jnp.bfloat16)}, matrices=SPEC
        ),
        optax.MultiSteps(lro.mlorc_lion(1e-2, rank=2, matrices=SPEC), 2),
        optax.adamw(1e-2),
    ],
    ids=["galore", "mlorc", "compress", "cast", "multi_steps", "adamw"],
)
def test_state_bytes_is_what_a_state_takes(tx):
    # Element-wise codecs leave leaves of fewer than 4,096 elements alone.
    shapes = PARAMS | {"embed": {"weight": abstract(600, 8)}}
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
    taken = sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))
    assert lro.state_bytes(tx, shapes) == lro.state_bytes(tx, params) == taken
    # Nothing but counters belongs to no parameter.
    rows = lro.describe(tx, shapes)
    assert 0 <= taken - sum(row.state_bytes for row in rows) <= 16


def test_memory_report():
    tx = lro.galore_adamw(1e-2, rank=4, matrices=SPEC)
    rows = {row.what: row for row in lro.memory_report(tx, PARAMS)}
    weights = 4 * (20 * 8 + 8 * 12 + 12) + 2 * 3 * 10 * 6
    assert rows["weights"].bytes == rows["gradients"].bytes == weights
    assert rows["optimizer state"].bytes == lro.state_bytes(tx, PARAMS)
    assert all(row.bytes == row.bytes_per_device for row in rows.values())
    header, *lines = str(lro.memory_report(tx, PARAMS)).splitlines()
    assert header.split() == ["what", "bytes", "bytes_per_device"]
    assert lines[0].split() == ["weights", str(weights), str(weights)]


def test_memory_report_of_a_device():
    mesh = jax.make_mesh((2,), ("x",))

    def place(shape, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    params = {"rows": place((8, 12), "x", None), "whole": place((8, 12))}
    tx = lro.mlorc_scale_by_lion(rank=2)
    rows = {row.what: row for row in lro.memory_report(tx, params, mesh)}
    one = 4 * 8 * 12
    for what in ("weights", "gradients"):
        assert rows[what].bytes == 2 * one
        assert rows[what].bytes_per_device == one // 2 + one
    counters = lro.state_bytes(tx, params) - 2 * 4 * 2 * (8 + 12)
    # Of the sharded matrix, both factors are halved.
    assert (
        rows["optimizer state"].bytes_per_device
        == 4 * 2 * (4 + 6) + 4 * 2 * (8 + 12) + counters
    )
