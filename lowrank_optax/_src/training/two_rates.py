"""A learning rate of their own for the leaves that are no matrices."""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, Optional

import jax
import optax

from lowrank_optax._src.leaves.box import value_of
from lowrank_optax._src.leaves.context import left_out
from lowrank_optax._src.leaves.matrix import Matrices
from lowrank_optax._src.leaves.paths import flatten
from lowrank_optax._src.leaves.specs import choices
from lowrank_optax._src.leaves.transformation import transformation
from lowrank_optax._src.training.inject import signature_of

_DENSE = "dense_"


def two_rates(
    factory: Callable[..., optax.GradientTransformation],
) -> Callable[..., optax.GradientTransformation]:
    """An optimizer with one learning rate for matrices, and one for all other leaves.

    Embeddings, heads, biases and norms go through the same optimizer at full rank, but
    the rate that suits them is seldom that of a projected matrix. Inside, this is
    `optax.partition` of two instances of the factory, whose states are
    ``inner_states["matrices"]`` and ``inner_states["dense"]``: what looks for a field
    such as ``mu`` finds two.

    Which leaves are matrices is told as the methods tell it: by ``matrices=``, else by
    `default_matrices`. A matrix that stays at full rank, as the rank saves nothing
    there, keeps the rate of the matrices: which leaf has which rate depends neither on
    the rank nor on the method. `layerwise`, `rank.shrink`, `accumulate_gradients` and
    the reports take the result as they take the factory's own, and refuse what they
    refuse of that.

    Args:
      factory: of an optimizer that takes a ``learning_rate``, such as
        ``lro.galore_adamw``, ``optax.adamw`` or ``optax.lion``.

    Returns:
      A factory with the same arguments, and by name alone ``dense_learning_rate``,
      ``dense_weight_decay`` where the factory has a ``weight_decay``, both by default
      None for those of the matrices, and ``matrices``, which a factory such as
      ``optax.adamw`` does not have. Rates and decays may be schedules;
      ``lro.inject_hyperparams`` around it makes all of them state.

    Raises:
      TypeError: for a factory without the argument ``learning_rate``.

    >>> import jax.numpy as jnp, lowrank_optax as lro
    >>> tx = lro.two_rates(lro.galore_adamw)(4e-3, rank=1, dense_learning_rate=3e-2)
    >>> params = {"embed": jnp.ones((9, 4)), "w": jnp.ones((6, 8))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> updates["embed"][0, 0].round(3), updates["w"][0, 0].round(4)  # and scale 0.25
    (Array(-0.03, dtype=float32), Array(-0.0004, dtype=float32))
    """
    own = signature_of(factory)
    if "learning_rate" not in own.parameters:
        name = getattr(factory, "__name__", repr(factory))
        raise TypeError(
            f"Cannot give {name} two rates: it has no argument `learning_rate`. Give "
            "`two_rates` the factory of a whole optimizer, such as lro.galore_adamw."
        )
    extended = _with_dense(own)
    added = extended.parameters.keys() - own.parameters.keys()
    if any(x.kind is x.VAR_KEYWORD for x in own.parameters.values()):
        added -= {"matrices"}  # which a factory of any arguments is given

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        more = {name: kwargs.pop(name) for name in added & kwargs.keys()}
        given = own.bind(*args, **kwargs)
        given.apply_defaults()
        matrices = (given.arguments | given.kwargs | more).get("matrices")
        low_rank = factory(*given.args, **given.kwargs)
        for name, value in more.items():
            if name.startswith(_DENSE) and value is not None:
                given.arguments[name.removeprefix(_DENSE)] = value
        dense = factory(*given.args, **given.kwargs)
        return _partition(low_rank, dense, matrices)

    make.__signature__ = extended  # type: ignore[attr-defined]
    return make


def _partition(
    low_rank: optax.GradientTransformation,
    dense: optax.GradientTransformation,
    matrices: Matrices,
) -> optax.GradientTransformationExtraArgs:
    def labels(tree):
        known, (paths, _, treedef) = choices(matrices, tree), flatten(tree)
        return treedef.unflatten(
            "dense" if known[path].axes is None else "matrices" for path in paths
        )

    tx = optax.partition({"matrices": low_rank, "dense": dense}, labels)

    def init(params):
        with _beside_one_another(params):
            return tx.init(params)

    def update(updates, state, params=None, **extra):
        with _beside_one_another(updates):
            return tx.update(updates, state, params, **extra)

    return transformation(init, update)


def _beside_one_another(tree: Any) -> contextlib.AbstractContextManager[Any]:
    """Let each half of a tree know the leaves of the other."""
    paths, leaves, _ = flatten(tree)
    arrays = map(value_of, leaves)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    return left_out(dict(zip(paths, shapes, strict=True)))


def _with_dense(own: inspect.Signature) -> inspect.Signature:
    """The signature of a factory with the arguments that `two_rates` adds."""
    *parameters, last = own.parameters.values()
    star = [last] if last.kind is last.VAR_KEYWORD else []
    parameters += [] if star else [last]
    kind = inspect.Parameter.KEYWORD_ONLY
    if "matrices" not in own.parameters:
        parameters.append(
            inspect.Parameter("matrices", kind, default=None, annotation=Matrices)
        )
    for name in ("learning_rate", "weight_decay"):
        if name in own.parameters:
            annotation = own.parameters[name].annotation
            if annotation is not inspect.Parameter.empty:
                annotation = Optional[annotation]  # noqa: UP045
            parameters.append(
                inspect.Parameter(
                    _DENSE + name, kind, default=None, annotation=annotation
                )
            )
    return own.replace(parameters=parameters + star)
