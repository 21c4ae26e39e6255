"""The public names: what they are, that they are documented, and their signatures."""

import ast
import dataclasses
import doctest
import inspect
import re
import types
from pathlib import Path

import pytest
from registry import METHODS

import lowrank_optax as lro
from lowrank_optax._src.parts import compatible

MODULES = {
    name: getattr(lro, name)
    for name in lro.__all__
    if inspect.ismodule(getattr(lro, name))
}
PUBLIC = {
    f"{prefix}{name}": getattr(module, name)
    for prefix, module in {"": lro, **{f"{k}.": m for k, m in MODULES.items()}}.items()
    for name in module.__all__
    if not inspect.ismodule(getattr(module, name))
}
FUNCTIONS = {k: x for k, x in PUBLIC.items() if inspect.isfunction(x)}
# A protocol says what others must do, and a state what others made: neither is called.
PROTOCOLS = {k: x for k, x in PUBLIC.items() if getattr(x, "_is_protocol", False)}
STATES = {k: x for k, x in PUBLIC.items() if hasattr(x, "_fields")}
CLASSES = {
    k: x
    for k, x in PUBLIC.items()
    if inspect.isclass(x) and k not in PROTOCOLS and k not in STATES
}
PROPERTIES = {k: x for k, x in PUBLIC.items() if isinstance(x, str)}


def test_all_is_complete_and_sorted():
    for module in (lro, *MODULES.values()):
        tree = ast.parse(Path(module.__file__).read_text())
        imported = [
            alias.asname
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        ]
        # `X as X` is how a name is re-exported on purpose.
        constants_first = sorted(imported, key=lambda name: (not name.isupper(), name))
        assert module.__all__ == constants_first


def test_every_public_name_is_of_a_kind():
    assert not FUNCTIONS.keys() & CLASSES.keys()
    kinds = FUNCTIONS, PROTOCOLS, STATES, CLASSES, PROPERTIES
    assert len(PUBLIC) == sum(map(len, kinds))
    assert isinstance(lro.__version__, str)


def documented_arguments(doc):
    _, _, arguments = doc.partition("Args:\n")
    return {
        name.strip()
        for line in arguments.splitlines()
        if line.startswith("  ") and ":" in line
        for name in line.partition(":")[0].split(",")
    }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_documented(name):
    doc = inspect.getdoc(FUNCTIONS[name])
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    missing = set(parameters) - documented_arguments(doc)
    assert not missing, (
        f"Say what {missing} are in the docstring of {name}, in `Args:`."
    )
    # A whole optimizer returns what every optimizer of Optax is.
    assert "Returns:" in doc or "learning_rate" in parameters


@pytest.mark.parametrize("name", CLASSES)
def test_parts_are_documented(name):
    doc = inspect.getdoc(CLASSES[name])
    fields = {field.name for field in dataclasses.fields(CLASSES[name])}
    assert fields <= documented_arguments(doc.replace("Attributes:", "Args:"))


def test_every_name_is_shown_in_use():
    documented = [
        lro,
        *MODULES.values(),
        *(PUBLIC[k] for k in PUBLIC.keys() - PROPERTIES),
    ]
    parser = doctest.DocTestParser()
    code = "".join(
        example.source
        for x in documented
        for example in parser.get_examples(inspect.getdoc(x))
    )
    # Views and states are made by the library.
    used = FUNCTIONS.keys() | CLASSES.keys() - {"MatrixView"}
    missing = [k for k in used if not re.search(rf"\b{k.split('.')[-1]}\(", code)]
    assert not missing, f"Show {missing} in an example of a docstring."


def test_all_properties_of_parts_are_public():
    found = {k: x for k, x in vars(compatible).items() if k.isupper()}
    assert found == {k.removeprefix("laws."): x for k, x in PROPERTIES.items()}


@pytest.mark.parametrize("name", STATES)
def test_fields_of_states_are_documented(name):
    doc = inspect.getdoc(STATES[name])
    assert "Attributes:" in doc
    for field in STATES[name]._fields:
        assert f"\n  {field}:" in doc


@pytest.mark.parametrize("name", PROTOCOLS)
def test_methods_of_protocols_are_documented(name):
    assert inspect.getdoc(PROTOCOLS[name])
    methods = [x for x in vars(PROTOCOLS[name]).values() if inspect.isfunction(x)]
    documented = [m for m in methods if not m.__name__.startswith("_")]
    assert documented
    assert all(inspect.getdoc(method) for method in documented)


def test_parts_are_frozen_and_not_callable():
    for cls in CLASSES.values():
        assert cls.__dataclass_params__.frozen
        # A callable would be taken for a schedule by `inject_hyperparams`.
        assert not callable(object.__new__(cls))


def is_factory(x):
    signature = inspect.signature(x)
    annotation = str(signature.return_annotation)
    made = "GradientTransformation" in annotation and "Callable" not in annotation
    return made and "opt_state" not in signature.parameters  # else it fits one to that


def test_every_transformation_is_in_the_registry():
    factories = {k for k, x in FUNCTIONS.items() if is_factory(x)}
    assert len(factories) >= 10
    missing = factories - {method.factory.__name__ for method in METHODS}
    assert not missing, f"Add {', '.join(sorted(missing))} to tests/registry.py."
    for method in METHODS:
        assert method.public in (method.factory, lro.two_rates)
    assert len({method.name for method in METHODS}) == len(METHODS)


# What makes a step of an optimizer, but is none: each is tried with the registry there.
WRAPPERS = {
    "inject_hyperparams": "test_inject.py",
    "layerwise.value_and_update": "test_layerwise.py",
    "two_rates": "test_two_rates.py",
}


def test_every_wrapper_is_tried_with_the_registry():
    wrappers = {
        name
        for name, x in FUNCTIONS.items()
        if "Callable" in str(inspect.signature(x).return_annotation)
        and "GradientTransformation" in str(inspect.signature(x))
    }
    missing = wrappers - WRAPPERS.keys()
    assert not missing, f"Try {missing} with the registry, and add it to WRAPPERS."
    for name, file in WRAPPERS.items():
        text = Path(__file__).with_name(file).read_text()
        assert name in wrappers and f"lro.{name}(" in text
        assert "from registry import METHODS" in text


def kinds(function):
    return {p.kind for p in inspect.signature(function).parameters.values()}


def test_signatures_are_explicit():
    star = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    # `inject_hyperparams` reads the arguments' names, so there must be some.
    assert not [name for name, f in FUNCTIONS.items() if kinds(f) & star]
    assert kinds(lambda *args, **kwargs: None) == star


def without_annotations(function):
    signature = inspect.signature(function)
    parameters = [
        p.replace(annotation=inspect.Parameter.empty)
        for p in signature.parameters.values()
    ]
    plain = signature.replace(
        parameters=parameters, return_annotation=inspect.Signature.empty
    )
    return re.sub(r"<function (\w+) at \w+>", r"\1", str(plain))


TOP = "TopSingular(method='rsvd')"
SUBSPACE_ITERATION = "TopSingular(method='subspace_iteration')"
ROTATE = "Rotate(coverage=0.1, first=(), second=())"
COMMON = "side='short', matrices=None, key=0"
LONG = "side='long', matrices=None, key=0"
SKETCH = "oversample=4, power_iters=0, warm_start=True"
BOTH = "compress=('mu', 'nu')"
DECAY = "weight_decay=0.0, mask=None"
ADAM = "b1=0.9, b2=0.999, eps=1e-08"
GALORE = f"update_every=200, subspace={TOP}, transfer=Keep()"
END = f"scale=1.0, {COMMON}"
ALIAS_END = f"scale=0.25, {DECAY}, {COMMON}"
UNSCALED_END = f"scale=1.0, {DECAY}, {COMMON}"
LOW_RANK = "learning_rate, rank=128"
MLORC_ADAM = f"b1=0.8, b2=0.999, eps=1e-08, {SKETCH}, {BOTH}"
LDADAM = "b1=0.908, b2=0.99, eps=1e-08, rho=0.908, error_feedback=True"
ENERGY = "min_rank=1, max_residual_energy=0.1"
INTERVALS = (
    f"max_interval=200, min_interval=20, measure='share', transfer={ROTATE}, "
    "recovery=Drop()"
)
ADARANKGRAD_END = f"{INTERVALS}, scale=0.25, {DECAY}, {LONG}"
GALORE_PLUS = (
    f"{ADAM}, num_heads=None, density=0.012, warmup=None, residual_scale=None, "
    f"update_every=200, subspace={SUBSPACE_ITERATION}, transfer=Keep()"
)
LAZY = (
    f"update_every=200, threshold=0.4, max_stretch=16, subspace={TOP}, transfer=Keep()"
)
APOLLO = "per='channel', limiter=1.01, update_every=200, subspace=RandomGaussian()"
FIRA = f"limiter=1.01, reference=None, {GALORE}"
# Users, benchmarks and acceptance checks call these: nothing here may change, and a
# new argument may only come with a default.
FROZEN = {
    "project_gradients": (
        f"(inner, *, rank, subspace={TOP}, refresh=Every(update_every=200), "
        f"transfer=Keep(), recovery=Drop(), {END})"
    ),
    "compress_state": "(inner, codecs, *, matrices=None, key=0)",
    "leafwise": f"(rule, *, dense, {COMMON})",
    "galore_project": f"(inner, *, rank, {GALORE}, {END})",
    "mlorc_scale_by_adam": f"(rank=4, *, {MLORC_ADAM}, matrices=None, key=0)",
    "mlorc_scale_by_lion": (
        f"(rank=4, *, b1=0.9, b2=0.99, {SKETCH}, matrices=None, key=0)"
    ),
    "mlorc_compress": (
        f"(inner, *, rank=4, fields=None, {SKETCH}, matrices=None, key=0)"
    ),
    "inject_hyperparams": "(factory, static_args=())",
    "two_rates": "(factory)",
    "mlorc_adamw": (
        f"(learning_rate, rank=4, *, {MLORC_ADAM}, {DECAY}, matrices=None, key=0)"
    ),
    "mlorc_lion": (
        f"(learning_rate, rank=4, *, b1=0.9, b2=0.99, {SKETCH}, {DECAY}, "
        "matrices=None, key=0)"
    ),
    "galore_adamw": f"({LOW_RANK}, *, {ADAM}, {GALORE}, {ALIAS_END})",
    "galore_adafactor": (
        f"({LOW_RANK}, *, decay_rate=0.8, clipping_threshold=1.0, momentum=None, "
        f"{GALORE}, {ALIAS_END})"
    ),
    "i3s_subspace": (
        f"(inner, *, rank, update_every=200, transfer=Keep(), recovery=Drop(), {END})"
    ),
    "i3s_adamw": (
        f"({LOW_RANK}, *, {ADAM}, update_every=200, transfer=Keep(), "
        f"recovery=Drop(), {ALIAS_END})"
    ),
    "hybrid_subspace": (
        f"(inner, *, rank, leading, update_every=200, transfer={ROTATE}, {END})"
    ),
    "golore_project": (
        f"(inner, *, rank, switch_step, update_every=200, subspace={TOP}, "
        f"transfer={ROTATE}, {END})"
    ),
    "golore_adamw": (
        f"({LOW_RANK}, *, {ADAM}, switch_step, update_every=200, subspace={TOP}, "
        f"transfer={ROTATE}, {UNSCALED_END})"
    ),
    "fira_project": f"(inner, *, rank, {FIRA}, {END})",
    "fira_adamw": f"({LOW_RANK}, *, {ADAM}, {FIRA}, {ALIAS_END})",
    "galore_plus_project": f"(inner, *, rank, {GALORE_PLUS}, {END})",
    "galore_plus_adamw": f"({LOW_RANK}, *, {GALORE_PLUS}, {ALIAS_END})",
    "adaptive_rank": f"(inner, *, max_rank, {ENERGY}, {INTERVALS}, scale=1.0, {LONG})",
    "adarankgrad_adamw": (
        f"(learning_rate, max_rank=128, *, {ADAM}, {ENERGY}, {ADARANKGRAD_END})"
    ),
    "adarankgrad_adamw_8bit": (
        f"(learning_rate, max_rank=128, *, {ADAM}, {ENERGY}, block=256, "
        f"{ADARANKGRAD_END})"
    ),
    "q_galore_project": f"(inner, *, rank, bits=4, {LAZY}, {END})",
    "q_galore_adamw_8bit": (
        f"({LOW_RANK}, *, {ADAM}, bits=4, block=256, {LAZY}, {ALIAS_END})"
    ),
    "flora_project": (
        f"(inner, *, rank, update_every=1000, transfer=RotateFirst(), {END})"
    ),
    "flora": (
        "(learning_rate, rank=256, *, b1=0.9, decay_rate=0.8, clipping_threshold=1.0, "
        f"update_every=1000, {UNSCALED_END})"
    ),
    "apollo_scale": f"(inner, *, rank, {APOLLO}, {END})",
    "apollo_adamw": f"(learning_rate, rank=256, *, {ADAM}, {APOLLO}, {UNSCALED_END})",
    "scale_by_ldadam": f"(rank=16, *, {LDADAM}, matrices=None, key=0)",
    "ldadamw": (
        f"(learning_rate, rank=16, *, {LDADAM}, {DECAY}, matrices=None, key=0)"
    ),
    "scale_by_adafactor": (
        "(*, decay_rate=0.8, clipping_threshold=1.0, matrices=None, key=0)"
    ),
    "scale_by_adam_mini": f"(*, {ADAM}, matrices=None, key=0)",
    "galore_adam_mini": f"({LOW_RANK}, *, {ADAM}, {GALORE}, {ALIAS_END})",
    "quantize_state": "(inner, *, bits=8, block=256, fields=None, key=0)",
    "adamw_8bit": f"(learning_rate, *, {ADAM}, block=256, {DECAY}, key=0)",
    "galore_adamw_8bit": f"({LOW_RANK}, *, {ADAM}, block=256, {GALORE}, {ALIAS_END})",
    "rank.fit": "(tx, opt_state)",
    "rank.shrink": "(tx, opt_state, params, multiple_of=8)",
    "diagnostics.singular_value_ratio": "(x, k=8)",
    "diagnostics.effective_rank": "(x, *, energy=None)",
    "diagnostics.stable_rank": "(x)",
    "diagnostics.subspace_overlap": "(u, v)",
    "diagnostics.captured_energy": "(x, basis)",
    "diagnostics.state_metrics": (
        "(opt_state, *, tx=None, grads=None, earlier=None, moments=False)"
    ),
    "adapters.extract_lora": "(finetuned, base, *, rank=None, energy=0.9)",
    "adapters.save_peft": (
        "(adapters, directory, *, base_model_name, key_map=module_name, task_type=None)"
    ),
    "linalg.orthonormalize": "(a)",
    "linalg.range_finder": "(key, a, size, power_iters=0, start=None)",
    "linalg.randomized_svd": "(key, a, rank, oversample=8, power_iters=1)",
    "linalg.subspace_iteration": ("(key, a, rank, iters=2, oversample=8, start=None)"),
    "default_matrices": "(params)",
    "describe": "(tx, params)",
    "state_bytes": "(tx, params)",
    "memory_report": "(tx, params, mesh=None)",
    "state_shardings": "(tx, params, mesh)",
}


def test_frozen_signatures():
    assert {k: without_annotations(FUNCTIONS[k]) for k in FROZEN} == FROZEN


def test_the_package_is_typed_and_private_below():
    assert (Path(lro.__file__).parent / "py.typed").exists()
    public = {name for name in vars(lro) if not name.startswith("_")}
    assert public == set(lro.__all__)
    assert isinstance(lro._src, types.ModuleType)
