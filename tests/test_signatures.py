"""Arguments of the public factories: one order, one default, one way to pass them."""

import functools
import inspect
import re
import typing
from collections import Counter
from itertools import pairwise

import jax
import jax.numpy as jnp
import optax
import pytest
from registry import METHODS, SignOfMomentum

import lowrank_optax as lro

FACTORIES = {m.name: m.factory for m in METHODS if "-" not in m.name}
SIGNATURES = {k: inspect.signature(f, eval_str=True) for k, f in FACTORIES.items()}
PARAMETERS = {k: dict(s.parameters) for k, s in SIGNATURES.items()}
ALIASES = [name for name, p in PARAMETERS.items() if "learning_rate" in p]

# All arguments that two methods share stand in this order; `...` are the method's own.
ORDER = (
    *("learning_rate", "inner", "rank", "max_rank"),
    *("b1", "b2", "eps"),
    ...,
    *("update_every", "max_interval", "min_interval", "measure"),
    *("threshold", "max_stretch"),
    *("subspace", "refresh", "transfer", "recovery"),
    *("scale", "weight_decay", "mask", "side", "matrices", "key"),
    *("dense_learning_rate", "dense_weight_decay"),
)

# What may be given by position besides the learning rate and the rank, or the inner
# optimizer, or the rank of a `scale_by_` method.
BY_POSITION = {
    "compress_state": ("inner", "codecs"),  # the codecs are what it is called for
    "leafwise": ("rule",),  # stands where the inner optimizer does elsewhere
    "accumulate_gradients": ("tx", "every"),  # as in optax.MultiSteps
    "average_gradients": ("tx", "axis_name"),  # as in jax.lax.pmean
}

# Defaults of shared arguments; a factory without learning rate leaves the step size to
# what follows it, so its scale is 1.
DEFAULTS = {
    "rank": 128,
    "max_rank": 128,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "rho": 0.908,
    "error_feedback": True,
    "min_rank": 1,
    "max_residual_energy": 0.1,
    "num_heads": None,
    "density": 0.012,
    "warmup": None,
    "residual_scale": None,
    "per": "channel",
    "reference": None,
    "compress": ("mu", "nu"),
    "decay_rate": 0.8,
    "clipping_threshold": 1.0,
    "limiter": 1.01,
    "block": 256,
    "fields": None,
    "oversample": 4,
    "power_iters": 0,
    "warm_start": True,
    "update_every": 200,
    "max_interval": 200,
    "min_interval": 20,
    "measure": "share",
    "threshold": 0.4,
    "max_stretch": 16,
    "subspace": lro.TopSingular(),
    "transfer": lro.Keep(),
    "recovery": lro.Drop(),
    "scale": 0.25,
    "weight_decay": 0.0,
    "mask": None,
    "side": "short",
    "matrices": None,
    "key": 0,
}
PAPERS = {  # that say otherwise
    "MLorc (Shen et al. 2025): b1 of MLorc-AdamW, rank of all experiments": {
        "mlorc_adamw": {"rank": 4, "b1": 0.8},
        "mlorc_scale_by_adam": {"rank": 4, "b1": 0.8},
        "mlorc_compress": {"rank": 4},
    },
    "MLorc (Shen et al. 2025) at its rank; Lion (Chen et al. 2023): b2": {
        "mlorc_lion": {"rank": 4, "b2": 0.99},
        "mlorc_scale_by_lion": {"rank": 4, "b2": 0.99},
    },
    "LDAdam (Robert et al. 2024): decays and rank": {
        "ldadamw": {"rank": 16, "b1": 0.908, "b2": 0.99},
        "scale_by_ldadam": {"rank": 16, "b1": 0.908, "b2": 0.99},
    },
    "GoLore (He et al. 2024): the momentum is projected anew, alpha is 1": {
        "golore_adamw": {"transfer": lro.Rotate(), "scale": 1.0},
        "golore_project": {"transfer": lro.Rotate()},
    },
    "I3S (Zhang et al. 2025), Algorithm 3: the momentum is projected anew": {
        "hybrid_subspace": {"transfer": lro.Rotate()},
    },
    "APOLLO (Zhu et al. 2025): a Gaussian projection at rank 256, alpha is 1": {
        "apollo_adamw": {"rank": 256, "subspace": lro.RandomGaussian(), "scale": 1.0},
        "apollo_scale": {"subspace": lro.RandomGaussian()},
    },
    "Flora (Hao et al. 2024): kappa 1000, rank 256, momentum carried, no alpha": {
        "flora": {"rank": 256, "update_every": 1000, "scale": 1.0},
        "flora_project": {"update_every": 1000, "transfer": lro.RotateFirst()},
    },
    "GaLore+ (Liao et al. 2024): randomized subspace iteration": {
        name: {"subspace": lro.TopSingular("subspace_iteration")}
        for name in ("galore_plus_adamw", "galore_plus_project")
    },
    "AdaRankGrad (Refael et al. 2024): moments move with the basis, the long side": {
        name: {"transfer": lro.Rotate(), "side": "long"}
        for name in ("adarankgrad_adamw", "adarankgrad_adamw_8bit", "adaptive_rank")
    },
    "Q-GaLore (Zhang et al. 2024): a basis of 4 bits; Dettmers et al.: 8 of moments": {
        "q_galore_adamw_8bit": {"bits": 4},
        "q_galore_project": {"bits": 4},
        "quantize_state": {"bits": 8},
    },
}
EXCEPTIONS = {k: v for paper in PAPERS.values() for k, v in paper.items()}


def place(argument):
    return ORDER.index(argument if argument in ORDER else ...)


@pytest.mark.parametrize("name", FACTORIES)
def test_common_arguments_stand_in_one_order(name):
    for before, after in pairwise(PARAMETERS[name]):
        assert place(before) <= place(after), (before, after)


def by_position(name):
    keyword = inspect.Parameter.KEYWORD_ONLY
    return tuple(k for k, p in PARAMETERS[name].items() if p.kind is not keyword)


@pytest.mark.parametrize("name", FACTORIES)
def test_hyperparameters_are_given_by_name(name):
    heads = ["learning_rate", "rank", "max_rank"], ["inner"]
    head = heads["inner" in PARAMETERS[name]]
    usual = tuple(k for k in PARAMETERS[name] if k in head)
    assert by_position(name) == BY_POSITION.get(name, usual)


@pytest.mark.parametrize("name", ALIASES)
def test_a_third_argument_by_position_is_refused(name):
    rank = [2] if len(by_position(name)) == 2 else []
    rest = {"switch_step": 3} if "switch_step" in PARAMETERS[name] else {}
    FACTORIES[name](0.1, *rank, **rest)
    with pytest.raises(TypeError, match="positional argument"):
        FACTORIES[name](0.1, *rank, 200, **rest)


def test_the_second_argument_of_an_alias_is_the_rank():
    second = {by_position(name)[1:] for name in ALIASES}
    assert second == {("rank",), ("max_rank",), ()}
    assert by_position("golore_adamw") == ("learning_rate", "rank")


def defaults(name):
    return {
        k: p.default for k, p in PARAMETERS[name].items() if p.default is not p.empty
    }


@pytest.mark.parametrize("name", FACTORIES)
def test_shared_arguments_have_one_default(name):
    expected = dict(DEFAULTS)
    if name not in ALIASES:
        expected["scale"] = 1.0
    expected |= EXCEPTIONS.get(name, {})
    found = defaults(name)
    assert found == found | {k: v for k, v in expected.items() if k in found}
    assert EXCEPTIONS.get(name, {}).keys() <= found.keys()


def test_every_shared_argument_has_a_known_default():
    count = Counter(k for name in FACTORIES for k in defaults(name))
    shared = {argument for argument, times in count.items() if times > 1}
    bits = {"bits"}  # of a basis, or of moments: all that have it are exceptions
    assert shared == DEFAULTS.keys() | bits


def test_every_exception_is_one():
    for changes in EXCEPTIONS.values():
        assert all(DEFAULTS.get(k) != value for k, value in changes.items())


@pytest.mark.parametrize("name", FACTORIES)
def test_no_argument_may_be_anything(name):
    for argument, parameter in PARAMETERS[name].items():
        kinds = {parameter.annotation, *typing.get_args(parameter.annotation)}
        assert parameter.empty not in kinds, argument
        # Matrices are said by a tree of the user's, or a function to it.
        assert typing.Any not in kinds or argument == "matrices", argument


# What each argument is tried with beside what it usually is there.
ANOTHER = {
    "learning_rate": 0.5,
    "dense_learning_rate": 0.5,
    "dense_weight_decay": 0.3,
    "inner": optax.scale_by_adam(b1=0.5),
    "tx": lro.galore_project(optax.scale_by_adam(b1=0.5), rank=2, update_every=3),
    "dense": optax.trace(0.5),
    "rule": SignOfMomentum(0.5),
    "codecs": {"mu": lro.Cast("bfloat16")},
    "every": 3,
    "axis_name": "devices",
    "rank": 40,
    "max_rank": 40,
    "bits": 8,
    "b1": 0.7,
    "b2": 0.8,
    "eps": 1e-3,
    "rho": 0.5,
    "error_feedback": False,
    "min_rank": 2,
    "max_residual_energy": 0.5,
    "num_heads": 4,
    "density": 0.5,
    "warmup": 5,
    "residual_scale": 2.0,
    "per": "tensor",
    "reference": (0.7, 0.8),
    "compress": ("mu",),
    "fields": ("mu",),
    "momentum": 0.5,
    "decay_rate": 0.5,
    "clipping_threshold": 2.0,
    "limiter": 1.5,
    "block": 64,
    "oversample": 2,
    "power_iters": 1,
    "warm_start": False,
    "update_every": 7,
    "max_interval": 90,
    "min_interval": 9,
    "measure": "norm",
    "threshold": 0.7,
    "max_stretch": 4,
    "switch_step": 5,
    "leading": 2,
    "subspace": lro.TopSingular("svd"),
    "refresh": lro.Every(5),
    "transfer": lro.Reset(),
    "recovery": lro.FiraResidual(),
    "scale": 0.7,
    "weight_decay": 0.3,
    "mask": {"q_proj": False, "o_proj": True, "b": True},
    "side": "long",
    "matrices": {"q_proj": lro.MatrixAxes(rows=1, cols=0), "o_proj": None},
    "key": 1,
}

# Nothing in these is random; they have a key as all methods do.
NOT_RANDOM = {
    *("scale_by_adafactor", "scale_by_adam_mini", "adam_mini"),
    *("quantize_state", "adamw_8bit"),
}
# Arguments that may be for some matrices only, and one that has but one value so far.
BY_LEAF = {"mask", "matrices", "side"}
ONE_VALUE = {"quantize_state": {"bits"}}


def program(factory, arguments, leaves):
    """What an update computes, as text: nothing is compiled."""
    # So large that bases and moments are quantized.
    params = dict.fromkeys(leaves, jnp.zeros((256, 320))) | {"b": jnp.zeros(320)}
    tx = factory(**arguments)
    trace = jax.make_jaxpr(
        lambda p: tx.update(p, tx.init(p), p), axis_env=[("devices", 2)]
    )
    return re.sub("0x[0-9a-f]+", "", str(trace(params)))


def through_another(name):
    """Whether a whole optimizer hands all of the arguments on to this method."""
    own = PARAMETERS[name].keys() - {"inner"}
    return any(
        name in inspect.getsource(FACTORIES[alias]) and own <= PARAMETERS[alias].keys()
        for alias in ALIASES
        if alias != name
    )


# Those of other methods are tried in the optimizers that are made of them.
OUTERMOST = [name for name in FACTORIES if not through_another(name)]


@pytest.mark.parametrize("name", OUTERMOST)
def test_every_argument_reaches_the_update(name):
    factory, parameters = FACTORIES[name], PARAMETERS[name]
    usual = next(m.kwargs for m in METHODS if m.name == name)
    larger = {"rank": 32, "max_rank": 32, "weight_decay": 0.1}
    larger["inner"] = optax.scale_by_adam()
    usual = usual | {k: v for k, v in larger.items() if k in parameters}

    @functools.cache
    def of_usual(leaves):
        text = program(factory, usual, leaves)
        assert text == program(factory, usual, leaves)  # else nothing is told by it
        return text

    for argument in parameters.keys() - ONE_VALUE.get(name, set()):
        other = ANOTHER[argument]
        if usual.get(argument, parameters[argument].default) == other:
            other = DEFAULTS[argument]
        leaves = ("q_proj", "o_proj") if argument in BY_LEAF else ("q_proj",)
        changed = program(factory, usual | {argument: other}, leaves)
        unchanged = argument == "key" and name in NOT_RANDOM
        assert (changed == of_usual(leaves)) == unchanged, argument
