"""Where a measurement is kept: JSON for machines, Markdown for people."""

import dataclasses
import datetime
import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from scipy.stats import t as student

RECORDS = Path(__file__).parent / "records"


def machine() -> dict[str, Any]:
    """The machine and the versions that a figure was measured with."""

    def installed(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    return {
        "date": datetime.date.today().isoformat(),
        "devices": sorted({d.device_kind for d in jax.devices()}),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS"),
        "python": platform.python_version(),
        **{name: installed(name) for name in ("jax", "jaxlib", "optax", "flax")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    return next(names, platform.processor())


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half of the width of its 95% confidence interval (Student's t)."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return mean, math.inf
    quantile = float(student.ppf(0.975, count - 1))
    return mean, quantile * statistics.stdev(values) / math.sqrt(count)


def written(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """The mean and half of the interval for people; empty without values."""
    if not values:
        return ""
    middle, half = interval(values)
    shown = f"{middle:{sign}.{digits}f}"
    return shown + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")


def line(cells: Sequence[str]) -> str:
    """A row of a table in Markdown."""
    return "| " + " | ".join(cells) + " |"


def about(doc: str | None) -> str:
    """What a module's docstring says behind its title and its command."""
    assert doc
    return doc.split("\n\n", 2)[2].strip()


def known_figures(name: str, out: Path) -> dict[str, Any]:
    """What a record has of an earlier run, to go on from."""
    path = out / f"{name}.json"
    return json.loads(path.read_text())["figures"] if path.exists() else {}


def _kept(settings: Any) -> dict[str, str]:
    """Settings as a record has them: where files lie on a machine changes no figure."""
    given = dataclasses.asdict(settings).items()
    kept = {k: str(v) for k, v in given if not isinstance(v, Path) and k != "out"}
    return {k: Path(v).name if Path(v).is_absolute() else v for k, v in kept.items()}


def write_record(
    name: str, settings: Any, figures: Any, text: str, out: Path | None = None
) -> None:
    """Print a measurement, and write ``name.json`` and ``name.md`` to the records.

    Args:
      name: of the files.
      settings: a dataclass, kept beside the figures.
      figures: anything that JSON can hold.
      text: the same for people, in Markdown.
      out: another directory than ``benchmarks/records``.
    """
    directory = out or RECORDS
    directory.mkdir(parents=True, exist_ok=True)
    about = machine()
    record = {"machine": about, "settings": _kept(settings), "figures": figures}
    (directory / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    facts = ", ".join(f"{k} {v}" for k, v in about.items())
    (directory / f"{name}.md").write_text(f"# {name}\n\n{facts}\n\n{text}\n")
    print(text)
    print(f"\nWritten: {directory / name}.json, {directory / name}.md")
