"""A run in several processes: all take the same steps, and the first one writes."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from examples.common.errors import one_line

T = TypeVar("T")


class Elsewhere(OSError):
    """Another process cannot go on, and this one not without it."""


@dataclass(frozen=True)
class Devices:
    """The settings that say on what a job runs."""

    mesh: str | None = None
    """Devices to train on, such as data=2,fsdp=4,model=2, whose product is their
    number: data splits the batch, fsdp batch and weights, model the matrices (tensor
    parallel). Default: one device."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes. Each is started with the same
    flags, --out and --mesh among them, but for --process-id. Ranks are then not
    searched for to be shrunk."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this one is, from 0, which writes and prints."""


def connect(settings: Devices, out: Path | None) -> None:
    """Joins the other processes; before anything else is asked of JAX.

    Raises:
      ValueError: flags that do not say how.
      OSError: the others are not there.
    """
    s = settings
    address, count, number = s.coordinator, s.num_processes, s.process_id
    if address is None and count is None and number is None:
        return
    if address is None or count is None or number is None:
        raise ValueError(
            "Several processes need --coordinator, --num-processes and --process-id:"
            " give all of them, or none."
        )
    if not 0 <= number < count:
        raise ValueError(
            f"Cannot be process {number} of {count}: --process-id is from 0 to"
            " --num-processes - 1."
        )
    if s.mesh is None or out is None:
        raise ValueError(
            "Several processes need --mesh, over the devices of all of them, and --out,"
            " a directory that all of them see."
        )
    try:
        jax.distributed.initialize(address, count, number)
    except (RuntimeError, ValueError) as error:
        raise OSError(
            f"Cannot join the processes of {address}: {one_line(error)}"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def together(call: Callable[[], T]) -> T:
    """What a call returns in this process, once it has succeeded in all.

    Raises:
      ValueError, OSError, MemoryError: the call's own.
      Elsewhere: that of another process.
    """
    failed, result = None, None
    try:
        result = call()
    except (ValueError, OSError, MemoryError) as error:
        failed = error
    said = _told("" if failed is None else one_line(failed))
    if failed is not None:
        raise failed
    for number, message in enumerate(said):
        if message:
            raise Elsewhere(f"process {number}: {message}")
    return result  # pyrefly: ignore[bad-return]


def by_first(call: Callable[[], T]) -> T | None:
    """What a call returns that only the first process makes; None in the others.

    Raises:
      ValueError, OSError: in every process, what it raises in the first.
    """
    return together(lambda: call() if is_first() else None)


def of_first(call: Callable[[], T]) -> T:
    """The same, told to the others: something that JSON can hold."""
    made = by_first(call)
    if jax.process_count() == 1:
        return made  # pyrefly: ignore[bad-return]
    return json.loads(_told(json.dumps(made))[0])


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def whole(tree: Any) -> Any:
    """Arrays that lie on many devices, on the host of every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(
        lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree
    )


def _told(text: str) -> list[str]:
    """What each process says, in order."""
    if jax.process_count() == 1:
        return [text]
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.array(content.size)))
    padded = np.pad(content, (0, int(sizes.max()) - content.size))
    found = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(found, sizes, strict=True)]
