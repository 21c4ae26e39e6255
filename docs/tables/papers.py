"""The papers' claims beside our figures, which are read from the records."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.record import interval
from examples.common.gaps import FULL, SAMPLED, reduction
from tables import speed
from tables.losses import f1_minus
from tables.records import RECORDS, record, rows

Losses = dict[str, float]
"""By seed."""

_MISSING = "not run yet"


@dataclass(frozen=True)
class Claim:
    """A line of the page.

    Attributes:
      claim: what the paper says.
      paper: its own figures, and where they stand.
      ours: what the records have, and whether it agrees.
      command: what makes ours.
    """

    claim: str
    paper: str
    ours: Callable[[], tuple[str, str]]
    command: str


_COMPARISON = "benchmarks.comparison"
_ABLATIONS = "benchmarks.ablations"


def losses(method: str) -> Losses:
    """Validation losses at rank 32; none where the record has none."""
    found = record("comparison")["figures"]["equal_rank"].get(method)
    if found is not None:
        return found["losses"]
    ablations = record("ablations")["figures"]
    if method in ablations:
        return ablations[method]["losses"]
    of = [x["base"] for x in ablations.values() if x["of"] == method]
    return of[0] if of else {}


def minus(method: str, other: str) -> tuple[float, float] | None:
    """The loss minus another's, seed by seed; None without a seed of both."""
    a, b = _pair(method, other)
    found = [a[seed] - b[seed] for seed in a if seed in b]
    return interval(found) if found else None


def _pair(method: str, other: str) -> tuple[Losses, Losses]:
    """Each at its own rates; of a variant and what it varies, at those of one."""
    compared = record("comparison")["figures"]["equal_rank"]
    if method in compared and other in compared:
        return losses(method), losses(other)
    ablations = record("ablations")["figures"]
    if ablations.get(method, {}).get("of") == other:
        return ablations[method]["losses"], ablations[method]["base"]
    if ablations.get(other, {}).get("of") == method:
        return ablations[other]["base"], ablations[other]["losses"]
    return losses(method), losses(other)


def _difference(method: str, other: str) -> str:
    found = minus(method, other)
    shown = _MISSING
    if found is not None:
        middle, half = found
        shown = f"{middle:+.3f}" + (f" ± {half:.3f}" if math.isfinite(half) else "")
    return f"`{method}` - `{other}`: {shown}"


def ahead(method: str, *others: str) -> Callable[[], tuple[str, str]]:
    """The claim that its loss is below the others'."""

    def ours() -> tuple[str, str]:
        shown = "; ".join(_difference(method, other) for other in others)
        verdicts = [_order(minus(method, other)) for other in others]
        return shown, ", ".join(dict.fromkeys(verdicts))

    return ours


def alike(method: str, other: str) -> Callable[[], tuple[str, str]]:
    """The claim that two losses are about equal."""

    def ours() -> tuple[str, str]:
        found = minus(method, other)
        verdict = _order(found)
        said = {"yes": "no, it is ahead", "no": "no, it is behind"}
        if found is not None:
            said["not told apart"] = (
                f"not told apart, to within {abs(found[0]) + found[1]:.3f}"
            )
        return _difference(method, other), said.get(verdict, verdict)

    return ours


def _order(found: tuple[float, float] | None) -> str:
    if found is None:
        return _MISSING
    middle, half = found
    if not math.isfinite(half):
        return "one seed only"
    if abs(middle) <= half:
        return "not told apart"
    return "yes" if middle < 0 else "no"


def _all(*parts: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    shown, verdicts = zip(*(part() for part in parts), strict=True)
    return "; ".join(shown), ", ".join(dict.fromkeys(verdicts))


def _one_moment() -> tuple[str, str]:
    found = {x: alike(f"mlorc_{x}", "mlorc_adamw")() for x in "mv"}
    shown = "; ".join(figures for figures, _ in found.values())
    return shown, "; ".join(f"{x}: {verdict}" for x, (_, verdict) in found.items())


def _residual() -> tuple[str, str]:
    more = ("galore_plus_8bit_0.6", "galore_plus_adamw_8bit", "galore_plus_8bit_1.8")
    return _all(*(ahead(x, "galore_plus_8bit_0.0") for x in more))


def _f1() -> tuple[str, str]:
    figures = record("mrpc")["figures"]
    shown, verdicts = [], []
    for other in ("galore_adamw", "lora", "adamw"):
        middle, half = interval(f1_minus(figures, "mlorc_adamw", other))
        shown.append(f"`mlorc_adamw` - `{other}`: {middle:+.2f} ± {half:.2f}")
        if other != "adamw":
            verdicts.append(_order((-middle, half)))
    text = "; ".join(shown)
    return f"F1, {text}; LDAdamW not run", ", ".join(dict.fromkeys(verdicts))


def _shares() -> tuple[str, str]:
    found = {name: _row("spectra", name)[1] for name in _SPECTRA}
    text = ", ".join(f"{name} {100 * value:.1f}%" for name, value in found.items())
    most = max(found, key=lambda name: found[name])
    return f"mean share of the sum: {text}", _yes(most == "second moment")


_SPECTRA = ("gradient", "first moment", "second moment")


def _row(name: str, first: str) -> list[float]:
    """The numbers of a row of a record that is Markdown only."""
    for line in (RECORDS / f"{name}.md").read_text().splitlines():
        cells = [x.strip() for x in line.strip("|").split("|")]
        if cells[0] == first:
            return [float(x) for x in cells[1:]]
    raise ValueError(f"{name}.md has no row {first!r}.")


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def _per_layer() -> tuple[str, str]:
    found = {
        (x["method"], x["step"]): x["peak"] / 1e9
        for x in record("layerwise_h100")["figures"]
        if x["dtype"] == "float32"
    }
    ordinary, layered = (
        found["mlorc_adamw r=4", step] for step in ("ordinary", "per layer")
    )
    return (
        "peak of a step of LLaMA-7B in float32, compiled for an H100:"
        f" {ordinary:.1f} GB, per layer {layered:.1f} GB"
    ), "LoRA was not compiled"


def _words() -> tuple[str, str]:
    names = ("mlorc_adamw", "galore_adamw", "optax.adamw")
    found = {name: speed.count("words", name, "h100", "7b") for name in names}
    text = ", ".join(f"`{name}` {x}" for name, x in found.items())
    return f"words moved a weight on an H100, not timed: {text}", "not timed"


def _refresh() -> tuple[str, str]:
    names = ("galore_adamw", "galore_plus_adamw")
    found = {
        x: float(speed.count("words", x, "h100", "7b").split(" / ")[-1]) for x in names
    }
    text = ", ".join(f"`{name}` {x:.1f}" for name, x in found.items())
    return (
        f"words a weight of a step that renews all bases, on an H100: {text}; GaLore's"
        " bases come from a sketch here, in the paper from an SVD"
    ), f"{_yes(found[names[1]] < found[names[0]])}, by words"


def _cross_head() -> tuple[str, str]:
    found = record("cross_head")["figures"]
    text = ", ".join(
        f"rank {rank}: {x['whole']:.2f} and {x['one_head']:.2f}"
        for rank, x in found.items()
    )
    larger = all(x["one_head"] > x["whole"] for x in found.values())
    return f"share of the norm left out by the whole's basis and by a head's, {text}", (
        _yes(larger)
    )


def _overlap() -> tuple[str, str]:
    found = {k: x["adjacent"] for k, x in record("subspaces")["figures"].items()}
    text = ", ".join(f"`{name}` {value:.2f}" for name, value in found.items())
    return f"one seed, second half of the run: {text}", (
        _yes(found["i3s_adamw"] < found["galore_adamw"])
    )


def _directions() -> tuple[str, str]:
    found = record("subspaces")
    large = {name: x["large"] for name, x in found["figures"].items()}
    text = ", ".join(f"`{name}` {value:.1f}" for name, value in large.items())
    window = found["settings"]["window"]
    return (
        f"one seed, singular values above a tenth of the largest, last {window} steps:"
        f" {text}"
    ), _yes(large["i3s_adamw"] > large["galore_adamw"])


def _ranks() -> tuple[str, str]:
    found = [x for x in record("ranks")["figures"]["runs"] if x["every"] == 50]
    text = "; ".join(
        f"{x['allowed']:g} left out: mean rank {x['rank']:.1f} of 32,"
        f" {x['state']:.0%} of GaLore's state, loss {x['loss']:.3f}"
        for x in found
    )
    name, base = "adarankgrad_0.23", "adarankgrad_adamw"
    return (
        f"ranks.md, one seed at other rates: {text}; ablations.md,"
        f" {len(losses(name))} seeds: {_difference(name, base)}"
    ), _yes(all(x["state"] < 1 for x in found))


def gap() -> str:
    """I3S, Table 1: perplexities, and how much of the gap a sampled subspace closes."""
    lines = []
    for sampled, leading in SAMPLED.items():
        parts = [losses(name) for name in (sampled, leading, FULL)]
        seeds = set.intersection(*(set(x) for x in parts))
        if not seeds:
            lines.append((f"`{sampled}`, `{leading}`", *[_MISSING] * 4, ""))
            continue
        found = [statistics.fmean(math.exp(x[s]) for s in seeds) for x in parts]
        closed = reduction(*found)
        share = "" if closed is None else f"{round(100 * closed)}%"
        lines.append(
            (
                f"`{sampled}`, `{leading}`",
                *(f"{x:.2f}" for x in found),
                share or "full rank is not best",
                str(len(seeds)),
            )
        )
    head = ("perplexity", "sampled", "leading", "AdamW", "gap closed", "seeds")
    return rows(head, lines, figures=True)


MLORC = (
    Claim(
        "MLorc-AdamW beats GaLore",
        "Tables 2 and 5: GSM8K 47.37 and 38.89, GLUE 85.79 and 84.23",
        ahead("mlorc_adamw", "galore_adamw"),
        _COMPARISON,
    ),
    Claim(
        "and LDAdamW",
        "Tables 2 and 5: GSM8K 47.37 and 41.85, GLUE 85.79 and 85.43",
        ahead("mlorc_adamw", "ldadamw"),
        _COMPARISON,
    ),
    Claim(
        "it is about as good as full fine-tuning",
        "Tables 2 and 5: GSM8K 47.37 and 47.69, GLUE 85.79 and 85.72",
        alike("mlorc_adamw", "adamw"),
        _COMPARISON,
    ),
    Claim(
        "so is MLorc-Lion, compared with Lion",
        "Table 2: GSM8K 47.75 and 46.38",
        alike("mlorc_lion", "lion"),
        _COMPARISON,
    ),
    Claim(
        "on MRPC it beats GaLore, LoRA and LDAdamW",
        "Table 5, F1: 90.77; 90.10, 90.10, 90.35; full 91.11",
        _f1,
        "benchmarks.finetuning --task mrpc",
    ),
    Claim(
        "compressing one moment alone changes little",
        "Table 7, GLUE: both 85.79, m 85.69, v 85.29",
        _one_moment,
        _ABLATIONS,
    ),
    Claim(
        "8 singular values hold much of gradient and moments, of the second the most",
        "Figures 1 and 4 (plots)",
        _shares,
        "examples.spectra --task mrpc",
    ),
    Claim(
        "per-layer updates need less memory than LoRA",
        "Table 6: 16.8 and 17.7 GB",
        _per_layer,
        "benchmarks.layerwise --target h100",
    ),
    Claim(
        "a step takes no longer than GaLore's",
        "Table 4: 1 h 25 min and 1 h 33 min",
        _words,
        "benchmarks.accelerators",
    ),
)
I3S = (
    Claim(
        "a sampled subspace beats the leading one: GaLore",
        "Table 1, perplexity, 60M: 30.47 and 31.50",
        ahead("i3s_adamw", "galore_adamw"),
        _COMPARISON,
    ),
    Claim(
        "with Fira",
        "Table 1: 28.12 and 28.42",
        ahead("fira_i3s_adamw", "fira_adamw"),
        _COMPARISON,
    ),
    Claim(
        "with Adafactor",
        "Table 1: 30.06 and 31.13",
        ahead("i3s_adafactor", "galore_adafactor"),
        _ABLATIONS,
    ),
    Claim(
        "with Adam-mini",
        "Table 1: 31.66 and 32.08",
        ahead("i3s_adam_mini", "galore_adam_mini"),
        _ABLATIONS,
    ),
    Claim(
        "with Adam in 8 bits",
        "Table 1: 30.55 and 31.62",
        ahead("i3s_adamw_8bit", "galore_adamw_8bit"),
        _ABLATIONS,
    ),
    Claim(
        "it beats GoLore, whose last fifth of the run has random subspaces",
        "Figure 6 (plot)",
        ahead("i3s_adamw", "golore_adamw"),
        _COMPARISON,
    ),
    Claim(
        "and subspaces that are always random",
        "Figure 6 names GoLore's projection",
        ahead("i3s_adamw", "random_adamw"),
        _ABLATIONS,
    ),
    Claim(
        "and a uniform draw of singular vectors, whose loss spikes",
        "Figure 5 (plot)",
        ahead("i3s_adamw", "uniform_adamw"),
        _ABLATIONS,
    ),
    Claim(
        "its subspaces overlap less from one choice to the next",
        "Figures 1, 2 and 4a (plots)",
        _overlap,
        "benchmarks.subspaces",
    ),
    Claim(
        "what it adds to the weights has more directions",
        "Figure 4b (plot)",
        _directions,
        "benchmarks.subspaces",
    ),
    Claim(
        "the hybrid, which the theorem is about, is like I3S",
        "Section 3.3, no figures",
        alike("hybrid_adamw", "i3s_adamw"),
        _ABLATIONS,
    ),
)
GALORE_PLUS = (
    Claim(
        "GaLore+ is at least as good as GaLore",
        "Tables 1 to 4, rank 128: GSM8K 34.65 and 33.66, MAWPS 67.64 and 64.29",
        ahead("galore_plus_adamw", "galore_adamw"),
        _COMPARISON,
    ),
    Claim(
        "one head's basis leaves out more than that of the whole gradient",
        "Figure 2b (plot)",
        _cross_head,
        "benchmarks.cross_head",
    ),
    Claim(
        "the more entries in the residual the better: 0.6, 1.2, 1.8% beside none",
        "Table 8, GSM8K: 33.70, 33.80, 34.37 beside 33.64",
        _residual,
        _ABLATIONS,
    ),
    Claim(
        "a choice of the bases costs far less",
        "Figure 1, Tables 1 to 4: a quarter of the time of the run",
        _refresh,
        "benchmarks.accelerators",
    ),
)
ADARANKGRAD = (
    Claim(
        "ranks shrink, and the state with them",
        "Table 2, rank 4 or 8 at first: 3.65 to 3.91, 5.33 to 7.77",
        _ranks,
        "benchmarks.ranks",
    ),
    Claim(
        "it is no worse than GaLore",
        "Table 4, perplexity, 60M: 34.24 and 34.88",
        alike("adarankgrad_adamw", "galore_adamw"),
        _COMPARISON,
    ),
    Claim(
        "a fixed interval is worse",
        "Table 5, MRPC: 92.58 and 92.6",
        ahead("adarankgrad_adamw", "adarankgrad_fixed_interval"),
        _ABLATIONS,
    ),
    Claim(
        "a fixed rank is worse",
        "Table 6, MRPC: 92.17 and 92.6",
        ahead("adarankgrad_adamw", "adarankgrad_fixed_rank"),
        _ABLATIONS,
    ),
)


def table(claims: tuple[Claim, ...]) -> str:
    """Claims, the papers' figures, ours, and whether they agree."""
    lines = []
    for x in claims:
        ours, verdict = x.ours()
        lines.append((x.claim, x.paper, ours, verdict, f"`{x.command}`"))
    head = ("claim", "paper", "here", "seen here", "`python -m`")
    return rows(head, lines, figures=False)
