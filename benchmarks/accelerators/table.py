"""The rows that were counted: kept as JSON, one a line, and written out for people."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import NamedTuple

from benchmarks.accelerators import aims
from benchmarks.accelerators.cases import CASES
from benchmarks.accelerators.measure import Row
from benchmarks.accelerators.targets import TARGETS
from benchmarks.record import line

RECORD = Path(__file__).parents[1] / "records" / "accelerators.json"
DTYPES = ("float32", "bfloat16")
TIERS = ("xla", "pallas")

_ABOUT = """\
# accelerators

No device was used: XLA's compilers for these devices ran on a machine that has none,
and what the compiled programs do was counted in them ({versions}). Autotuning is off,
so that a device may choose other kernels. No time was measured: **time is computed**,
from the bytes at the bandwidth of the device's memory ({bandwidths}),
and 3 microseconds for each launch on the H100; on a TPU a step is one program. It is
the least that a step can take: products at the highest precision may take longer, as
those of GaLore at rank 128, which need 1.55 ms of an H100's 67 TFLOP/s for a layer of
LLaMA-7B. Those of rows with a mark `p` are faster, and less precise.

A step is the update and its application to the parameters, with parameters and state
donated. Where there are two figures, the first is of an ordinary step, in which no
basis is renewed, and the second of a refresh, in which all are. A conditional counts as
its dearest branch, but for one that is marked as a refresh. The first step of all,
in which no basis is there yet, reads gradients once more and is not counted.

- *words*: of four bytes, read and written, for each weight; what a Pallas kernel reads
  again counts again. In bfloat16 a parameter is half a word.
- *sizes*: the same bytes over those of the parameters. `optax.adamw` has 7.
- *launches*: of kernels, copies, libraries, and looks at a predicate. On TPU, these are
  the operations of the program.
- *library*: of them, calls of cuSOLVER and of triangular solves, or of their likes.
- *temporaries*: in MiB; the second figure is of the program without its refresh. Of
  "leaf-ordinary", only that program was compiled.
- *compile*: seconds on the machine that counted.

A mark says what is not as it should be: `a`, conditionals that are not marked counted
as refreshes; `l`, a loop of unknown length counted once; `p`, a product of float32 is
not at the highest precision.
"""


class Key(NamedTuple):
    """What a row is about, see `measure.Request`."""

    case: str
    target: str
    shapes: str
    dtype: str
    tier: str

    def __str__(self) -> str:
        return "|".join(self)


def keys(
    targets: Iterable[str],
    shapes: Iterable[str],
    dtypes: Iterable[str],
    tiers: Iterable[str],
) -> Iterator[Key]:
    """All rows that have a meaning: kernels are only in the library's own methods."""
    for target, shape, dtype, name, tier in product(
        targets, shapes, dtypes, CASES, tiers
    ):
        case = CASES[name]
        if case.fits(shape) and (case.own or tier == "xla"):
            yield Key(name, target, shape, dtype, tier)


@dataclass
class Table:
    """Rows on disk; each is written as soon as it is known.

    Attributes:
      path: of the JSON; the Markdown lies beside it.
      rows: by `Key`.
    """

    path: Path
    rows: dict[Key, Row]

    @classmethod
    def read(cls, path: Path = RECORD) -> "Table":
        text = json.loads(path.read_text()) if path.exists() else {"rows": {}}
        return cls(path, {Key(*k.split("|")): row for k, row in text["rows"].items()})

    def put(self, key: Key, row: Row) -> None:
        self.rows[key] = row
        self.write()

    def get(self, key: Key) -> Row | None:
        """A row; if it is that of another tier, that one."""
        row = self.rows.get(key)
        return (
            self.rows.get(key._replace(tier=row["as"])) if row and "as" in row else row
        )

    def write(self) -> None:
        lines = [
            f" {json.dumps(str(key))}: {json.dumps(row)}"
            for key, row in sorted(self.rows.items())
        ]
        text = '{"rows": {\n' + ",\n".join(lines) + "\n}}\n"
        new = self.path.with_suffix(".new")
        new.write_text(text)
        new.replace(self.path)

    def write_markdown(self) -> None:
        self.path.with_suffix(".md").write_text(markdown(self))


def versions() -> str:
    """What the counts depend on: the compilers, and Optax for its own methods."""

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "none"

    names = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "optax")
    return ", ".join(f"{name} {installed(name)}" for name in names)


def seconds(row: Row, target: str, refresh: bool) -> float:
    """The time of a step as it follows from the counts."""
    device, which = TARGETS[target], "_refresh" if refresh else ""
    moved = row[f"sizes{which}"] * row["weights_mib"] * 2**20
    return moved / device.bandwidth + row[f"launches{which}"] * device.launch


def markdown(table: Table) -> str:
    """The table for people."""
    used = [t for t in TARGETS if any(k.target == t for k in table.rows)]
    bandwidths = ", ".join(f"{t} {TARGETS[t].bandwidth / 1e12:.2f} TB/s" for t in used)
    made = sorted({row["versions"] for row in table.rows.values() if "versions" in row})
    parts = [_ABOUT.format(versions="; ".join(made), bandwidths=bandwidths)]
    groups = sorted({(k.target, k.shapes, k.dtype) for k in table.rows})
    for target, shapes, dtype in sorted(groups, key=lambda g: used.index(g[0])):
        found = [k for k in table.rows if k[1:4] == (target, shapes, dtype)]
        order = list(CASES)
        found.sort(key=lambda k: (order.index(k.case), k.tier != "xla"))
        weights = next(
            (
                f", {r['weights_mib']:.0f} MiB"
                for r in map(table.get, found)
                if _known(r)
            ),
            "",
        )
        head = ["", "words", "sizes", "launches", "library"]
        head += ["temporaries", "compile, s", "least time, ms"]
        parts.append(f"\n## {target}, {shapes}, {dtype}{weights}\n")
        parts.append(line(head))
        parts.append("|" + "---|" * len(head))
        parts += [line(_cells(key, table.rows[key])) for key in found]
    return "\n".join([*parts, aims.section(table.rows)])


def _known(row: Row | None) -> bool:
    return bool(row) and "words" in row


def _cells(key: Key, row: Row) -> list[str]:
    name = key.case if key.tier == "xla" else f"{key.case}, {key.tier}"
    if "as" in row:
        return [name, "no kernel is used", *[""] * 6]
    if "error" in row:
        return [name, row["error"].replace("|", "/"), *[""] * 6]

    def both(field: str, form: str) -> str:
        first, then = (format(row[field + x], form) for x in ("", "_refresh"))
        return first if first == then else f"{first} / {then}"

    marks = [
        mark
        for mark, here in (
            ("a", row["rule"] == "all" and row["conditionals"]),
            ("l", row["unbounded"]),
            ("p", row["imprecise"]),
        )
        if here
    ]
    temporaries = f"{row['temporaries_mib']:.1f}"
    without = row["temporaries_without_refresh_mib"]
    if without is not None:
        temporaries += f" / {without:.1f}"
    times = [f"{1e3 * seconds(row, key.target, x):.2f}" for x in (False, True)]
    return [
        name + (f" ({', '.join(marks)})" if marks else ""),
        both("words", ".2f"),
        both("sizes", ".2f"),
        both("launches", "d"),
        both("library", "d"),
        temporaries,
        f"{row['compile_s']:.1f}",
        " / ".join(dict.fromkeys(times)),
    ]
