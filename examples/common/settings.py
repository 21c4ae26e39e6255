"""Settings of a run: from the command line, or from the record of the run resumed."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import tyro

from examples.common.errors import BadFile
from examples.common.files import read_object, write_json
from examples.common.lock import LOCK, is_free
from examples.common.processes import Devices, connect, is_first
from examples.common.typed import checked_fields

S = TypeVar("S")

RUNS = Path("runs")
RECORD = "run.json"

# No part of the record: they say where and how; what --smoke changes is in the rest.
_DEVICES = tuple(field.name for field in dataclasses.fields(Devices))
_UNRECORDED = ("out", "resume", "smoke", *_DEVICES)


def parse_settings(
    argv: list[str],
    name: str,
    full: S,
    smoke: S,
    presets: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> tuple[S, Path]:
    """Reads settings from command-line flags.

    A resumed run has the settings that it was started with, so its flags need not be
    repeated.

    Args:
      argv: the flags.
      name: of the job; the directory of a new run is `runs/NAME-DATE`.
      full: the defaults, a dataclass with at least the fields `out` (Path or None),
        `resume` and `smoke` (bool). If it is one of `Devices`, other processes are
        joined.
      smoke: the defaults under `--smoke`.
      presets: what takes the place of defaults under a name, for a dataclass with a
        field `preset` (str or None).

    Returns:
      The settings, and the directory of the run.

    Raises:
      ValueError: an unknown preset, the directory already holds something and is not
        resumed, there is nothing to resume, or a flag contradicts the record.
      SystemExit: flags that cannot be parsed (status 2), `--help` (status 0).
    """
    given = _parse(argv, smoke if "--smoke" in argv else full)
    preset = getattr(given, "preset", None)
    if preset is not None:
        if preset not in presets:
            raise ValueError(
                f"Unknown preset {preset!r}: choose from {', '.join(presets)}."
            )
        defaults: Any = full
        given = _parse(argv, dataclasses.replace(defaults, **presets[preset]))
    asked: Path | None = given.out
    if isinstance(given, Devices):
        connect(given, asked)
    if given.resume:
        out = given.out or _latest(name)
        recorded = _recorded(out, full)
        _check_unchanged(recorded, _parse(argv, recorded), out)
        now = {x: getattr(given, x) for x in _UNRECORDED if hasattr(given, x)}
        return dataclasses.replace(recorded, **now), out
    out = given.out or RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    # The first process may have begun there already.
    if is_first() and not is_free(out):
        raise ValueError(
            f"Cannot start a run in {out}: it is not empty. Continue that run with"
            " --resume, or choose another --out."
        )
    return given, out


def settings_record(settings: Any) -> dict[str, Any]:
    """The settings as JSON can hold them, under the key that `--resume` looks for."""
    fields = dataclasses.asdict(settings)
    return {"settings": {k: v for k, v in fields.items() if k not in _UNRECORDED}}


def device_flags(settings: Any) -> str:
    """The flags that say on what devices a job runs, each behind a space."""
    given = {name: getattr(settings, name, None) for name in _DEVICES}
    return "".join(
        f" --{name.replace('_', '-')} {value}"
        for name, value in given.items()
        if value is not None
    )


def write_record(out: Path, facts: Mapping[str, Any]) -> None:
    """Writes the record of a run, settings included, with its checksum."""
    write_json(out / RECORD, {**facts, "sha256": _checksum(facts)})


def read_record(out: Path) -> dict[str, Any]:
    """What `write_record` wrote, as JSON has it.

    A run goes on with what it was started with: a record that was edited would make it
    half of one run and half of another.

    Raises:
      FileNotFoundError: there is none.
      BadFile: it is damaged, or was edited, naming it.
    """
    path = out / RECORD
    facts = read_object(path)
    if facts.pop("sha256", None) != _checksum(facts):
        raise BadFile(
            f"{path} is not as it was written: its checksum does not fit. Restore it,"
            " or start a new run."
        )
    return facts


def unchanged(out: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that the run was started with, of which model and data are the same.

    Raises:
      ValueError: they are no longer, or the record is damaged.
    """
    recorded = read_record(out)
    now = json.loads(json.dumps(facts))
    for part in ("model", "data"):
        was = recorded.get(part)
        if not isinstance(was, dict):
            raise BadFile(f"{out / RECORD} is of another command: it has no {part!r}.")
        if was != now[part]:
            names = sorted(was.keys() | now[part].keys())
            changed = [n for n in names if now[part].get(n) != was.get(n)]
            raise ValueError(
                f"Cannot resume {out}: the {part} is not what it was when the run was"
                f" started ({', '.join(changed)})."
            )
    return recorded


def _checksum(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _parse(argv: list[str], defaults: Any) -> Any:
    return tyro.cli(
        type(defaults),
        args=argv,
        default=defaults,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _latest(name: str) -> Path:
    runs = sorted(path.parent for path in RUNS.glob(f"{name}-*/{RECORD}"))
    if not runs:
        raise ValueError(f"Cannot resume: there is no run of {name} in {RUNS}/.")
    return runs[-1]


def _recorded(out: Path, like: Any) -> Any:
    try:
        record = read_record(out)
    except (FileNotFoundError, NotADirectoryError) as error:
        said = f"Cannot resume: {out} holds no run."
        if (out / LOCK).exists():
            said += (
                " One that had no step yet was stopped there:"
                f" delete {out}, and start it again."
            )
        raise ValueError(said) from error
    try:
        fields = checked_fields(
            type(like), record.get("settings"), but=_UNRECORDED, whole=False
        )
    except ValueError as error:
        raise BadFile(f"{out / RECORD} is of another command: {error}") from error
    return dataclasses.replace(like, **fields)


def _check_unchanged(recorded: Any, given: Any, out: Path) -> None:
    for name, was in settings_record(recorded)["settings"].items():
        now = getattr(given, name)
        if now != was:
            raise ValueError(
                f"Cannot resume {out} with {name} = {now}: it was started with {was}."
                " Leave the flag out, or start a new run."
            )
