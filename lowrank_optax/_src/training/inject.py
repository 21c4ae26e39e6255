"""Hyperparameters as state, with everything that decides shapes left static."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from types import NoneType, UnionType
from typing import Annotated, Any, ForwardRef, TypeVar, Union, get_args, get_origin

import jax
import jaxtyping
import numpy as np
import optax

from lowrank_optax._src.engines.project import project_gradients
from lowrank_optax._src.leaves.transformation import transformation
from lowrank_optax._src.methods.optimizer import STATIC

# Types that say too little: a number, a mask or a key may be any of these.
_OPEN = (Any, inspect.Parameter.empty, jax.Array, np.ndarray)
_UNRESOLVED = (str, ForwardRef, TypeVar)


def inject_hyperparams(
    factory: Callable[..., optax.GradientTransformation],
    static_args: str | Iterable[str] = (),
) -> Callable[..., optax.GradientTransformation]:
    """`optax.inject_hyperparams` that reads from the types what must stay static.

    An argument is static if its annotation leaves no place for a float: ranks and other
    ints, flags, names, parts (`TopSingular`, ...), masks, seeds and keys decide shapes
    or structure. All other numbers, such as ``learning_rate``, ``scale`` or
    ``update_every`` (`jax.typing.ArrayLike`), become part of the state and may be
    schedules. An argument without annotation is treated as that of `project_gradients`
    of the same name, any other as Optax treats it: by its value.

    Args:
      factory: such as ``lro.galore_adamw``.
      static_args: names of further arguments to keep out of the state.

    Returns:
      A factory with the same arguments, whose state has ``hyperparams``, a dictionary.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.inject_hyperparams(lro.galore_adamw)(learning_rate=1e-2, rank=2)
    >>> state = tx.init({"w": jnp.ones((4, 6))})
    >>> float(state.hyperparams["learning_rate"])
    0.009999999776482582
    """
    static = {static_args} if isinstance(static_args, str) else set(static_args)
    usual = signature_of(project_gradients).parameters
    for name, own in signature_of(factory).parameters.items():
        typed = usual.get(name, own) if own.annotation is own.empty else own
        if _is_part(own.default) or _is_static(typed.annotation):
            static.add(name)
    injected = optax.inject_hyperparams(factory, static_args=tuple(sorted(static)))

    @functools.wraps(factory)
    def make(*args, **kwargs):
        # On a mesh of explicit axes, hyperparameters must come in from outside too.
        tx = injected(*args, **kwargs)
        return transformation(tx.init, tx.update)

    return make


def signature_of(factory: Callable[..., Any]) -> inspect.Signature:
    """The arguments of a factory, their types evaluated if they can be."""
    try:
        return inspect.signature(factory, eval_str=True)
    except (AttributeError, NameError, SyntaxError, TypeError):
        return inspect.signature(factory)  # some name is only there for type checkers


def _is_static(annotation: Any) -> bool | None:
    """Whether a type leaves no place for a float; None where it does not say."""
    annotation = getattr(annotation, "__value__", annotation)  # of `type X = ...`
    if get_origin(annotation) is Annotated:
        kind, *notes = get_args(annotation)
        return STATIC in notes or _is_static(kind)
    if get_origin(annotation) in (Union, UnionType):
        kinds = (_is_static(x) for x in get_args(annotation) if x is not NoneType)
        said = [kind for kind in kinds if kind is not None]
        return all(said) if said else None
    if annotation in _OPEN or isinstance(annotation, _UNRESOLVED):
        return None
    try:
        if issubclass(annotation, jaxtyping.AbstractArray):
            return None
        return not issubclass(float, annotation)
    except TypeError:  # such as Literal["short"], Callable[..., int], tuple[str, ...]
        return True


def _is_part(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)
