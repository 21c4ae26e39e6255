"""What commands share: errors as one line, one process at a time, stop and resume."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax

from examples.common.errors import BadFile, one_line
from examples.common.interrupt import Interrupted, StopRequest
from examples.common.lock import clear, sole_use
from examples.common.processes import by_first, is_first, together
from examples.common.settings import device_flags

REFUSED = 2
STOPPED = 130


class Job(Protocol):
    """What a command needs to know of what it runs."""

    @property
    def out(self) -> Path:
        """The directory of the run."""

    @property
    def settings(self) -> Any:
        """Settings with a field `resume`."""


J = TypeVar("J", bound=Job)


def command(
    module: str,
    prepare: Callable[[], J],
    begin: Callable[[J], None],
    work: Callable[[J, StopRequest], tuple[str, Sequence[Path]] | None],
) -> int:
    """Runs a job; returns the exit status: 0, 2 for bad input, 130 if stopped.

    Args:
      module: of the command, such as `examples.llama.pretrain`.
      prepare: makes the job; writes nothing.
      begin: puts it on record, unless it is resumed; of several processes the first.
      work: does it; what is printed in the end, and the files written. None in all but
        the first process.
    """
    began = time.perf_counter()
    name = module.rpartition(".")[2]
    with ExitStack() as stack:
        try:
            job = together(prepare)
            use = sole_use(job.out, job.settings.resume)
            by_first(lambda: stack.enter_context(use))
            by_first(lambda: _begin(job, begin))
        except (ValueError, OSError, MemoryError) as error:
            return refused(name, error)
        except KeyboardInterrupt:
            print(f"{name}: stopped before the first step", file=sys.stderr)
            return STOPPED
        stop = stack.enter_context(StopRequest())
        try:
            done = work(job, stop)
        except (BadFile, OSError) as error:
            return refused(name, error)
        except Interrupted as stopped:
            if is_first():
                print(f"{stopped}; {_go_on(module, job)}", file=sys.stderr)
            return STOPPED
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            print(
                f"{name}: process {jax.process_index()} has lost the others:"
                f" {one_line(error)}; {_go_on(module, job)}",
                file=sys.stderr,
                flush=True,
            )
            # At once: at its end JAX would wait for minutes for those that have gone.
            os._exit(STOPPED)
    if done is None:
        return 0
    shown, paths = done
    print(shown)
    print(f"{time.perf_counter() - began:.0f} seconds in all; written:")
    for path in paths:
        print(f"  {path}")
    return 0


def _begin(job: J, begin: Callable[[J], None]) -> None:
    """Begins; where that fails, a new run leaves its directory as free as before."""
    try:
        begin(job)
    except BaseException:
        if not job.settings.resume:
            clear(job.out)
        raise


def _go_on(module: str, job: Job) -> str:
    flags = f"--resume --out {job.out}{device_flags(job.settings)}"
    return f"go on with: python -m {module} {flags}"


def refused(name: str, error: BaseException) -> int:
    """Says in one line why a command cannot go on; returns the exit status."""
    if is_first():
        print(f"{name}:", one_line(error), file=sys.stderr)
    return REFUSED
