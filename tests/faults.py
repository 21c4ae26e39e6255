"""Faults of disks and of hands: what the tests of damaged files have in common."""

import hashlib
import resource
from contextlib import contextmanager


def flip(path, at=None):
    """Changes one bit of a file, in its middle unless told where."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def truncate(path):
    """Leaves the first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def empty(path):
    path.write_bytes(b"")


def zero(path):
    """What a file system may leave of a file after the power went: its size."""
    path.write_bytes(bytes(path.stat().st_size))


def remove(path):
    path.unlink()


DAMAGES = (flip, truncate, empty, zero, remove)


@contextmanager
def full_disk(limit):
    """No file can grow beyond so many bytes, whatever library writes it.

    A limit of the process stands in for a disk: a write stops short at it as it does
    where no room is left.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def largest(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()),
        key=lambda path: (path.stat().st_size, path),
    )


def contents(folder):
    """The hash of every file under its path, but for the lock's."""
    return {
        path.relative_to(folder).as_posix(): hashlib.md5(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
