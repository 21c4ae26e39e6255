"""Which arguments `inject_hyperparams` puts into the state, and which stay static."""

import inspect
import numbers
import typing
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from registry import METHODS, PERIOD, RANK, example_params
from running import assert_close, random_grads, run
from typing_extensions import TypeAliasType

import lowrank_optax as lro
from lowrank_optax._src.methods.optimizer import Static

NUMBERS = set(
    "learning_rate b1 b2 eps rho switch_step max_residual_energy warmup residual_scale "
    "limiter decay_rate clipping_threshold momentum update_every max_interval "
    "min_interval threshold max_stretch scale weight_decay dense_learning_rate "
    "dense_weight_decay".split()
)
STATIC = set(
    "inner tx rule dense codecs rank max_rank min_rank leading num_heads density bits "
    "block every axis_name error_feedback oversample power_iters warm_start compress "
    "fields per reference measure subspace refresh transfer recovery mask side "
    "matrices key".split()
)


def injected(tx):
    return set(jax.eval_shape(tx.init, example_params()).hyperparams)


def arguments(factory, **kwargs):
    bound = inspect.signature(factory).bind(**kwargs)
    bound.apply_defaults()
    return bound.arguments


def test_every_argument_is_of_one_class():
    found = {k for m in METHODS for k in arguments(m.factory, **m.kwargs)}
    assert not NUMBERS & STATIC
    assert found == NUMBERS | STATIC


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_numbers_are_injected_and_all_else_is_static(method):
    given = arguments(method.factory, **method.kwargs)
    state = injected(lro.inject_hyperparams(method.factory)(**method.kwargs))
    assert state == {k for k in NUMBERS & given.keys() if given[k] is not None}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_number_may_be_a_schedule(method):
    given = arguments(method.factory, **method.kwargs)
    schedules = {
        k: optax.constant_schedule(given[k])
        for k in NUMBERS & given.keys()
        if given[k] is not None
    }
    tx = lro.inject_hyperparams(method.factory)(**method.kwargs | schedules)
    assert injected(tx) == schedules.keys()


def scaled(
    number: Any = 0.5,
    size: Any = 3,
    mask: Callable[[Any], Any] = lambda params: params,
) -> optax.GradientTransformation:
    """Scales by an argument of a type that is set below; sees all others as given."""
    assert isinstance(size, int) and mask(1) == 1
    return optax.scale(number)


def annotated(**types):
    def factory(number=0.5, size=3, mask=lambda params: params):
        return scaled(number, size, mask)

    factory.__annotations__ = types
    return factory


@pytest.mark.parametrize(
    "number",
    [
        ArrayLike,
        float,
        ArrayLike | None,
        float | jax.Array | Callable[[Any], Any],
        typing.Optional[float],  # noqa: UP045
        numbers.Real,
        object,
        jax.Array,
        Float[Array, ""],
        Annotated[float, "a share"],
        TypeAliasType("Number", float),
        "float",
        Any,
        inspect.Parameter.empty,
    ],
    ids=str,
)
def test_types_that_are_injected(number):
    factory = annotated(number=number, size=int, mask=Callable[[Any], Any])
    assert injected(lro.inject_hyperparams(factory)()) == {"number"}


@pytest.mark.parametrize(
    "size",
    [
        int,
        int | None,
        "int",
        Static[float],
        Static[float] | None,
        TypeAliasType("Size", int),
        int | tuple[int, int],
        int | jax.Array,
        tuple[str, ...],
        lro.MatrixAxes | Any | None,
        typing.Literal[3],
    ],
    ids=str,
)
def test_types_that_are_static(size):
    factory = annotated(number=float, size=size, mask=Callable[[Any], Any])
    assert injected(lro.inject_hyperparams(factory)()) == {"number"}


def test_further_static_arguments():
    factory = annotated(number=float, size=float, mask=Callable[[Any], Any])
    for static in ("size", ("size",)):
        assert injected(lro.inject_hyperparams(factory, static)()) == {"number"}


def test_a_name_that_only_type_checkers_know():
    factory = annotated(number="NoSuchName", mask="NoSuchName")
    tx = lro.inject_hyperparams(factory, ("size", "mask"))()
    assert injected(tx) == {"number"}


def test_without_annotations_the_names_of_the_engine_are_known():
    def columns(learning_rate, rank, update_every=PERIOD, side="short", matrices=None):
        tx = lro.galore_project(
            optax.scale_by_adam(),
            rank=rank,
            update_every=update_every,
            side=side,
            matrices=matrices,
        )
        return optax.chain(tx, optax.scale_by_learning_rate(learning_rate))

    params = example_params()
    grads = random_grads(params, PERIOD + 1)
    given = {"learning_rate": 0.1, "rank": RANK, "matrices": lro.default_matrices}
    tx = lro.inject_hyperparams(columns)(**given)
    assert injected(tx) == {"learning_rate", "update_every"}
    updates, _ = run(tx, params, grads)
    expected, _ = run(columns(**given), params, grads)
    assert_close(updates, expected, rtol=2e-4, atol=1e-5)


def test_factories_of_optax():
    def mask(params):
        return jax.tree.map(lambda x: x.ndim > 1, params)

    params = example_params()
    grads = random_grads(params, 3)
    schedule = optax.linear_schedule(0.1, 0.0, 3)
    tx = lro.inject_hyperparams(optax.adamw)(schedule, weight_decay=0.1, mask=mask)
    numbers = {"learning_rate", "b1", "b2", "eps", "eps_root", "weight_decay"}
    assert injected(tx) == numbers
    updates, _ = run(tx, params, grads)
    expected, _ = run(optax.adamw(schedule, weight_decay=0.1, mask=mask), params, grads)
    assert_close(updates, expected, rtol=2e-4, atol=1e-5)

    # Its sizes decide shapes: traced, they would be an error.
    tx = lro.inject_hyperparams(optax.adafactor)(0.1, min_dim_size_to_factor=2)
    assert "decay_rate" in injected(tx)
    updates, _ = run(tx, params, grads)
    expected, _ = run(optax.adafactor(0.1, min_dim_size_to_factor=2), params, grads)
    assert_close(updates, expected, rtol=2e-4, atol=1e-5)


def test_a_hyperparameter_may_be_changed_between_updates():
    params = {"w": jnp.ones((4, 6))}
    grads = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)))}
    tx = lro.inject_hyperparams(lro.golore_adamw)(0.1, 2, switch_step=1, scale=1.0)
    state = tx.init(params)
    one, _ = tx.update(grads, state, params)
    state.hyperparams["scale"] = jnp.asarray(0.5)
    half, _ = tx.update(grads, state, params)
    assert_close(2 * half["w"], one["w"], rtol=1e-6)
