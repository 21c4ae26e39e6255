"""Settings of a run: from the command line, or from the record of the run resumed."""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import tyro

S = TypeVar("S")

RUNS = Path("runs")
RECORD = "run.json"

# No part of the record: they say where and how; what --smoke changes is in the rest.
_UNRECORDED = ("out", "resume", "smoke")


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
        `resume` and `smoke` (bool).
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
    if given.resume:
        out = given.out or _latest(name)
        recorded = _recorded(out, full)
        _check_unchanged(recorded, _parse(argv, recorded), out)
        return dataclasses.replace(recorded, resume=True), out
    out = given.out or RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"Cannot start a run in {out}: it is not empty. Continue that run with"
            " --resume, or choose another --out."
        )
    return given, out


def settings_record(settings: Any) -> dict[str, Any]:
    """The settings as JSON can hold them, under the key that `--resume` looks for."""
    fields = dataclasses.asdict(settings)
    return {"settings": {k: v for k, v in fields.items() if k not in _UNRECORDED}}


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
        fields = json.loads((out / RECORD).read_text())["settings"]
    except FileNotFoundError as error:
        raise ValueError(f"Cannot resume: {out} holds no run.") from error
    # JSON has no tuples.
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return dataclasses.replace(like, **fields)


def _check_unchanged(recorded: Any, given: Any, out: Path) -> None:
    for name, was in settings_record(recorded)["settings"].items():
        now = getattr(given, name)
        if now != was:
            raise ValueError(
                f"Cannot resume {out} with {name} = {now}: it was started with {was}."
                " Leave the flag out, or start a new run."
            )
