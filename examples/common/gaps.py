"""How much of the gap to full rank a sampled subspace closes: I3S, Table 1."""

from collections.abc import Mapping

FULL = "adamw"
# Each with the method that takes the leading subspace.
SAMPLED = {
    "i3s_adamw": "galore_adamw",
    "fira_i3s_adamw": "fira_adamw",
    "i3s_adafactor": "galore_adafactor",
    "i3s_adam_mini": "galore_adam_mini",
    "i3s_adamw_8bit": "galore_adamw_8bit",
}
HEADER = ("methods", "sampled", "leading", "full rank", "gap closed")


def reduction(sampled: float, leading: float, full: float) -> float | None:
    """The share of the gap between leading subspace and full rank that is closed.

    None where the perplexity of full rank is not the lowest, as in the paper.

    >>> reduction(sampled=30.47, leading=31.50, full=27.71).__round__(4)
    0.2718
    """
    if full >= min(sampled, leading):
        return None
    return (leading - sampled) / (leading - full)


def gap_rows(perplexities: Mapping[str, float]) -> list[list[str]]:
    """A row for each pair that is there with full rank, as `HEADER` has it."""
    rows = []
    for sampled, leading in SAMPLED.items():
        if {sampled, leading, FULL} <= perplexities.keys():
            found = [perplexities[name] for name in (sampled, leading, FULL)]
            closed = reduction(*found)
            rows.append(
                [
                    f"`{sampled}`, `{leading}`",
                    *(f"{x:,.2f}" for x in found),
                    "" if closed is None else f"{closed:.1%}",
                ]
            )
    return rows
