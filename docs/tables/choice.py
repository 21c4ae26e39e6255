"""The table of decision's figures: bytes, words and faults side by side."""

from tables import speed
from tables.methods import METHODS, gigabytes, llama_bytes
from tables.records import record, rows

# What a row of the page takes from the records; the rest of it is advice.
_SHOWN = (
    "AdamW of Optax",
    "Adam in 8 bits",
    "MLorc-AdamW",
    "MLorc-Lion",
    "GaLore",
    "GaLore in 8 bits",
    "Fira",
    "I3S",
    "GaLore+, queries and keys",
    "AdaRankGrad",
    "APOLLO",
    "APOLLO-Mini",
    "LDAdamW",
    "Q-GaLore",
    "Adam-mini",
)
_COUNTED = {"AdamW of Optax": "optax.adamw", "APOLLO-Mini": "apollo_mini_adamw"}
_BROKEN = {"AdamW of Optax": "optax.adamw", "APOLLO-Mini": "apollo_adamw, mini"}


def figures() -> str:
    """Bytes, words and launches, and the worst of one bad gradient."""
    faults = record("faults")["figures"]
    lines = []
    for method in METHODS:
        if method.title not in _SHOWN:
            continue
        rank = method.ranks[0] if method.ranks else None
        name = _COUNTED.get(method.title, method.optimizer)
        link = f"[{method.title}](/methods/{method.page}.md)"
        own = faults.get(_BROKEN.get(method.title, method.optimizer), {}).values()
        worst = max((x["worst"] for x in own), default=None)
        lines.append(
            (
                link if method.page else method.title,
                str(rank or ""),
                gigabytes(llama_bytes(method, rank)),
                speed.count("words", name, "h100", "7b"),
                speed.count("launches", name, "h100", "7b"),
                speed.count("words", name, "v5e", "leaf", "leaf-ordinary"),
                "" if worst is None else f"{worst:.1f}" if worst < 1e6 else "lost",
            )
        )
    head = (
        "",
        "rank",
        "state of LLaMA-7B, GB",
        "words, H100",
        "launches",
        "words, TPU v5e",
        "worst after a bad gradient",
    )
    return rows(head, lines, figures=True)
