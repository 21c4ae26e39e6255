"""Block-wise 8-bit states: the map, the codec, and optimizers that keep their moments
in it, followed by a NumPy transcription."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from running import assert_close, random_grads, random_like, relative_error, run

import lowrank_optax as lro
from lowrank_optax._src.leaves.matrix import last_axes_view

KEY = jax.random.key(0)


def the_map(signed):
    """Seven decades, each a grid twice as fine as the last one's, and 0 and 1."""
    numbers = [0.0, 1.0]
    for i in range(7):
        count = 2**i if signed else 2 ** (i + 1)
        for j in range(count):
            number = (0.1 + 0.9 * (j + 0.5) / count) * 10.0 ** (i - 6)
            numbers += [number, -number] if signed else [number]
    return np.array(sorted(numbers))


def quantized(x, signed, block=256):
    """What storing does to a matrix: blocks along the rows, or over their ends."""
    numbers = the_map(signed)
    x = reference.wide(x)
    flat = np.pad(x.ravel(), (0, -x.size % block)).reshape(-1, block)
    largest = np.abs(flat).max(1, keepdims=True)
    unit = flat / np.where(largest > 0, largest, 1)
    nearest = numbers[np.abs(unit[..., None] - numbers).argmin(-1)]
    smallest = np.sign(unit) * numbers[numbers > 0].min()
    nearest = np.where(nearest == 0, smallest, nearest)
    return (nearest * largest).ravel()[: x.size].reshape(x.shape)


def spread(shape, seed=0):
    """Numbers over nine decades."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-9, 0, shape)
    return x.astype(np.float32)


def encoded(codec, x):
    code = codec.init(last_axes_view("x", x))
    return code, codec.encode(KEY, jnp.asarray(x), code)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(8, 512), (7, 100), (3, 1), (300,)], ids=str)
def test_rounds_to_the_nearest_number_of_the_map(signed, shape):
    assert len(set(the_map(signed))) == 256
    codec = lro.BlockInt8(signed)
    assert isinstance(codec, lro.Codec)
    x = spread(shape) if signed else np.abs(spread(shape))
    x = x.reshape(-1, shape[-1])
    start, code = encoded(codec, x)
    assert jax.tree.map(jax.typeof, start) == jax.tree.map(jax.typeof, code)
    np.testing.assert_array_equal(codec.decode(start), np.zeros(x.shape))
    decoded = np.asarray(codec.decode(code))
    np.testing.assert_allclose(decoded, quantized(x, signed), rtol=1e-5, atol=0)
    np.testing.assert_array_equal(np.sign(decoded), np.sign(x))
    if not signed:
        assert codec.nonnegative and np.all(decoded >= 0)


@pytest.mark.parametrize("scale", [1e30, 1e-20])
def test_every_block_has_its_own_scale(scale):
    x = spread((4, 512), 1)
    x[1] *= scale
    x[2] = 0
    _, code = encoded(lro.BlockInt8(True), x)
    assert code.largest.shape == (4, 2)
    decoded = lro.BlockInt8(True).decode(code)
    np.testing.assert_allclose(decoded, quantized(x, True), rtol=1e-5, atol=0)


@pytest.mark.parametrize("columns", [512, 100])
def test_a_stack_is_the_loop_over_its_slices(columns):
    codec, x = lro.BlockInt8(True), spread((3, 6, columns), 2)
    whole = codec.decode(encoded(codec, x)[1])
    for one, part in zip(x, whole, strict=True):
        np.testing.assert_array_equal(codec.decode(encoded(codec, one)[1]), part)


def adam_by_formula(grads, block, b1=0.9, b2=0.999, eps=1e-8):
    m = v = np.zeros(grads[0].shape)
    for t, g in enumerate(map(reference.wide, grads), start=1):
        m = b1 * quantized(m, True, block) + (1 - b1) * g
        v = b2 * quantized(v, False, block) + (1 - b2) * g**2
        yield m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


@pytest.mark.parametrize("shape", [(16, 256), (50, 100), (5000,)], ids=str)
@pytest.mark.parametrize("known", [False, True])
def test_adam_follows_the_transcription(shape, known):
    """Of any optimizer, and in the pass for one that is known to be Adam."""
    params = {"w": jnp.zeros(shape)}
    tx = lro.quantize_state(optax.scale_by_adam())
    if known:
        tx = lro.adamw_8bit(-1.0)
    grads = random_grads(params, 50)
    updates, state = run(tx, params, grads)
    expected = adam_by_formula([g["w"] for g in grads], 256)
    plain, _ = run(optax.scale_by_adam(), params, grads)
    moved = wanted = exact = np.zeros(shape)
    for u, want, p in zip(updates, expected, plain, strict=True):
        moved, wanted = moved + np.asarray(u["w"]), wanted + want
        exact = exact + np.asarray(p["w"])
        # A number half-way between two of the map may go the other way in float32.
        assert relative_error(moved, wanted) < 1e-3
    assert 1e-3 < relative_error(moved, exact) < 0.1
    nu = optax.tree.get(state, "nu")["w"]
    assert nu.index.dtype == jnp.uint8
    assert np.all(np.asarray(lro.BlockInt8(False).decode(nu)) > 0)


def test_what_stays_in_float32_has_the_numbers_of_adam_too():
    params = {"small": jnp.ones(8), "w": jnp.ones((64, 128))}
    numbers = {"b1": 0.5, "b2": 0.8, "eps": 0.1}
    grads = random_grads(params, 4)
    updates, state = run(lro.adamw_8bit(-1.0, **numbers), params, grads)
    expected, _ = run(optax.scale_by_adam(**numbers), params, grads)
    for u, want in zip(updates, expected, strict=True):
        assert_close(u["small"], want["small"])
        assert relative_error(u["w"], want["w"]) < 0.05
    assert optax.tree.get(state, "mu")["small"].dtype == jnp.float32


def test_lion_follows_the_transcription():
    params = {"w": jnp.zeros((16, 256))}
    grads = random_grads(params, 50)
    updates, _ = run(lro.quantize_state(optax.scale_by_lion()), params, grads)
    m = np.zeros((16, 256))
    for u, g in zip(updates, grads, strict=True):
        c = 0.9 * quantized(m, True) + 0.1 * reference.wide(g["w"])
        assert np.mean(np.sign(c) != u["w"]) < 1e-3
        m = 0.99 * quantized(m, True) + 0.01 * reference.wide(g["w"])


def moment_bytes(size, block=256):
    return size + 4 * -(-size // block) if size >= 4096 else 4 * size


def test_state_bytes_are_those_of_the_formula():
    shapes = {"w": (64, 256), "odd": (70, 90), "embed": (300, 40), "b": (50,)}
    shapes |= {"long": (5000,), "stack": (3, 16, 128)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor does a stack need a word
        adam = lro.state_bytes(lro.adamw_8bit(1e-3), params)
    assert adam == 2 * sum(map(moment_bytes, sizes)) + 2 * 4
    lion = lro.quantize_state(optax.scale_by_lion(), block=64)
    one = sum(moment_bytes(size, 64) for size in sizes)
    assert lro.state_bytes(lion, params) == one + 2 * 4


def test_state_bytes_of_galore():
    params = {"w": jnp.zeros((64, 256)), "tall": jnp.zeros((300, 64))}
    bases = 4 * 16 * (64 + 64)
    moments = 2 * (moment_bytes(16 * 256) + moment_bytes(16 * 300))
    tx = lro.galore_adamw_8bit(1e-2, rank=16)
    assert lro.state_bytes(tx, params) == bases + moments + 3 * 4


def test_galore_stays_close_to_float32():
    params = random_like({"w": (64, 128)}, 0)
    grads = random_grads(params, 12)
    kwargs = dict(learning_rate=0.1, rank=48, update_every=5, transfer=lro.Rotate())
    updates, state = run(lro.galore_adamw_8bit(**kwargs), params, grads)
    expected, _ = run(lro.galore_adamw(**kwargs), params, grads)
    nu = optax.tree.get(state, "nu")["w"]
    assert nu.index.shape == (48, 128)
    assert np.all(np.asarray(lro.BlockInt8(False).decode(nu)) >= 0)
    error = relative_error([u["w"] for u in updates], [u["w"] for u in expected])
    assert 1e-4 < error < 0.1


def test_adarankgrad_in_bytes_is_its_parts():
    params = random_like({"w": (64, 72), "frozen": (6, 9)}, 0)
    grads = random_grads(params, 4)
    ranks = dict(
        max_rank=60,
        min_rank=2,
        max_residual_energy=0.3,
        max_interval=2,
        min_interval=2,
        recovery=lro.FiraResidual(),
        transfer=lro.Keep(),
        side="short",
        key=3,
        scale=0.5,
        matrices=lro.MatrixAxes(),
    )
    tx = lro.adarankgrad_adamw_8bit(
        0.1,
        b1=0.8,
        b2=0.9,
        eps=1e-3,
        weight_decay=0.5,
        mask={"w": True, "frozen": False},
        block=64,
        **ranks,
    )
    updates, state = run(tx, params, grads)
    assert optax.tree.get(state, "nu")["w"].index.shape == (60, 72)
    inner = optax.scale_by_adam(b1=0.8, b2=0.9, eps=1e-3)
    method = lro.quantize_state(lro.adaptive_rank(inner, **ranks), block=64)
    directions, _ = run(method, params, grads)
    for u, d in zip(updates, directions, strict=True):
        assert_close(u["w"], -0.1 * (d["w"] + 0.5 * params["w"]))
        assert_close(u["frozen"], -0.1 * d["frozen"])


@pytest.mark.parametrize("value", [0.0, jnp.nan, jnp.inf])
def test_a_bad_gradient_leaves_a_usable_state(value):
    params = {"w": jnp.zeros((16, 256))}
    grads = random_grads(params, 3)
    bad = {"w": grads[0]["w"].at[3, 5].set(value)}
    updates, state = run(lro.adamw_8bit(0.1), params, [bad, *grads])
    for x in jax.tree.leaves((state, updates[1:])):
        assert np.all(np.isfinite(x))
    assert np.linalg.norm(updates[-1]["w"]) > 0.01 * 64


def test_a_sparse_gradient_is_not_divided_by_epsilon():
    """A second moment that rounded to zero would be: its momentum has not yet."""
    params = {"w": jnp.zeros((16, 256))}
    first = jnp.full((16, 256), 1e-4).at[:, 0].set(1.0)
    grads = [{"w": first}] + [{"w": jnp.zeros((16, 256)).at[:, 0].set(1.0)}] * 5
    updates, _ = run(lro.quantize_state(optax.scale_by_adam()), params, grads)
    assert max(float(jnp.abs(u["w"]).max()) for u in updates) < 10


def test_fields_can_be_chosen():
    params = {"w": jnp.zeros((64, 256))}
    tx = lro.quantize_state(optax.scale_by_adam(), fields=("nu",))
    inner = tx.init(params).inner_state
    assert inner.nu["w"].index.shape == inner.mu["w"].shape == (64, 256)


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        ({"bits": 4}, ValueError, "`bits` must be 8.*got 4"),
        ({"block": 0}, ValueError, "`block` must be at least 1, got 0"),
        ({"block": 2.0}, TypeError, "`block` must be a Python int"),
        ({"fields": ("mv",)}, ValueError, "has the fields mu, nu"),
    ],
    ids=str,
)
def test_refusals(kwargs, error, message):
    with pytest.raises(error, match=message):
        tx = lro.quantize_state(optax.scale_by_adam(), **kwargs)
        tx.init({"w": jnp.zeros((64, 256))})
