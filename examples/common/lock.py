"""One process at a time in the directory of a run."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"


@contextmanager
def sole_use(out: Path, resumed: bool) -> Iterator[None]:
    """Makes the directory and holds it; the system lets go when the process ends.

    Args:
      out: the directory.
      resumed: whether it holds the run already; else it must be empty.

    Raises:
      ValueError: another process works in it, or it is no longer empty.
      OSError: it cannot be made.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"Cannot work in {out}: another process does. Wait for it, or choose"
            " another --out."
        ) from error
    try:
        # Another process may have begun there since this one looked.
        if not resumed and not is_free(out):
            raise ValueError(
                f"Cannot start a run in {out}: it is not empty. Continue that run with"
                " --resume, or choose another --out."
            )
        yield
    finally:
        lock.release()


def is_free(out: Path) -> bool:
    """Whether a run may start in the directory: it holds nothing, or is not there."""
    if not out.exists():
        return True
    return out.is_dir() and all(path.name == LOCK for path in out.iterdir())


def clear(out: Path) -> None:
    """Takes all but the lock out of a directory that was free before."""
    for path in out.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            path.unlink(missing_ok=True)
