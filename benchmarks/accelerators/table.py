"""The rows that were counted: kept as JSON, one a line, and written out for people."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import NamedTuple

from benchmarks.accelerators.cases import CASES
from benchmarks.accelerators.measure import Row
from benchmarks.accelerators.targets import TARGETS

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

_MISSED = """
## What was tried where more was hoped for

- **fira**: the scaled residual is written once and read again. XLA's Triton products
  take as further operands of their last loop only parameters of the program and
  broadcasts of them; the scales of the columns are computed. Eight orders of the same
  sum, barriers and reduced precision moved 5.0 to 7.1 words in a program of one leaf
  that moves 3.0 where the scales are parameters.
- **ldadamw**: three products each read gradient and error, the new error reads both and
  is written, and the weights are read and written: eleven words are the least of this
  order of steps. The sum of gradient and error, stored once, moved more (18.5).
- **flora**: Adafactor's update is written, as a product takes one operand, and the
  momentum is written for its clip. A clip by the Gram matrix of the projection moves
  2.8 words less, and Adafactor's factors could be multiplied into the projection:
  neither is written yet, as both would tie the two transformations together.
- **Launches of a refresh**: a basis of rank 128 takes fifteen calls of cuSOLVER and
  cuBLAS, as many for all leaves that are renewed at once. Where each leaf has a time of
  its own (AdaRankGrad, Q-GaLore, `Staggered`), it has calls of its own. So it has with
  GoLore, whose conditional of the subspace would keep copies of the gradients of all
  leaves that are renewed at once (481 MiB instead of 184, for 425 launches of 886).
- **Launches of MLorc**: 15 a leaf, and 170 for what all have in common, 48 of them a
  Jacobi iteration. Of the 15, six lift the two sketches of a leaf, so that the second
  product is precise: a Gram matrix, an elimination and its application. That cannot
  wait for the other leaves, as V would have to be kept, or made and read once more.
  There were 20 a leaf while sketches were scaled by their largest entry, and a matrix
  product applied the elimination, whose parts XLA then copied for the next products.
  The 56 leaves of LLaMA-60M have 1,256 launches for 1,204 before, and 1,451 for 1,013
  by Pallas, but the 21 of its first three layers 474 for 643, and 538 for 654. So it is
  their number: not shown, but likely, XLA's limit on what one launch may return.
- **mlorc_adamw, Pallas**: 5 words are the least. Each of the two passes moves 0.16 more
  for thin arrays that each tile reads again, and 0.06 for sums of programs that share a
  walk. Tiles of 64 rows, and twice as many programs, moved 0.3 more in all.
- **mlorc_adamw, XLA**: V is written for its two products: one leaf of temporaries, and
  what the largest leaf's sketch needs.
- **adamw_8bit, XLA on TPU**: a scale reaches its block only by moving the matrix to
  another layout, several times: 33 words. So it goes in a loop over some rows, which
  fit the chip's memory, and writes the update: 7 words, and one leaf of temporaries.
- **Compile time of MLorc on an H100**: 17 s for seven leaves on two quiet cores, where
  `optax.adamw` takes 0.6 and GaLore 9. A kernel costs 60 ms, and there are 162. A third
  is XLA's choice of fusions among 7,500 operations, 4,400 of them in eight eliminations
  that are written out number by number. Row by row there are 81 more launches, and the
  time was 19 s.
- **Compile time** beside `optax.adamw` of the same row: what is compiled once for equal
  shapes by the tracer is compiled by XLA for each leaf. On a TPU, a gradient's product
  at the highest precision takes it three to eight seconds of a processor (0.3 at the
  default precision), and a leaf has six. Those of thin arrays take one to three; a
  refresh has them once for the leaves that are renewed at once. Loops over its rounds
  leave 16 products for 26, but took 42 s for 37, and 147 more launches for seven leaves
  on an H100. Products in blocks of 1024 compile in a second, but their loop needs the
  transposed gradient: two words and a leaf of temporaries more. Leaves that are stacked
  by layer compile once for all layers.
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
    return "\n".join([*parts, _MISSED])


def _known(row: Row | None) -> bool:
    return bool(row) and "words" in row


def line(cells: Sequence[str]) -> str:
    """A row of a table."""
    return "| " + " | ".join(cells) + " |"


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
