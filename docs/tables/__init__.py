"""The site's tables and plots, made from the records and from the code at each build.

A page includes what it needs from `_generated`. Nothing that was measured or that the
code decides is typed into a page.
"""

from pathlib import Path

from tables import (
    choice,
    contract,
    counts,
    equality,
    faults,
    losses,
    memory,
    methods,
    numerics,
    papers,
    speed,
)
from tables.records import repository as repository


def _texts() -> dict[str, str]:
    pages = dict.fromkeys(x.page for x in methods.METHODS if x.page)
    return {
        "methods": methods.table(),
        **{f"facts_{page}": methods.facts(page) for page in pages},
        "choice": choice.figures(),
        "contract_summary": contract.summary(),
        "contract_by_method": contract.by_method(),
        "contract_by_test": contract.by_test(),
        "counts": counts.table(),
        "numerics": numerics.table(),
        "comparison": losses.comparison(),
        "mrpc": losses.task(),
        "memory": memory.everything(),
        "memory_budgets": memory.budgets(),
        "memory_step": memory.step("layerwise"),
        "memory_step_h100": memory.step("layerwise_h100"),
        "memory_accumulation": memory.accumulation(),
        "devices": memory.devices(),
        "exchange": memory.exchange(),
        "equality": equality.table(),
        "speed_h100": speed.table("h100", "7b", "float32"),
        "speed_h100_bfloat16": speed.table("h100", "7b", "bfloat16"),
        "speed_h100_stacked": speed.table("h100", "7b-stacked", "float32"),
        "speed_v5e": speed.table("v5e", "7b", "float32"),
        "speed_v5e_bfloat16": speed.table("v5e", "7b", "bfloat16"),
        "speed_v5e_ordinary": speed.table("v5e", "leaf-ordinary", "float32"),
        "speed_v6e_ordinary": speed.table("v6e", "leaf-ordinary", "float32"),
        "papers_mlorc": papers.table(papers.MLORC),
        "papers_i3s": papers.table(papers.I3S),
        "papers_gap": papers.gap(),
        "papers_galore_plus": papers.table(papers.GALORE_PLUS),
        "papers_adarankgrad": papers.table(papers.ADARANKGRAD),
        "faults": faults.table(),
        "faults_reasons": faults.reasons(),
    }


def write(folder: Path) -> None:
    """Write all tables and plots, but leave those alone that have not changed."""
    folder.mkdir(exist_ok=True)
    for name, text in _texts().items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    for plot in (memory.bars(), memory.ranks(), losses.plot()):
        plot.save(folder)
