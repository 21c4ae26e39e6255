"""What `meshes` has counted: rows on disk, and the record for people."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.accelerators.table import versions
from benchmarks.record import RECORDS, line

RECORD = RECORDS / "meshes.json"

_ABOUT = """# meshes

What a step moves between eight devices, read from the compiled program (`python -m
benchmarks.accelerators.meshes`, which says how it is counted). No device was used. A 4
x 2 mesh, its two axes together for rows or for columns, "both" for one axis each, or
each device with its part of the layers of a stack. Thin arrays are split by all axes
that split the weight, the default of `lro.state_shardings`. {versions}.

- *collectives*: of an ordinary step / of one in which all bases are renewed.
- *largest*: numbers of the largest array that one makes or takes on a device. XLA's GPU
  compiler joins those of several leaves into one: "largest" is that of all together.
- *MB*: of all that collectives make or take, whichever is more, on a device.
- *temporaries*: MiB on a device; *weights*: MiB of all eight together.

The target: at most 12 collectives for each group of equal leaves and 8 for all, which
are 44 for a LLaMA, and none of more than 1.1 k max(m, n) numbers a matrix, k the rank
and the columns of the sketch beside it. Bold is above.
"""

_WHY = """
## Where this comes from

- Exact factorizations (I3S, hybrid, uniform, `TopSingular("gram_eigh")`, the first step
  of LDAdam) want `A A^T`, which gathers A wherever its rows are split. The columns are
  shared out first (a device sends and gets its own part of A at most), so that the Gram
  matrix, min(m, n) squared, is the largest that is moved. That is above 1.1 k max(m, n)
  at small ranks: all singular vectors are looked for, so that k is min(m, n) there, and
  a gradient of which all matter cannot be told by less. A stack that the devices divide
  is dealt out instead, whole matrices to each, which then do their own: of a stack
  whose layers are split nothing moves at all.
- Blocks of 256 numbers that lie on two devices: the matrix is not cut to blocks there,
  but its scales are found of parts of blocks, and a number for each block is summed.
  The layout of the codes is as on one device. Blocks over the ends of rows too.
- Thin factors of several leaves are not put together for common calls, as on one
  device: which are split alike is not known when an update is traced, only on which
  mesh they are; so only k x k matrices are. What the leaves sum over the devices at the
  same place of their chains stands behind one barrier (`linalg.meshes.at_once`), and
  XLA makes one collective of it.
- The sketch of which a basis is made is whole on each device while it is made
  orthonormal, by seven Gram matrices one after the other, so that only its products
  with the gradient and what is compared with the old basis are exchanged. Of a stack
  it would be as large as a weight, and stays split. Split, a refresh of GaLore has 45
  collectives on both axes for 27, of as many bytes.
- MLorc's codes are whole on each device for the time of a step, those of all leaves by
  one exchange at its start, and so are its sketches; what is made of them is local
  then. That is memory which no mesh divides: of LLaMA-7B's 224 matrices at rank 4,
  80 MB of codes and up to 59 of sketches on each device. Of ranks above 16 they stay
  split. A sketch is summed where XLA has it, and a barrier stands between that and its
  gathering: told at once that it is to be whole, XLA gathers G and V. On an H100 there
  are 21 collectives on split rows for 41 before, and 39 on both axes for 75, of 7.5 MB
  for 13.1. Both moments' codes go together, as XLA's TPU compiler joins no gathers.
- A collective that XLA's TPU compiler takes in steps, within other work, is one.
- XLA's GPU compiler has what a conditional returns whole on each device. New bases and
  moments lie where the old ones do, as there is a choice between both once more; and
  stacks of Gram matrices narrower than 512 are not dealt out, as XLA deals out the
  gradients with them. (Simulated devices, whose library takes one matrix at a time,
  have the k x k numbers of all layers then.) Without the choice a refresh of GaLore
  moved 185 MB for 114 of one layer, with 69 MiB of temporaries for 43; and of 32
  stacked layers 10.8 GB for 3.8 on split rows, and 2.3 GB for nothing on split layers.
- `optax.contrib.galore` gathers gradients, at each step and for its SVD.
- MLorc-AdamW scales its sketches by what is known of its moments, as the largest entry
  of a sketch may be a sum over the devices; its codes are accepted by numbers that all
  have.

## Not reached, and what was tried

- A refresh of GaLore's kind is a chain of products and Gram matrices, each of which
  needs the one before: one chain for all leaves that `Every` renews together. Where
  each leaf has a time of its own (AdaRankGrad, Q-GaLore, `Staggered`), it has a chain
  of its own, of some eleven collectives. Only at the first step are all due.
- I3S and LDAdam's first step look for all singular vectors of one leaf after the other,
  by four to six collectives each, one of them where the columns that are shared out
  lie by the axes of the mesh in another order than XLA has them.
- Of 32 stacked layers a sketch is 71 MB or more, and XLA joins no two of that size:
  seven leaves have four exchanges each of their own.
- MLorc-AdamW on a v5e with both axes split: 14 gathers of sketches, that of M and that
  of V of each leaf. Both in one would have V made before it is known how G is scaled,
  so that it could not be made in the pass that writes the weights, which would read G
  and V once more, for seven collectives less. The small sums at the end of a step are
  two collectives each there, as the columns of `down_proj` lie by the axes of the mesh
  in another order. Left factors that are whole at the end too save two on an H100, and
  on a v5e have eleven more gathers.
- GaLore+ chooses its single entries once in a training, of parts of a product that are
  whole on each device: 16 collectives of each kernel of queries or keys, of 3.4 times
  as many numbers as are allowed. In smaller parts there would be more of them.
- An eigenproblem of one leaf that is no stack is solved by each device. Those of
  several leaves would have to wait for one another to be dealt out, and hold their Gram
  matrices meanwhile.
- Blocks over the ends of rows (a width that 256 does not divide) move a number for each
  block also where only rows are split, and nothing need be moved.
- 8-bit states of odd widths in very wide matrices (more than 4 x 256 numbers for each
  number of a part) are cut to blocks as on one device.
- `TopSingular("svd")` gathers the gradient of what is no stack: it is what is asked
  for.
- Nothing was timed.
"""

_HEAD = ("", "split", "collectives", "largest", "MB", "temporaries", "compile, s")
_NAMES = {
    "small": "128 x 128, 128 x 384 and 384 x 128",
    "leaf": "one matrix of LLaMA-7B, 4096 x 11008",
    "7b": "one layer of LLaMA-7B",
    "7b-stacked": "all 32 layers of LLaMA-7B, stacked",
}
_DEVICES = {"h100": "8 H100s", "v5e": "v5e 4x2", "cpu": "8 simulated devices"}


def read(path: Path = RECORD) -> dict[str, Any]:
    """The rows, by "case|target|shapes|split"."""
    return json.loads(path.read_text()) if path.exists() else {}


def add(key: str, row: dict[str, Any], path: Path = RECORD) -> None:
    """One more row, with what it was counted with."""
    rows = read(path) | {key: row | {"versions": versions()}}
    lines = [f" {json.dumps(k)}: {json.dumps(x)}" for k, x in sorted(rows.items())]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def counts(row: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same when a row is counted again, by name; or its error."""
    if "error" in row:
        return {"error": row["error"]}
    sides = ("ordinary", "refresh")
    found = {f"{k} {what}": row[k][what] for k in sides for what in row[k]}
    return found | {"temporaries": row["temporaries"]}


def write_markdown(path: Path = RECORD) -> None:
    """The record beside the rows."""
    rows = read(path)
    made = "; ".join(sorted({row["versions"] for row in rows.values()}))
    parts = [_ABOUT.format(versions=made)]
    for target in _DEVICES:
        for shapes in _NAMES:
            parts += _section(rows, target, shapes)
    path.with_suffix(".md").write_text("\n".join([*parts, _WHY]))


def _section(rows: dict[str, Any], target: str, shapes: str) -> list[str]:
    found = {tuple(k.split("|")): row for k, row in rows.items()}
    own = {k: row for k, row in sorted(found.items()) if k[1:3] == (target, shapes)}
    if not own:
        return []
    weights = next((r["weights"] / 2**20 for r in own.values() if "weights" in r), 0)
    title = f"\n## {_DEVICES[target]}: {_NAMES[shapes]} (weights {weights:,.0f} MiB)\n"
    rule = "|" + "---|" * len(_HEAD)
    return [title, line(_HEAD), rule, *(line(_row(k, row)) for k, row in own.items())]


def _row(key: tuple[str, ...], row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [key[0], key[3], row["error"], "", "", "", ""]
    sides = row["ordinary"], row["refresh"]
    once = sides[0] == sides[1]

    def both(written):
        texts = list(map(written, sides))
        return texts[0] if once else " / ".join(texts)

    def largest(side):
        text = f"{side['largest']:,}"
        return f"**{text}**" if side["largest"] > row["thin"] > 0 else text

    def count(side):
        text = str(side["count"])
        return f"**{text}**" if side["count"] > row["most"] else text

    return [
        key[0],
        key[3],
        both(count),
        both(largest),
        both(lambda x: f"{x['bytes'] / 1e6:,.1f}"),
        f"{row['temporaries'] / 2**20:,.0f}",
        f"{row['compile_s']:.0f}",
    ]
