"""Q-GaLore against its formulas: half bytes, the lazy renewal, state sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from running import assert_close, random_grads, random_like, relative_error, run

import lowrank_optax as lro
from lowrank_optax._src.leaves.matrix import last_axes_view
from lowrank_optax._src.parts.laws import Seen

KEY, ADAM = jax.random.key(0), optax.scale_by_adam()


def half_bytes(x, block=256):
    """The integers and scales of a matrix, blocks down its columns."""
    x = reference.wide(x)
    numbers, scales = np.zeros(x.shape, int), np.zeros(x.shape)
    for start in range(0, x.shape[-2], block):
        rows = slice(start, start + block)
        largest = np.abs(x[..., rows, :]).max(-2, keepdims=True)
        unit = x[..., rows, :] / np.where(largest > 0, largest, 1)
        numbers[..., rows, :] = np.rint(7 * unit)
        scales[..., rows, :] = largest
    return numbers, scales


def int4(x, block=256):
    numbers, scales = half_bytes(x, block)
    return numbers / 7 * scales


def encoded(codec, x):
    start = codec.init(last_axes_view("x", x))
    return start, codec.encode(KEY, x, start)


# The codec


@pytest.mark.parametrize("block", [4, 256])
@pytest.mark.parametrize(
    "shape", [(8, 6), (9, 5), (1, 1), (2, 7, 3), (300, 2)], ids=str
)
def test_two_numbers_share_a_byte(shape, block):
    codec = lro.PackedInt4(block)
    assert isinstance(codec, lro.Codec)
    x = random_like({"x": shape}, 0)["x"] * jnp.geomspace(1e-20, 1e9, shape[-1])
    start, code = encoded(codec, x)
    assert jax.tree.map(jax.typeof, start) == jax.tree.map(jax.typeof, code)
    *batch, m, n = shape
    blocks = -(-m // block)
    assert code.pairs.shape == (*batch, m, -(-n // 2)) and code.pairs.dtype == jnp.uint8
    assert code.largest.shape == (*batch, blocks, n)
    np.testing.assert_array_equal(codec.decode(start), np.zeros(shape))
    decoded = codec.decode(code)
    assert decoded.shape == shape
    np.testing.assert_allclose(decoded, int4(x, block), rtol=1e-6)
    # By hand: column 0 in the lower half of the first byte, column 1 in the upper.
    numbers, _ = half_bytes(x, block)
    pairs = np.asarray(code.pairs).astype(int)
    np.testing.assert_array_equal(pairs[..., 0] % 16, numbers[..., 0] % 16)
    if n > 1:
        np.testing.assert_array_equal(pairs[..., 0] // 16, numbers[..., 1] % 16)
    # What was decoded has the same code again, at every step.
    again = codec.encode(KEY, decoded, code)
    jax.tree.map(np.testing.assert_array_equal, again, code)


def test_zero_columns_and_bad_numbers():
    codec = lro.PackedInt4()
    x = jnp.ones((4, 3)).at[:, 1].set(0.0)
    np.testing.assert_array_equal(codec.decode(encoded(codec, x)[1]), x)
    _, code = encoded(codec, x.at[2, 0].set(jnp.nan))
    # So that the engine can tell, and keeps the old code.
    assert not np.all(np.isfinite(code.largest))


@pytest.mark.parametrize("block", [0, -1])
def test_a_block_is_not_empty(block):
    with pytest.raises(ValueError, match="`block` must be at least 1"):
        lro.PackedInt4(block)


# The lazy renewal


VIEW = lro.MatrixView("", (8, 12), jnp.float32, (0,), (1,), ())


def seen(overlap):
    return Seen(*3 * [jnp.ones([])], jnp.asarray(overlap))


def renewals(rule, overlaps, steps):
    """The steps at which a rule renews, the overlap of each renewal given."""
    overlaps, state = iter(overlaps), rule.init(VIEW, 0.5)
    after, found = jax.jit(rule.after), []
    for step in range(steps):
        due = rule.due(state, jnp.asarray(step))
        overlap = 0.0 if not found else next(overlaps) if due else 1.0
        found += [step] if due else []
        state = after(state, due, seen(overlap))
    return found


def test_the_period_doubles_after_five_steady_renewals_up_to_its_cap():
    steady = [0.9] * 100
    # Never before five overlaps have come in, and anew for each doubling (M-2.6).
    first = [0, 3, 6, 9, 12, 15]
    second = [21, 27, 33, 39, 45]
    capped = [54, 63, 72, 81, 90, 99]
    rule = lro.WhenDrifted(3, 0.4, max_stretch=3)
    assert renewals(rule, steady, 100) == first + second + capped
    assert renewals(lro.WhenDrifted(3, 0.95), steady, 100) == list(range(0, 100, 3))
    # The mean of the last five decides, whatever was before.
    turning = [0.1, 0.1, 0.3, 0.3, 0.3, 0.3, 0.79, 0.9, 0.9]
    found = renewals(lro.WhenDrifted(1), turning + steady, 12)
    assert found == [*range(9), 10]


def test_no_period_is_longer_than_can_be_counted():
    rule, period = lro.WhenDrifted(2**30), 2**30
    state = rule.init(VIEW, 0.5)
    for _ in range(20):
        state = rule.after(state, jnp.array(True), seen(0.9))
        assert state.left == period - 1


def test_the_rule_follows_the_protocol():
    rule = lro.WhenDrifted(4)
    assert isinstance(rule, lro.Refresh)
    state = rule.init(VIEW, 0.5)
    after = jax.eval_shape(rule.after, state, jnp.array(True), seen(1.0))
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    for wrong in ({"update_every": 0}, {"update_every": 1, "max_stretch": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            lro.WhenDrifted(**wrong)


# The method

M, N, RANK, STEPS, PERIOD = 128, 140, 33, 50, 2


class SlowlyTurning:
    """Bases given in advance, one a step."""

    def __init__(self):
        rng = np.random.default_rng(0)
        drift = np.cumsum(0.2 * rng.standard_normal((STEPS, M, RANK)), axis=0)
        bases, _ = np.linalg.qr(rng.standard_normal((M, RANK)) + drift)
        self.bases = jnp.asarray(bases, jnp.float32)

    def select(self, key, grad, old, step):
        return self.bases[step]


def q_galore_adam(grads, bases, quantize, scale, b1=0.9, b2=0.999, eps=1e-8):
    """Q-GaLore with Adam; also the steps of its renewals."""
    p = m = v = None
    left, stretch, recent, found, directions = 0, 1, [], [], []
    for step, g in enumerate(map(reference.wide, grads)):
        left -= 1
        if left <= 0:
            found.append(step)
            old, p = p, reference.wide(bases[step])
            if old is not None:
                p = p * np.where((p * old).sum(0) < 0, -1, 1)
                recent = [*recent, ((p.T @ old) ** 2).sum() / RANK][-5:]
            if len(recent) == 5 and np.mean(recent) >= 0.4:
                stretch, recent = 2 * stretch, []
            left = stretch * PERIOD
        r = p.T @ g
        m = b1 * (0 if m is None else m) + (1 - b1) * r
        v = b2 * (0 if v is None else v) + (1 - b2) * r**2
        t = step + 1
        n = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        directions.append(scale * p @ n)
        p = quantize(p)
    return directions, found


def test_q_galore_adam_follows_the_formulas():
    grads = list(random_like({"g": (STEPS, M, N)}, 1)["g"])
    subspace = SlowlyTurning()
    tx = lro.q_galore_project(
        ADAM, rank=RANK, update_every=PERIOD, subspace=subspace, scale=0.5
    )
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    expected, found = q_galore_adam(grads, subspace.bases, int4, 0.5)
    assert found == [0, 2, 4, 6, 8, 10, 14, 18, 22, 26, 30, 38, 46]
    for step, (g, want) in enumerate(zip(grads, expected, strict=True)):
        before = state.inner_state.basis
        u, state = update(g, state)
        assert relative_error(u, want) < 1e-4
        assert np.all(np.asarray(state.inner_state.inner_state.nu) >= 0)
        if step not in found:  # it is not worn off
            jax.tree.map(np.testing.assert_array_equal, state.inner_state.basis, before)
    basis = np.asarray(lro.PackedInt4().decode(state.inner_state.basis))
    error = relative_error(basis.T @ basis, np.eye(RANK))
    assert 0.02 < error < 0.2
    exact, _ = q_galore_adam(grads, subspace.bases, lambda p: p, 0.5)
    assert relative_error(expected[1], exact[1]) > 1e-3


def test_with_eight_bits_the_basis_is_closer():
    g = random_like({"g": (M, N)}, 0)["g"]
    tx = lro.q_galore_project(ADAM, rank=RANK, bits=8)
    _, state = run(tx, g, [g])
    basis = np.asarray(lro.BlockInt8(True).decode(state.inner_state.basis))
    assert relative_error(basis.T @ basis, np.eye(RANK)) < 0.03
    with pytest.raises(ValueError, match="`bits` must be 4 or 8, got 3"):
        lro.q_galore_project(ADAM, rank=RANK, bits=3)


def test_unquantized_and_never_lazy_it_is_galore():
    # Below 4,096 numbers a basis is not quantized.
    params = random_like({"w": (6, 9), "v": (9, 6), "b": (9,)}, 0)
    grads = random_grads(params, 13)
    shared = dict(rank=3, update_every=2, scale=0.5)
    got, _ = run(lro.q_galore_project(ADAM, threshold=1.1, **shared), params, grads)
    want, _ = run(lro.galore_project(ADAM, **shared), params, grads)
    for u, v in zip(got, want, strict=True):
        assert_close(u, v)


def test_a_bad_gradient_leaves_a_usable_state():
    g = random_like({"g": (M, N)}, 0)["g"]
    tx = lro.q_galore_adamw_8bit(0.1, RANK, update_every=1)
    tx = tx._replace(update=jax.jit(tx.update))
    _, before = tx.update(g, tx.init(g), g)
    for bad in (0 * g, g.at[0, 0].set(jnp.nan)):
        _, after = tx.update(bad, before, g)
        for x in jax.tree.leaves(after):
            assert np.all(np.isfinite(x))
        jax.tree.map(
            np.testing.assert_array_equal,
            optax.tree.get(after, "basis"),
            optax.tree.get(before, "basis"),
        )
        u, _ = tx.update(g, after, g)
        assert np.all(np.isfinite(u)) and np.any(np.asarray(u))


# Sizes (M-7)


@pytest.mark.parametrize("shape", [(128, 300), (1000, 128), (2, 600, 300)], ids=str)
@pytest.mark.parametrize("r", [32, 63])
def test_state_size(shape, r):
    *batch, _, _ = shape
    (count,) = batch or (1,)
    short, long = sorted(shape[-2:])
    basis = count * (short * -(-r // 2) + 4 * -(-short // 256) * r)
    moment = count * long * r
    refresh, counters = count * 4 * (2 + 5), 4 * 3
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    tx = lro.q_galore_project(ADAM, rank=r, matrices=lro.MatrixAxes())
    assert lro.state_bytes(tx, params) == basis + 8 * moment + refresh + counters
    (row,) = lro.describe(tx, params)
    assert row.rank == r
    tx = lro.q_galore_adamw_8bit(0.1, r, matrices=lro.MatrixAxes())
    eight = 2 * (moment + 4 * count * -(-long * r // 256))
    assert lro.state_bytes(tx, params) == basis + eight + refresh + counters + 4


def test_q_galore_adamw_8bit_is_its_parts():
    params = random_like({"w": (6, 9), "frozen": (6, 9)}, 0)
    grads = random_grads(params, 3)
    tx = lro.q_galore_adamw_8bit(
        0.1,
        2,
        update_every=1,
        scale=0.5,
        b1=0.8,
        b2=0.9,
        eps=1e-3,
        weight_decay=0.5,
        mask={"w": True, "frozen": False},
        transfer=lro.Rotate(),
    )
    updates, _ = run(tx, params, grads)
    inner = optax.scale_by_adam(b1=0.8, b2=0.9, eps=1e-3)
    method = lro.q_galore_project(
        inner, rank=2, update_every=1, scale=0.5, transfer=lro.Rotate()
    )
    directions, _ = run(method, params, grads)
    for u, d in zip(updates, directions, strict=True):
        assert_close(u["w"], -0.1 * (d["w"] + 0.5 * params["w"]))
        assert_close(u["frozen"], -0.1 * d["frozen"])
