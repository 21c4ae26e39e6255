"""When bases are renewed: the periods, and how leaves are spread over them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax._src.parts.laws import Seen

RULES = [lro.Every, lro.Staggered]
SEEN = Seen(*4 * [jnp.ones([])])


def due_steps(rule, steps, phase=0.0):
    """When a rule is due of its own; the engine renews at step 0 whatever it says."""

    @jax.jit
    def one_step(state, step):
        due = rule.due(state, step)
        new = rule.after(state, due | (step == 0), SEEN)
        return due, new

    state, found = rule.init(None, phase), []
    for i in range(steps):
        due, state = one_step(state, jnp.asarray(i, jnp.int32))
        found += [i] if due else []
    return found


def refreshed_steps(tx, params, steps):
    """``{leaf: steps at which its basis changed}``, every gradient another one."""
    rng = np.random.default_rng(0)
    state, update = tx.init(params), jax.jit(tx.update)
    changed = {name: [] for name in params}
    for step in range(steps):
        grads = jax.tree.map(
            lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), params
        )
        _, new = update(grads, state)
        for name in params:
            if np.any(new.basis[name] != state.basis[name]):
                changed[name].append(step)
        state = new
    return changed


@pytest.mark.parametrize("rule", RULES)
def test_rules_follow_the_protocol(rule):
    rule = rule(4)
    assert isinstance(rule, lro.Refresh)
    state = rule.init(None, 0.5)
    due = rule.due(state, jnp.int32(3))
    assert due.shape == () and due.dtype == jnp.bool_
    after = rule.after(state, due, SEEN)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert old.shape == new.shape == () and old.dtype == new.dtype


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("period", [0, -1])
def test_periods_are_at_least_one(rule, period):
    with pytest.raises(
        ValueError, match=f"`update_every` must be at least 1.*{period}"
    ):
        rule(period)


@pytest.mark.parametrize("phase", [0.0, 0.4, 0.9])
def test_every_leaf_at_multiples_of_the_period(phase):
    assert due_steps(lro.Every(4), 13, phase) == [0, 4, 8, 12]
    assert due_steps(lro.Every(1), 3, phase) == [0, 1, 2]


@pytest.mark.parametrize("phase", [0.0, 0.2, 0.55, 0.99])
@pytest.mark.parametrize("period", [1, 4, 7])
def test_staggered_keeps_the_period(phase, period):
    steps = due_steps(lro.Staggered(period), 5 * period + 1, phase)
    assert len(steps) == 5 and 1 <= steps[0] <= period
    assert set(np.diff(steps)) == {period}


def test_staggered_takes_each_offset_for_its_share_of_phases():
    first = [due_steps(lro.Staggered(4), 5, (i + 0.5) / 20)[0] for i in range(20)]
    assert sorted(first) == sorted(5 * [1, 2, 3, 4])


@pytest.mark.parametrize("phase", [0.0, 0.2, 0.55, 0.99])
def test_staggered_counts_down_from_its_place_in_the_period(phase):
    """A leaf that begins late, or is renewed out of turn, keeps its place."""
    rule = lro.Staggered(7)
    state = rule.init(None, phase)
    assert state.left.dtype == jnp.int32 and state.left == 7 - int(7 * phase)
    for step in range(1, 30):
        due = rule.due(state, jnp.int32(step - 1))
        state = rule.after(state, due | True, SEEN)
        assert (state.left - (7 - int(7 * phase) - step)) % 7 == 0
        assert 0 <= state.left < 7


@pytest.mark.parametrize("rule", RULES)
def test_the_period_may_be_traced(rule):
    @jax.jit
    def dues(period):
        state, found = rule(period).init(None, 0.3), []
        for step in range(7):
            found.append(rule(period).due(state, jnp.int32(step)))
            state = rule(period).after(state, found[-1], SEEN)
        return jnp.stack(found)

    for period in (2, 3):
        fixed = due_steps(rule(period), 7, 0.3)
        assert list(np.flatnonzero(dues(jnp.int32(period)))) == fixed


def test_the_engine_refreshes_all_leaves_together():
    params = {name: jnp.ones((4, 6)) for name in "abc"}
    tx = lro.project_gradients(optax.trace(0.9), rank=2, refresh=lro.Every(3))
    assert refreshed_steps(tx, params, 8) == {name: [0, 3, 6] for name in "abc"}


def test_the_engine_spreads_equal_leaves_evenly():
    params = {name: jnp.ones((4, 6)) for name in "abcde"}
    tx = lro.project_gradients(optax.trace(0.9), rank=2, refresh=lro.Staggered(5))
    changed = refreshed_steps(tx, params, 16)
    assert all(steps[0] == 0 for steps in changed.values())  # none starts without
    later = sorted(s for steps in changed.values() for s in steps if s > 0)
    assert later == list(range(1, 16))


def test_the_engine_spreads_by_cost():
    """One leaf as costly as eight others together takes half of the period."""
    params = {"a": jnp.ones((16, 32))} | {f"b{i}": jnp.ones((8, 8)) for i in range(8)}
    params |= {"bias": jnp.ones(512)}  # costs nothing: it is never refreshed
    period = 16
    tx = lro.project_gradients(optax.trace(0.9), rank=2, refresh=lro.Staggered(period))
    changed = refreshed_steps(tx, {k: params[k] for k in sorted(params)}, 2 * period)
    assert changed.pop("bias") == []
    second = {k: [s for s in steps if s >= period] for k, steps in changed.items()}
    assert all(len(steps) == 1 for steps in second.values())
    cost = np.zeros(period)
    for name, (step,) in second.items():
        cost[step - period] += params[name].size
    # No step takes more than the costliest leaf, none but its own is beside it ...
    assert cost.max() == params["a"].size
    # ... and the eight take eight different steps, a mean cost of a step each.
    assert sorted(cost[cost > 0]) == 8 * [64] + [512]
    # Half of the period is free around the leaf that is half of the cost.
    around = np.roll(cost, period // 2 - int(cost.argmax()))
    assert np.count_nonzero(around[period // 4 + 1 : -period // 4]) == 1


def test_a_stack_is_one_leaf():
    params = {"stack": jnp.ones((3, 4, 6)), "w": jnp.ones((4, 6))}
    tx = lro.project_gradients(
        optax.trace(0.9), rank=2, refresh=lro.Staggered(4), matrices=lro.MatrixAxes()
    )
    changed = refreshed_steps(tx, params, 9)
    assert [len(steps) for steps in changed.values()] == [3, 3]
    assert not set(changed["stack"][1:]) & set(changed["w"][1:])


@pytest.mark.parametrize("missing", [0.0, np.nan])
def test_an_expert_without_a_gradient_at_first_does_not_wait_for_a_refresh(missing):
    params = {"experts": jnp.ones((2, 8, 12))}
    tx = lro.project_gradients(
        optax.sgd(1.0), rank=3, refresh=lro.Every(100), matrices=lro.MatrixAxes()
    )
    grads = {"experts": jnp.ones((2, 8, 12)).at[0].set(missing)}
    _, state = tx.update(grads, tx.init(params))
    basis = np.asarray(state.basis["experts"])
    np.testing.assert_allclose(basis.mT @ basis, [np.eye(3)] * 2, atol=1e-5)
    grads = {
        "experts": jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 12)))
    }
    updates, _ = tx.update(grads, state)
    assert np.all(np.linalg.norm(updates["experts"], axis=(1, 2)) > 0.1)


def test_a_leaf_starts_with_its_first_usable_gradient():
    params = {"w": jnp.ones((8, 12))}
    tx = lro.project_gradients(optax.sgd(1.0), rank=3, refresh=lro.Every(100))
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update({"w": jnp.zeros((8, 12))}, state)
        np.testing.assert_array_equal(updates["w"], 0.0)
    grad = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)) @ np.eye(3, 12))
    updates, _ = tx.update({"w": grad}, state)
    np.testing.assert_allclose(updates["w"], -grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_periods_are_counted_in_integers(batch):
    params = {"w": jnp.ones((*batch, 6, 8))}
    rule = lro.WhenDrifted(4)
    tx = lro.project_gradients(
        optax.trace(0.9), rank=2, refresh=rule, matrices=lro.MatrixAxes()
    )
    for state in (tx.init(params), tx.update(params, tx.init(params))[1]):
        kept = state.refresh["w"]
        assert kept.left.dtype == kept.stretch.dtype == jnp.int32
        assert kept.left.shape == kept.stretch.shape == batch
        assert kept.recent.shape == (*batch, 5) and kept.recent.dtype == jnp.float32
