"""What was aimed at for an H100 and a v5e, beside what is reached, and why not more."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.record import line

Row = Mapping[str, float]
_LEAF = 172.0  # MiB of the largest matrix of LLaMA-7B


class Aim(NamedTuple):
    """A figure that a row was to have.

    Attributes:
      case, tier: of the row.
      count: the figure: one of the row's, or "compile ratio", to `optax.adamw`'s.
      h100, v5e: the most that it was to be; None where nothing was aimed at.
    """

    case: str
    count: str
    h100: float | None
    v5e: float | None
    tier: str = "xla"


_ORDINARY = "temporaries_without_refresh_mib"
_FOR_MANY = ("i3s_adamw", "golore_adamw", "galore_plus_adamw", "adarankgrad_adamw")
_RENEWED = (
    "galore_adamw",
    "adarankgrad_adamw",
    "galore_plus_adamw",
    "galore_staggered",
    "golore_adamw",
    "ldadamw",
    "q_galore_adamw_8bit",
)
AIMS = (
    Aim("galore_adamw", "words", 3.7, 4.2),
    Aim("galore_adamw", _ORDINARY, 32.0, 32.0),
    Aim("galore_adamw", "words_refresh", 11.0, 11.0),
    Aim("galore_adamw", "temporaries_mib", 344.0, 344.0),
    Aim("mlorc_lion", "words", 5.4, 5.4),
    Aim("mlorc_lion", "temporaries_mib", 16.0, 16.0),
    Aim("mlorc_adamw", "words", 8.2, 7.4),
    Aim("mlorc_adamw", "temporaries_mib", _LEAF, 32.0),
    Aim("mlorc_adamw", "words", 5.4, 5.4, "pallas"),
    Aim("mlorc_adamw", "temporaries_mib", 16.0, 16.0, "pallas"),
    Aim("adamw_8bit", "words", 9.0, None),
    Aim("adamw_8bit", "temporaries_mib", _LEAF, 1544.0),
    Aim("adamw_8bit", "words", 6.2, 6.2, "pallas"),
    Aim("adamw_8bit", "temporaries_mib", _LEAF, _LEAF, "pallas"),
    *(Aim(case, "words", 5.2, 5.7) for case in (*_FOR_MANY, "apollo_adamw")),
    Aim("fira_adamw", "words", 5.9, 6.4),
    Aim("ldadamw", "words", 9.0, 9.0),
    Aim("ldadamw", _ORDINARY, 2 * _LEAF, 2 * _LEAF),
    Aim("adam_mini", "temporaries_mib", _LEAF, _LEAF),
    Aim("flora", _ORDINARY, _LEAF, _LEAF),
    Aim("q_galore_adamw_8bit", _ORDINARY, _LEAF, _LEAF),
    # 20 launches a leaf and 60, at rank above 16 25 and 100; at a refresh 60 and 100.
    *(
        Aim(case, "launches", 200.0, None, tier)
        for case in ("mlorc_adamw", "mlorc_lion")
        for tier in ("xla", "pallas")
    ),
    *(Aim(case, "launches", 275.0, None) for case in ("galore_adamw", "ldadamw")),
    *(Aim(case, "launches_refresh", 520.0, None) for case in _RENEWED),
    Aim("galore_adamw", "compile ratio", 6.0, None),
    Aim("mlorc_adamw", "compile ratio", 6.0, 8.0),
    Aim("mlorc_adamw", "compile ratio", 6.0, 8.0, "pallas"),
)
# Of a device, the shapes whose rows are looked at, the first that is there.
_SHAPES = {"h100": ("7b",), "v5e": ("7b", "leaf", "leaf-ordinary")}
_UNITS = {"temporaries_mib": "MiB", _ORDINARY: "MiB", "compile ratio": "times"}
_NAMES = {
    "words": "words",
    "words_refresh": "words of a refresh",
    "temporaries_mib": "temporaries",
    _ORDINARY: "temporaries without a refresh",
    "launches": "launches",
    "launches_refresh": "launches of a refresh",
    "compile ratio": "compile time, to `optax.adamw`'s",
}

_ABOUT = """
## What was aimed at

In float32: one layer of LLaMA-7B on an H100; the same on a v5e, or its largest matrix
where the layer was not counted. Bold is above the aim by more than 1%. Compile times
of an H100's rows here are of a quiet machine, those of a v5e of one with other work.
"""

_TRIED = """
## What was tried where more was hoped for

- **fira**: the scaled residual is written once and read again. XLA's Triton products
  take as further operands of their last loop only parameters of the program and
  broadcasts of them; the scales of the columns are computed. Eight orders of the same
  sum, barriers and reduced precision moved 5.0 to 7.1 words in a program of one leaf
  that moves 3.0 where the scales are parameters.
- **ldadamw**: two products each read gradient and error and one the gradient alone, the
  new error reads both and is written, and the weights are read and written: ten words
  are the least of this order of steps. The sum of gradient and error, stored once,
  moved more (18.5 when the least was eleven).
- **apollo_adamw**: the gradient is read three times, for its projection, for the
  lengths of its columns, which make the limiter's norm, and for the update; the weights
  are read and written. What is over 5 words are thin arrays, 1/32 of a word each time:
  the two parts that XLA makes the projection in, the projection, two moments and the
  direction, which are looked at before they are accepted: some 15 times in all.
- **Temporaries** that are missed by a tenth are a leaf and thin arrays beside it (8-bit
  AdamW's kernels on a v5e, Flora, MLorc), or thin arrays alone (GaLore, MLorc's
  kernels): projections in their parts, and the sums that each program of a kernel
  leaves.
- **flora**: Adafactor's update is written, as a product takes one operand, and the
  momentum is written for its clip. A clip by the Gram matrix of the projection moves
  2.8 words less, and Adafactor's factors could be multiplied into the projection:
  neither is written yet, as both would tie the two transformations together.
- **Launches of a refresh**: a basis of rank 128 takes fifteen calls of cuSOLVER and
  cuBLAS, and some 90 launches, the most of them as many for all leaves that are renewed
  at once. Where each leaf has a time of its own (AdaRankGrad, Q-GaLore, `Staggered`),
  it has calls of its own. GoLore's were its own, too, 886 launches, as a conditional
  of the subspace within that of a refresh stored the gradients that it took; one of
  three branches takes them as they lie.
  GaLore+ sorts the entries of its residual in eight blocks, 64 launches a leaf; in
  blocks of 50 rows there were 656.
- **Launches of MLorc-AdamW, XLA**: 15 a leaf, and 170 for what all have in common, 48
  of them a Jacobi iteration. Of the 15, six lift both sketches of a leaf, so that the
  second product is precise: a Gram matrix, an elimination and its application. That
  cannot wait for the other leaves, as V would have to be kept, or made and read once
  more. MLorc-Lion has no V, and lifts those of all leaves in common: 160 launches for
  220. There were 20 a leaf while sketches were scaled by their largest entry, and a
  matrix product applied the elimination, whose parts XLA then copied for the next
  products. XLA takes parts of a stack at places that it knows in a launch each, as they
  do not overlap, and all at once where it does not know them: 958 launches for the 56
  leaves of LLaMA-60M instead of 1,256.
- **Launches of MLorc-AdamW, Pallas**: 149, which were 296, and 311 for LLaMA-60M, which
  were 1,100. Small matrices have a kernel (238). The update reads the old factors as
  parts of copies, where XLA copied each (214). V is not stored, so that sketches are
  lifted in common (208), and scaled (183), and leaves need no order (147); two are
  for sums that are one collective on a mesh. Those of all
  leaves are kept meanwhile: 20.8 MiB, which were 17.4. On a v5e they lie by columns: by
  rows, as kernels write them, there were 70 MiB of temporaries for 9.
- **mlorc_adamw, Pallas**: 5 words are the least. Each of the two passes moves 0.16 more
  for thin arrays that each tile reads again, and 0.06 for sums of programs that share a
  walk. Tiles of 64 rows, and twice as many programs, moved 0.3 more in all.
- **mlorc_adamw, XLA**: V is written for its two products: one leaf of temporaries, and
  what the largest leaf's sketch needs.
- **adamw_8bit, XLA on TPU**: a scale reaches its block only by moving the matrix to
  another layout, several times: 33 words. So it goes in a loop over some rows, which
  fit the chip's memory, and writes the update: 7 words, and one leaf of temporaries.
- **Compile time of MLorc-AdamW on an H100**, seven leaves, two quiet cores: 12 s by
  XLA and 7 with kernels; MLorc-Lion 6 and 4. There, `optax.adamw` takes 0.3, and GaLore
  5. On a slower machine, 17 and 11 s that had been 20. XLA's tier has 148
  kernels.
  A third is XLA's choice of fusions among 7,500 operations, 4,400 of them in eight
  eliminations that are written out number by number; kernels of small matrices have
  none. Row by row there are 81 more launches, and the time was 19 s for 17. A profile
  of GaLore's has no peak: it is spent in MLIR and LLVM, kernel by kernel.
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


def section(rows: Mapping[tuple[str, ...], Row]) -> str:
    """The aims beside what is reached, and what was tried where they are missed."""
    head = ("", "", "H100: aim", "reached", "v5e: aim", "reached")
    lines = [line(head), "|" + "---|" * len(head)]
    for aim in AIMS:
        name = aim.case if aim.tier == "xla" else f"{aim.case}, {aim.tier}"
        cells = [name, _NAMES[aim.count]]
        for target, most in (("h100", aim.h100), ("v5e", aim.v5e)):
            cells += _cells(aim.count, most, reached(rows, aim, target))
        lines.append(line(cells))
    return "\n".join([_ABOUT, *lines, _TRIED])


def reached(rows: Mapping[tuple[str, ...], Row], aim: Aim, target: str) -> float | None:
    """The figure of the row that an aim is about; None where it was not counted."""
    for shapes in _SHAPES[target]:
        where = (target, shapes, "float32")
        row = rows.get((aim.case, *where, aim.tier), {})
        adamw = rows.get(("optax.adamw", *where, "xla"), {})
        found = row.get(aim.count)
        if aim.count == "compile ratio" and "compile_s" in row and "compile_s" in adamw:
            found = row["compile_s"] / adamw["compile_s"]
        elif aim.count == _ORDINARY and found is None:
            # A program that has no refresh is the one without it.
            found = row.get("temporaries_mib")
        if found is not None:
            return found
    return None


def _cells(count: str, most: float | None, found: float | None) -> Sequence[str]:
    if most is None:
        return "", ""
    unit = f" {_UNITS[count]}" if count in _UNITS else ""
    if found is None:
        return f"{most:g}{unit}", "not counted"
    digits = ".2f" if "words" in count else ".4g" if found >= 1000 else ".3g"
    text = f"{found:{digits}}{unit}"
    return f"{most:g}{unit}", f"**{text}**" if found > 1.01 * most else text
