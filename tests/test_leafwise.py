"""The one-matrix engine: what a rule is given, and where its state is kept."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from running import assert_close, random_grads, random_like, run

import lowrank_optax as lro
from lowrank_optax._src.engines.accept import accept_each
from lowrank_optax._src.parts.laws import StagedRule


class State(NamedTuple):
    trace: Any
    rows: Any


@dataclasses.dataclass(frozen=True)
class RowMomentum:
    """Momentum less the running sum of each row's mean, plus the step."""

    def init(self, view):
        return State(view.zeros("m", "n"), view.zeros("m"))

    def update(self, key, step, grad, state):
        trace = 0.9 * state.trace + grad
        rows = state.rows + grad.mean(-1)
        return trace - rows[..., None] + step, State(trace, rows)


def by_formula(grads):
    """`RowMomentum` in NumPy, for (*batch, m, n) with the rows on the left."""
    trace = rows = 0.0
    for step, g in enumerate(np.asarray(g, np.float64) for g in grads):
        trace = 0.9 * trace + g
        rows = rows + g.mean(-1, keepdims=True)
        yield trace - rows + step


def tx(**changes):
    return lro.leafwise(RowMomentum(), **{"dense": optax.trace(0.5)} | changes)


def test_matrices_get_the_rule_and_others_the_dense_optimizer():
    params = random_like({"wide": (4, 6), "tall": (6, 4), "b": (6,)}, 0)
    grads = random_grads(params, 4)
    updates, _ = run(tx(), params, grads)
    dense, _ = run(optax.trace(0.5), {"b": params["b"]}, [{"b": g["b"]} for g in grads])
    wide = by_formula([g["wide"] for g in grads])
    tall = by_formula([g["tall"].T for g in grads])
    for u, d, w, t in zip(updates, dense, wide, tall, strict=True):
        assert_close(u, {"wide": w, "tall": t.T, "b": d["b"]}, atol=1e-5)


@pytest.mark.parametrize(
    ("side", "turned"),
    [("short", False), ("left", False), ("long", True), ("right", True)],
)
def test_sides(side, turned):
    params = random_like({"w": (4, 6)}, 0)
    grads = random_grads(params, 3)
    updates, state = run(tx(side=side), params, grads)
    assert state.own["rows"]["w"].shape == ((6,) if turned else (4,))
    expected = by_formula([g["w"].T if turned else g["w"] for g in grads])
    for u, want in zip(updates, expected, strict=True):
        assert_close(u["w"], want.T if turned else want, atol=1e-5)


def test_a_stack_comes_to_the_rule_as_one():
    params = random_like({"w": (2, 3, 4, 6)}, 0)
    grads = random_grads(params, 3)
    updates, state = run(tx(matrices=lro.MatrixAxes()), params, grads)
    assert state.own["rows"]["w"].shape == (2, 3, 4)
    for u, want in zip(updates, by_formula([g["w"] for g in grads]), strict=True):
        assert_close(u["w"], want, atol=1e-5)


def test_a_kernel_with_heads_is_its_reshaped_matrix():
    params = random_like({"w": (4, 2, 3)}, 0)
    grads = random_grads(params, 3)
    axes = lro.MatrixAxes(rows=0, cols=(1, 2))
    updates, _ = run(tx(matrices=axes), params, grads)
    expected = by_formula([g["w"].reshape(4, 6) for g in grads])
    for u, want in zip(updates, expected, strict=True):
        assert_close(u["w"].reshape(4, 6), want, atol=1e-5)


def test_fields_of_the_dense_optimizer_are_kept_in_its_state():
    params = random_like({"w": (4, 6), "b": (6,)}, 0)
    state = tx().init(params)
    assert jax.tree.map(jnp.shape, state.inner_state.trace) == {"w": (4, 6), "b": (6,)}
    assert set(state.own) == {"rows"}
    assert state.own["rows"]["w"].shape == (4,)
    assert isinstance(state.own["rows"]["b"], optax.MaskedNode)
    # Also where the field is deep inside, or where there is none.
    chained = tx(dense=optax.chain(optax.scale(1.0), optax.trace(0.5))).init(params)
    assert set(chained.own) == {"rows"}
    assert chained.inner_state[1].trace["w"].shape == (4, 6)
    assert set(tx(dense=optax.scale(1.0)).init(params).own) == {"rows", "trace"}


class Shown(NamedTuple):
    numbers: Any


@dataclasses.dataclass(frozen=True)
class ShowKey:
    def init(self, view):
        return Shown(view.zeros("m", "n"))

    def update(self, key, step, grad, state):
        return grad, Shown(jax.random.normal(key, grad.shape))


def drawn(key):
    params = random_like({"a": (4, 6), "b": (4, 6)}, 0)
    shower = lro.leafwise(ShowKey(), dense=optax.scale(1.0), key=key)
    state, numbers = shower.init(params), []
    for _ in range(2):
        _, state = shower.update(params, state)
        numbers += [state.own["numbers"][name] for name in "ab"]
    return numbers


def test_keys_differ_by_leaf_and_step_and_repeat_by_seed():
    numbers = drawn(7)
    for i, one in enumerate(numbers):
        assert not any(np.allclose(one, other) for other in numbers[:i])
    assert_close(drawn(jax.random.key(7)), numbers, rtol=0, atol=0)
    assert not np.allclose(drawn(8)[0], numbers[0])


def test_a_state_that_is_not_finite_is_refused_as_a_whole():
    params = random_like({"w": (4, 6), "other": (4, 6)}, 0)
    grads = random_grads(params, 2)
    _, old = run(tx(), params, grads[:1])
    bad = grads[1] | {"w": grads[1]["w"].at[0, 0].set(jnp.inf)}
    _, new = run(tx(), params, [bad], old)
    _, fine = run(tx(), params, grads[1:], old)
    for field in ("trace", "rows"):
        was, now, good = (optax.tree.get(s, field) for s in (old, new, fine))
        assert_close(now["w"], was["w"], rtol=0, atol=0)
        assert_close(now["other"], good["other"], rtol=0, atol=0)


def test_extra_arguments_reach_the_dense_optimizer():
    def times_value(updates, state, params=None, *, value):
        return jax.tree.map(lambda u: value * u, updates), state

    dense = optax.GradientTransformationExtraArgs(
        lambda _: optax.EmptyState(), times_value
    )
    params = random_like({"w": (4, 6), "b": (6,)}, 0)
    optimizer = tx(dense=dense)
    updates, _ = optimizer.update(params, optimizer.init(params), params, value=3.0)
    assert_close(updates["b"], 3 * params["b"])


def test_an_unknown_side():
    with pytest.raises(ValueError, match="Unknown side 'up'"):
        tx(side="up").init({"w": jnp.ones((4, 6))})


# In stages


@dataclasses.dataclass(frozen=True)
class RowMomentumInStages:
    """`RowMomentum` with the sums of its rows made in thin stages, in two rounds.

    Keeps in what order its stages run, and on how many matrices.
    """

    calls: list = dataclasses.field(default_factory=list, hash=False, compare=False)
    seen: bool = False

    def init(self, view):
        return RowMomentum().init(view)

    @property
    def stages(self):
        return (self.sums, self.add), (self.step, self.finish)

    def start(self, keys, states, count):
        self.calls.append(("start", len(keys), len(states)))
        return states, [state.rows for state in states]

    def dense(self, grad, given):
        return False

    def sums(self, step, grad, state, given):
        self.calls.append("sums")
        ones = jnp.ones((*grad.matrix.shape[:-2], 1, grad.matrix.shape[-1]))
        return None, (given, grad.sketch(ones)[..., 0] / ones.shape[-1])

    def add(self, found, states, count):
        self.calls.append(("add", len(found), len(states)))
        return [rows + mean for rows, mean in found]

    def step(self, step, grad, state, given):
        self.calls.append("step")
        trace = 0.9 * state.trace + grad.matrix
        out = trace - given[..., None] + step
        lying = out.mT if grad.turned else out
        return grad.of(lying), State(trace, given)

    def finish(self, found, states, count):
        self.calls.append(("finish", len(found), len(states)))
        ok = [
            jnp.all(jnp.isfinite(x.rows)) & jnp.all(jnp.isfinite(x.trace))
            for x in found
        ]
        return [
            jax.tree.map(lambda x, y, ok=ok: jnp.where(ok, x, y), new, old)
            for ok, new, old in zip(ok, found, states, strict=True)
        ]


STAGED_SHAPES = {"wide": (4, 6), "tall": (6, 4), "more": (4, 6), "b": (6,)}


@pytest.mark.parametrize("side", ["short", "long", "left", "right"])
def test_a_rule_in_stages_is_the_rule_in_one(side):
    params = random_like(STAGED_SHAPES | {"stack": (2, 5, 3)}, 0)
    grads = random_grads(params, 4)
    changes = dict(dense=optax.trace(0.5), side=side, matrices=lro.MatrixAxes())
    updates, state = run(lro.leafwise(RowMomentumInStages(), **changes), params, grads)
    expected, want = run(lro.leafwise(RowMomentum(), **changes), params, grads)
    assert_close(updates, expected, atol=1e-5)
    assert_close(state, want, atol=1e-5)


def test_thin_stages_see_all_matrices_and_wide_ones_one_after_the_other():
    rule = RowMomentumInStages(seen=True)  # unlike those that are compiled already
    params = random_like(STAGED_SHAPES, 0)
    staged = lro.leafwise(rule, dense=optax.trace(0.5))
    jax.eval_shape(staged.update, params, staged.init(params))
    thin = [x for x in rule.calls if isinstance(x, tuple)]
    assert thin == [("start", 3, 3), ("add", 3, 3), ("finish", 3, 3)]
    assert isinstance(rule, StagedRule) and not isinstance(RowMomentum(), StagedRule)
    # Leaves of equal shapes share what is compiled of a wide stage.
    start, add, finish = (rule.calls.index(x) for x in thin)
    assert set(rule.calls[start + 1 : add]) == {"sums"}
    assert set(rule.calls[add + 1 : finish]) == {"step"}
    assert rule.calls.count("sums") == rule.calls.count("step") == 2


def test_a_rule_in_stages_without_matrices():
    params = random_like({"b": (6,)}, 0)
    grads = random_grads(params, 2)
    tx = lro.leafwise(RowMomentumInStages(), dense=optax.trace(0.5))
    updates, _ = run(tx, params, grads)
    assert_close(updates, run(optax.trace(0.5), params, grads)[0])


def test_a_rule_in_stages_keeps_what_is_not_finite_out_of_its_leaf_alone():
    params = random_like({"w": (4, 6), "other": (4, 6)}, 0)
    grads = random_grads(params, 2)
    staged = lro.leafwise(RowMomentumInStages(), dense=optax.trace(0.5))
    _, old = run(staged, params, grads[:1])
    bad = grads[1] | {"w": grads[1]["w"].at[0, 0].set(jnp.inf)}
    _, new = run(staged, params, [bad], old)
    _, fine = run(staged, params, grads[1:], old)
    for field in ("trace", "rows"):
        was, now, good = (optax.tree.get(s, field) for s in (old, new, fine))
        assert_close(now["w"], was["w"], rtol=0, atol=0)
        assert_close(now["other"], good["other"], rtol=0, atol=0)


# A beginning


@dataclasses.dataclass(frozen=True)
class FirstMean(RowMomentum):
    """`RowMomentum` whose rows begin at the mean of the first usable gradient."""

    def unset(self, state):
        return jnp.all(state.rows == 0)

    def begin(self, grad, state):
        return {"rows": grad.mean(-1)}


def test_a_rule_may_begin_with_its_first_usable_gradient():
    params = random_like({"w": (4, 6), "late": (4, 6)}, 0)
    grads = random_grads(params, 4)
    grads[0]["late"] = jnp.zeros((4, 6))
    grads[1]["late"] = jnp.full((4, 6), jnp.nan)
    state = (tx := lro.leafwise(FirstMean(), dense=optax.trace(0.5))).init(params)
    update, rows = jax.jit(tx.update), []
    for g in grads:
        _, state = update(g, state)
        rows.append(state.own["rows"])
    means = [jax.tree.map(lambda x: x.mean(-1), g) for g in grads]
    assert_close(rows[0]["w"], 2 * means[0]["w"])
    assert_close(rows[1]["w"], 2 * means[0]["w"] + means[1]["w"])
    np.testing.assert_array_equal(rows[1]["late"], 0)
    assert_close(rows[2]["late"], 2 * means[2]["late"])


def test_of_a_stack_each_matrix_is_accepted_whole():
    old = {"x": jnp.zeros((3, 2, 4)), "n": jnp.zeros(3), "all": jnp.zeros(())}
    new = {
        "x": jnp.ones((3, 2, 4)).at[1, 0, 2].set(jnp.nan),
        "n": jnp.array([1.0, 1.0, jnp.inf]),
        "all": jnp.ones(()),
    }
    found = accept_each(new, old, 1)
    assert found["x"].sum(axis=(1, 2)).tolist() == [8, 0, 8]
    assert found["n"].tolist() == [1, 1, 0] and found["all"] == 1
