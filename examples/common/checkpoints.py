"""Checkpoints with checksums: the newest whole one, and none that is damaged.

Orbax writes them. Beside its files stands a manifest of their hashes, and of the
metrics up to that step. A checkpoint that does not agree with it is set aside, and the
one before is used.
"""

import gc
import hashlib
import json
import logging
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from examples.common.errors import BadFile, one_line
from examples.common.files import file_sha256, read_object, write_json
from examples.common.processes import is_first, together

MANIFEST = "checksums.json"

_STEP = re.compile(r"0|[1-9]\d*")
_SET_ASIDE = re.compile(r"\.damaged-\d+$")


class Damaged(BadFile):
    """A checkpoint is not as it was written."""


class Unfinished(Damaged):
    """A checkpoint has no manifest: the process was killed before it was written."""


def seal(checkpoint: Path, metrics: Path | None = None) -> None:
    """Writes the manifest of a checkpoint, whose directory is named by its step."""
    manifest: dict[str, Any] = {"step": int(checkpoint.name)}
    manifest["files"] = {
        name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for name, path in _files(checkpoint).items()
    }
    if metrics is not None:
        content = metrics.read_bytes()
        manifest["metrics"] = {"bytes": len(content), "sha256": _hash(content)}
    manifest["sha256"] = _own_hash(manifest)
    write_json(checkpoint / MANIFEST, manifest)


def check(checkpoint: Path) -> None:
    """Compares a checkpoint with its manifest.

    Raises:
      Unfinished: there is none.
      Damaged: it does not agree, or is damaged itself.
    """
    manifest = _manifest(checkpoint)
    found, expected = _files(checkpoint), manifest["files"]
    if odd := sorted(found.keys() ^ expected.keys()):
        what = "has gone" if odd[0] in expected else "does not belong to it"
        raise Damaged(f"its file {odd[0]} {what}")
    for name, file in found.items():
        if file.stat().st_size != expected[name]["bytes"]:
            size, written = file.stat().st_size, expected[name]["bytes"]
            raise Damaged(f"its file {name} has {size:,} of {written:,} bytes")
        if file_sha256(file) != expected[name]["sha256"]:
            raise Damaged(f"its file {name} is not as it was written")


def _manifest(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise Unfinished(f"it has no {MANIFEST}")
    try:
        manifest = read_object(path)
    except (BadFile, OSError) as error:
        raise Damaged(one_line(error)) from error
    if manifest.get("sha256") != _own_hash(manifest):
        raise Damaged(f"its {MANIFEST} is damaged")
    if str(manifest["step"]) != checkpoint.name:
        raise Damaged(f"it is the checkpoint of step {manifest['step']}")
    return manifest


def newest(directory: Path, say: Callable[[str], None]) -> int | None:
    """The step of the newest whole checkpoint; damaged ones are set aside on the way.

    Args:
      directory: what holds them.
      say: told of each that is set aside.

    Returns:
      None where there is none that ever was whole: it starts from the beginning.

    Raises:
      Damaged: there are only damaged ones, or some under other names.
    """
    steps = []
    if directory.is_dir():
        steps = [int(p.name) for p in directory.iterdir() if _STEP.fullmatch(p.name)]
    bad: list[tuple[Path, Damaged]] = []
    start = None
    for step in sorted(steps, reverse=True):
        try:
            check(directory / str(step))
        except Damaged as error:
            bad.append((directory / str(step), error))
            continue
        start = step
        break
    if start is None:
        for path, error in bad:
            if not isinstance(error, Unfinished):
                raise Damaged(
                    f"Cannot go on from {path}: {error}, and there is no other that is"
                    f" whole. Restore it, or delete {directory} to start again."
                )
    for path in _renamed(directory):
        if start is None:
            raise Damaged(
                f"Cannot go on from {path}: a checkpoint is named by its step, and no"
                f" other is whole. Rename it, or delete {directory} to start again."
            )
        say(f"{path} is not used: a checkpoint is named by its step")
    going = "from the start" if start is None else f"from that of step {start}"
    for path, error in bad:
        kept = _set_aside(path)
        say(f"The checkpoint {path} is damaged: {error}. Going on {going}; see {kept}")
    return start


def _renamed(directory: Path) -> list[Path]:
    """Checkpoints under names that are neither a step nor given to damaged ones."""
    found = sorted(directory.glob(f"*/{MANIFEST}"))
    paths = [path.parent for path in found]
    return [
        path
        for path in paths
        if not _STEP.fullmatch(path.name) and not _SET_ASIDE.search(path.name)
    ]


def check_metrics(checkpoint: Path, metrics: Path) -> None:
    """Compares the metrics up to a step with what they were at its checkpoint.

    Raises:
      BadFile: lines are missing or changed.
    """
    expected = _manifest(checkpoint).get("metrics")
    if expected is None:
        return
    content = metrics.read_bytes() if metrics.is_file() else b""
    if _hash(content[: expected["bytes"]]) != expected["sha256"]:
        raise BadFile(
            f"{metrics} is not as it was written up to step {checkpoint.name}: lines"
            f" are missing or changed. Restore it, or delete {checkpoint.parent} to"
            " start again."
        )


def save(
    manager: ocp.CheckpointManager, step: int, state: Any, metrics: Path | None = None
) -> None:
    """Writes a checkpoint with its manifest, or nothing: each process its part.

    Raises:
      OSError: naming the checkpoint, such as on a full disk.
    """
    together(partial(_save, manager, step, state, metrics))


def _save(
    manager: ocp.CheckpointManager, step: int, state: Any, metrics: Path | None
) -> None:
    path, failed = Path(manager.directory) / str(step), None
    with _one_error():
        try:
            # Returns when all processes have written.
            manager.save(step, args=ocp.args.StandardSave(state))
            if is_first():
                seal(path, metrics)
        except (OSError, ValueError, RuntimeError) as error:
            failed = one_line(error)
        if failed is not None:
            # What failed beside it is told when it is collected: here, to nobody.
            gc.collect()
            for part in path.parent.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(part, ignore_errors=True)
            raise OSError(f"Cannot write the checkpoint {path}: {failed}")


@contextmanager
def _one_error() -> Iterator[None]:
    """Lets nothing but exceptions tell of an error.

    A write that fails does so in several threads of Orbax. It raises one of the errors,
    and the others would be logged and printed with pages of their traces.
    """
    # asyncio's logs what a future that nobody has asked had failed with.
    logs = [logging.getLogger(name) for name in ("absl", "asyncio")]
    disabled = [log.disabled for log in logs]
    threads, unraisable = threading.excepthook, sys.unraisablehook
    for log in logs:
        log.disabled = True
    threading.excepthook = sys.unraisablehook = lambda args: None
    try:
        yield
    except OSError:
        if not isinstance(unraisable, _WithoutLatecomers):
            unraisable = _WithoutLatecomers(unraisable)
        raise
    finally:
        for log, was in zip(logs, disabled, strict=True):
            log.disabled = was
        threading.excepthook = threads
        sys.unraisablehook = unraisable


@dataclass(frozen=True)
class _WithoutLatecomers:
    """Tells of what could not be raised, but for writes that outlast a failed one.

    Tensorstore cannot be waited for: each write that was on its way tells its end to
    the event loop that had begun it, long after that was closed.
    """

    tell: Callable[["sys.UnraisableHookArgs"], object]

    def __call__(self, args: "sys.UnraisableHookArgs") -> None:
        error = args.exc_value
        if not isinstance(error, RuntimeError) or str(error) != "Event loop is closed":
            self.tell(args)


def warn(message: str) -> None:
    """Prints a line to standard error."""
    print(message, file=sys.stderr)


def _set_aside(path: Path) -> Path:
    number = 0
    while (kept := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return path.rename(kept)


def _files(checkpoint: Path) -> dict[str, Path]:
    return {
        path.relative_to(checkpoint).as_posix(): path
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path != checkpoint / MANIFEST
    }


def _own_hash(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return _hash(json.dumps(rest, sort_keys=True).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
