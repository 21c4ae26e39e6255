"""How much was tried beside the contract, from the records."""

from tables.records import record, rows


def table() -> str:
    """What was tried, how often, and with which command."""
    lines = [_faults(), _soak(), _mutants()]
    return rows(("what", "tried", "command"), lines, figures=False)


def _faults() -> tuple[str, str, str]:
    found = record("faults")["figures"]
    cells = [x for own in found.values() for x in own.values()]
    own = [y for k, y in found.items() if not k.startswith("optax.")]
    spoiled = sum(x["spoiled"] > 0 for y in own for x in y.values())
    tried = (
        f"{len(found)} optimizers, {len(cells)} cells of four moments of a run each; "
        f"{spoiled} that are not Optax's ended with a state that is not finite"
    )
    return "bad gradients", tried, "`python -m benchmarks.faults`"


def _soak() -> tuple[str, str, str]:
    found = record("soak")["figures"].values()
    steps = sum(x["steps"] for x in found)
    trouble = sum(not (x["finite"] and x["counted"]) for x in found)
    tried = f"{len(found)} optimizers, {steps:,} steps in all; {trouble} with trouble"
    return "long runs", tried, "`python -m benchmarks.soak`"


def _mutants() -> tuple[str, str, str]:
    found = record("mutants")["figures"]
    x, tried = found["all"], sum(found["all"].values())
    counted = tried - x["equivalent"]
    return (
        "wrong expressions in the package, of which a test must fail",
        f"{tried} of {found['possible']:,} that a script can make; of {counted} that "
        f"change anything, {x['killed']} were found in time",
        "`python -m benchmarks.mutants`",
    )
