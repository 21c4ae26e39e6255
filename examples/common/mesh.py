"""Where weights, state and batches lie on many devices.

A mesh has three axes: `data` splits the batch, `fsdp` the batch and the weights, and
`model` the matrices, so that each device has a part of every product (tensor parallel).
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lowrank_optax as lro

AXES = ("data", "fsdp", "model")

_BATCH = ("data", "fsdp")
# A matrix behind one whose outputs are split is split by its inputs: only its product
# has to be summed over the devices.
_IN_OUT, _OUT_IN = ("fsdp", "model"), ("model", "fsdp")
_SECOND = ("o_proj", "down_proj", "dense", "down")
_KERNELS = ("kernel", "frozen")  # the latter is what an adapter is added to


def mesh_sizes(text: str) -> dict[str, int]:
    """How many devices each axis has, of text such as `data=2,fsdp=4`.

    >>> mesh_sizes("data=2,fsdp=4")
    {'data': 2, 'fsdp': 4, 'model': 1}

    Raises:
      ValueError: it is no such text.
    """
    sizes = dict.fromkeys(AXES, 1)
    named = set()
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES:
            raise ValueError(
                f"Cannot use mesh {text!r}: it has no axis {axis!r}, choose from"
                f" {', '.join(AXES)}, as in data=2,fsdp=4."
            )
        if not (size.isascii() and size.isdigit() and int(size) > 0):
            raise ValueError(
                f"Cannot use mesh {text!r}: the size of {axis} must be a number of"
                f" devices, as in {axis}=2, not {size!r}."
            )
        if axis in named:
            raise ValueError(f"Cannot use mesh {text!r}: {axis} is in it twice.")
        named.add(axis)
        sizes[axis] = int(size)
    return sizes


def make_mesh(text: str) -> jax.sharding.Mesh:
    """The mesh of all devices that `mesh_sizes` describes.

    Raises:
      ValueError: there are more devices, or fewer.
    """
    sizes = mesh_sizes(text)
    needed, there = math.prod(sizes.values()), jax.device_count()
    if needed != there:
        raise ValueError(
            f"Cannot use mesh {text!r}: it is one of {needed} devices, and there"
            f" {'is' if there == 1 else 'are'} {there}. Change the sizes, their product"
            " must be the number of devices."
        )
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=kinds)


def machine(text: str | None) -> str:
    """What a job runs on, for its record; `text` is its `--mesh`."""
    facts = [f"{jax.devices()[0].device_kind}", f"{os.cpu_count()} CPU cores"]
    if text is not None:
        facts[0] = f"{jax.device_count()} x {facts[0]}"
        facts.append(f"mesh {text}")
    if jax.process_count() > 1:
        facts.append(f"{jax.process_count()} processes")
    return ", ".join(facts)


def spec_of(path: Any, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """How a parameter is split: kernels and embeddings, by their names; else not.

    Args:
      path: its key path.
      shape: (*stack, in, out) of a kernel; the layers of a stack stay together.
      mesh: one of `AXES`, concrete or abstract. An axis that does not divide its part
        of the shape does not split it.
    """
    *owners, name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    if name in _KERNELS:
        split = _OUT_IN if owners[-1] in _SECOND else _IN_OUT
    elif name == "embedding":
        split = _OUT_IN
    else:
        return PartitionSpec()
    fitting = [
        axis if size % mesh.shape[axis] == 0 else None
        for axis, size in zip(split, shape[-2:], strict=True)
    ]
    return PartitionSpec(*(None,) * (len(shape) - 2), *fitting)


@dataclass(frozen=True)
class Placement:
    """Where everything lies on a mesh, which may be abstract.

    Attributes:
      mesh: one of `AXES`.
    """

    mesh: Any

    @classmethod
    def of(cls, text: str | None) -> "Placement | None":
        """That of `--mesh`; None, for a single device, where there is none.

        Raises:
          ValueError: it does not describe the devices that are there.
        """
        return None if text is None else cls(make_mesh(text))

    def __str__(self) -> str:
        """As `--mesh` has it, of the axes that split anything."""
        sizes = self.mesh.shape.items()
        return ",".join(f"{axis}={n}" for axis, n in sizes if n > 1) or "one device"

    @property
    def replicated(self) -> NamedSharding:
        """Whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def rows(self) -> NamedSharding:
        """The rows of a batch over the devices."""
        return NamedSharding(self.mesh, PartitionSpec(_BATCH))

    def params(self, params: Any) -> Any:
        """The shardings of parameters, or of their shapes."""
        return jax.tree_util.tree_map_with_path(
            lambda path, x: NamedSharding(self.mesh, spec_of(path, x.shape, self.mesh)),
            params,
        )

    def state(self, tx: optax.GradientTransformation, params: Any) -> Any:
        """The shardings of the optimizer's state."""
        return lro.state_shardings(tx, self.shapes(params), self.mesh)

    def shapes(self, params: Any) -> Any:
        """The parameters without their values, where they lie."""
        return laid(params, self.params(params))

    @property
    def parts(self) -> int:
        """Over how many devices the rows of a batch are split."""
        return math.prod(self.mesh.shape[axis] for axis in _BATCH)

    def check_rows(self, rows: int) -> None:
        """Raises ValueError for a batch whose rows cannot be split evenly."""
        if rows % self.parts:
            sizes = ", ".join(f"{axis}={self.mesh.shape[axis]}" for axis in _BATCH)
            raise ValueError(
                f"Cannot split a batch of {rows} rows over {sizes}: {self.parts} does"
                " not divide it. Change --batch-size, or use more of model in --mesh."
            )

    def made(self, make: Callable[[], Any]) -> Any:
        """What a function makes, placed as parameters are.

        It is made by the processor: no device need have room for all of it.
        """
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            made = make()
        return jax.tree.map(_put, made, self.params(made))

    def copies(self, tree: Any) -> Any:
        """Arrays of the host, whole on every device."""
        return jax.tree.map(lambda x: _put(x, self.replicated), tree)

    def split(self, x: jax.Array, axis: int) -> jax.Array:
        """An array inside of a step, held to be split along the axis of its rows."""
        spec = PartitionSpec(*(None,) * axis, _BATCH)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def batch(self, batch: Any) -> Any:
        """A batch, its rows over the devices; each process puts its own."""
        return jax.tree.map(
            lambda x: _put(x, self.rows if np.ndim(x) else self.replicated), batch
        )


def laid(shapes: Any, shardings: Any) -> Any:
    """Arrays, or shapes, without their values and with these shardings."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes,
        shardings,
    )


def _put(x: Any, where: NamedSharding) -> jax.Array:
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, where, lambda part: x[part])
