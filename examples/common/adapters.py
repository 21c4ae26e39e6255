"""Linear maps trained through two thin factors: LoRA, DoRA, plain factorization.

`adapt` puts one of the modules below in the place of every `nnx.Linear`, `merge` puts
linear maps of the resulting weights back. Kernels are (in, out), with the layers in
front where these are stacked: the modules serve scanned models as they are.

The kernel that LoRA and DoRA start from is kept under the name `frozen` and never
trained. Biases, and all that is no linear map, are trained in full: in pre-training the
papers do so too, and so do the low-rank optimizers that these modes are compared with.
Fine-tuning by LoRA freezes them: `freeze` takes another rule, such as `all_but`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

# GaLore's setting of LoRA and ReLoRA in pre-training; an adapter is scaled by
# ALPHA / rank.
ALPHA = 32.0


class LowRankLinear(nnx.Module):
    """What the modules share: a map without its kernel, and the factors `A` and `B`.

    Args:
      linear: the map whose place is taken; its kernel is removed from it.
      a: (*stack, in, r).
      b: (*stack, r, out).
    """

    def __init__(self, linear: nnx.Linear, a: jax.Array, b: jax.Array):
        self.lora = nnx.LoRA(
            a.shape[-2],
            a.shape[-1],
            b.shape[-1],
            dtype=linear.dtype,
            param_dtype=linear.param_dtype,
            # Given instead of drawn: nnx.LoRA knows of no stacks.
            a_initializer=lambda key, shape, dtype: a.astype(dtype),
            b_initializer=lambda key, shape, dtype: b.astype(dtype),
            rngs=nnx.Rngs(0),
        )
        del linear.kernel
        self.linear = linear

    def weight(self) -> jax.Array:
        """The kernel (*stack, in, out) that this map stands for."""
        return self.lora.lora_a[...] @ self.lora.lora_b[...]

    def product(self, x: jax.Array) -> jax.Array:
        """`x @ weight()`, without forming it."""
        return self.lora(x)

    def __call__(self, x: jax.Array) -> jax.Array:
        y, bias = self.product(x), self.linear.bias
        return y if bias is None else y + bias[...].astype(y.dtype)

    def merged(self) -> nnx.Linear:
        """The linear map of this weight; this module is used up."""
        self.linear.kernel = nnx.Param(self.weight())
        return self.linear


class FactorizedLinear(LowRankLinear):
    """`x A B`, and nothing else.

    The factors start as the best approximation of the kernel at their rank, each with
    the roots of the singular values: spectral initialization, without which deep
    factorized models learn slowly.

    Args:
      linear: the map whose place is taken, its kernel (*stack, in, out).
      rank: of the factors; min(in, out) at most is used.
      rngs: not used, nothing here is random.
    """

    def __init__(self, linear: nnx.Linear, rank: int, *, rngs: nnx.Rngs):
        del rngs
        kernel = linear.kernel[...].astype(jnp.float32)
        u, s, vt = jnp.linalg.svd(kernel, full_matrices=False)
        root = jnp.sqrt(s[..., :rank])
        a = u[..., :, :rank] * root[..., None, :]
        super().__init__(linear, a, root[..., :, None] * vt[..., :rank, :])


class LoRALinear(LowRankLinear):
    """`x W0 + s x A B` with `s = alpha / r` and `W0` frozen (Hu et al. 2021).

    `B` starts at zero, `A` as in Hugging Face's PEFT: the map starts as it was.

    Args:
      linear: the map whose place is taken, its kernel (*stack, in, out).
      rank: of the factors; min(in, out) at most is used.
      rngs: where `A` is drawn from.
      alpha: sets the scale of what is added.
    """

    def __init__(
        self, linear: nnx.Linear, rank: int, *, rngs: nnx.Rngs, alpha: float = ALPHA
    ):
        kernel = linear.kernel[...]
        *stack, size_in, size_out = kernel.shape
        rank = min(rank, size_in, size_out)
        a = draw_a(rngs.params(), (*stack, size_in, rank), linear.param_dtype)
        super().__init__(linear, a, jnp.zeros((*stack, rank, size_out)))
        self.frozen = nnx.Param(kernel)
        self.alpha = alpha

    def weight(self) -> jax.Array:
        a, b = self.lora.lora_a[...], self.lora.lora_b[...]
        return merged_kernel(self.frozen[...], a, b, self.alpha)

    def product(self, x: jax.Array) -> jax.Array:
        kernel = jax.lax.stop_gradient(self.frozen[...])
        x, kernel = self.linear.promote_dtype((x, kernel), dtype=self.linear.dtype)
        return x @ kernel + scale(self.lora.lora_a[...], self.alpha) * self.lora(x)


class DoRALinear(LoRALinear):
    """LoRA of the direction, and a magnitude of its own (Liu et al. 2024).

    The weight is `m (W0 + s A B) / |W0 + s A B|`, with a norm and a magnitude for every
    output: those of the columns here, of the rows of PEFT's (out, in). The magnitude
    starts as the norm of `W0`. The norm counts as constant in the gradient, as the
    paper has it (Section 4.3) to save memory.

    Args:
      linear: the map whose place is taken, its kernel (*stack, in, out).
      rank: of the factors; min(in, out) at most is used.
      rngs: where `A` is drawn from.
      alpha: sets the scale of what is added.
    """

    def __init__(
        self, linear: nnx.Linear, rank: int, *, rngs: nnx.Rngs, alpha: float = ALPHA
    ):
        super().__init__(linear, rank, rngs=rngs, alpha=alpha)
        # (*stack, 1, out).
        self.magnitude = nnx.Param(_column_norm(self.frozen[...]))

    def weight(self) -> jax.Array:
        return super().weight() * self._gain()

    def product(self, x: jax.Array) -> jax.Array:
        y = super().product(x)
        return y * self._gain().astype(y.dtype)

    def _gain(self) -> jax.Array:
        norm = _column_norm(super().weight())
        return self.magnitude[...] / jax.lax.stop_gradient(norm)


def adapt(
    module: nnx.Module,
    kind: Callable[..., LowRankLinear],
    rank: int,
    *,
    rngs: nnx.Rngs,
) -> None:
    """Replaces every `nnx.Linear` in a module, in place.

    Args:
      module: what to adapt, such as the layers of a model; stacked or not.
      kind: `LoRALinear`, `DoRALinear` or `FactorizedLinear`.
      rank: of the factors.
      rngs: where their initial values are drawn from.

    Raises:
      ValueError: the rank is below 1, or there is no `nnx.Linear`.
    """
    if rank < 1:
        raise ValueError(f"Cannot adapt at rank {rank}: it must be at least 1.")
    found = list(_children(module, nnx.Linear))
    if not found:
        raise ValueError(f"Cannot adapt {type(module).__name__}: it has no nnx.Linear.")
    for parent, name, linear in found:
        setattr(parent, name, kind(linear, rank, rngs=rngs))


def merge(module: nnx.Module) -> None:
    """Undoes `adapt`, in place, but for the weights: these are what was trained."""
    for parent, name, adapted in list(_children(module, LowRankLinear)):
        setattr(parent, name, adapted.merged())


def is_frozen(params: Any) -> Any:
    """A tree like the parameters: whether a leaf is a frozen kernel."""
    return _under(params, "frozen")


def is_adapter(params: Any) -> Any:
    """A tree like the parameters: whether a leaf is a factor `A` or `B`."""
    return _under(params, "lora")


def all_but(*names: str) -> Callable[[Any], Any]:
    """What LoRA freezes in fine-tuning: all but its own and the named modules.

    Its own are the factors and DoRA's magnitudes; the named ones are the heads that a
    task brings with it. The result is a rule as `is_frozen` is.
    """

    def rule(params: Any) -> Any:
        return jax.tree.map(
            lambda trained: not trained, _under(params, "lora", "magnitude", *names)
        )

    return rule


def held(params: Any, frozen: Callable[[Any], Any]) -> Any:
    """The parameters without a gradient of what is frozen, to take a loss of."""
    return jax.tree.map(
        lambda x, is_still: jax.lax.stop_gradient(x) if is_still else x,
        params,
        frozen(params),
    )


def trained_parameters(params: Any, frozen: Callable[[Any], Any] = is_frozen) -> int:
    """How many numbers are not frozen, of parameters or their shapes."""
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(frozen(params)), strict=True)
    return sum(x.size for x, is_still in leaves if not is_still)


def freeze(
    tx: optax.GradientTransformation, frozen: Callable[[Any], Any] = is_frozen
) -> optax.GradientTransformation:
    """The optimizer without state for what is frozen, which it leaves as it is."""

    def label(params: Any) -> Any:
        return jax.tree.map(lambda x: "frozen" if x else "trained", frozen(params))

    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, label)


def draw_a(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """A new `A` (*stack, in, r): uniform up to 1 / sqrt(in)."""
    stack = tuple(range(len(shape) - 2))
    init = nnx.initializers.variance_scaling(
        1 / 3, "fan_in", "uniform", batch_axis=stack
    )
    return init(key, shape, dtype)


def scale(a: jax.Array, alpha: float = ALPHA) -> float:
    """The factor `s` of an adapter, of its `A`."""
    return alpha / a.shape[-1]


def merged_kernel(
    kernel: jax.Array, a: jax.Array, b: jax.Array, alpha: float = ALPHA
) -> jax.Array:
    """`W0 + s A B`, summed in float32, in the dtype of `W0`."""
    product = jnp.matmul(a, b, preferred_element_type=jnp.float32)
    return (kernel + scale(a, alpha) * product).astype(kernel.dtype)


def _under(params: Any, *names: str) -> Any:
    # Not only the last key: a leaf may stand in a box of its own.
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(getattr(part, "key", None) in names for part in path),
        params,
    )


def _column_norm(kernel: jax.Array) -> jax.Array:
    return jnp.linalg.norm(kernel, axis=-2, keepdims=True)


def _children(
    module: nnx.Module, kind: type[nnx.Module]
) -> Iterator[tuple[nnx.Module, str, Any]]:
    for _, parent in nnx.iter_modules(module):
        for name, child in vars(parent).items():
            if isinstance(child, kind):
                yield parent, name, child
