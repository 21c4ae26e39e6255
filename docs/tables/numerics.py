"""How far updates are from those in float64, from the record."""

from tables.records import named, record, rows


def table() -> str:
    """A line for each optimizer, with kernels where there are some."""
    found = record("numerics")["figures"]
    columns = [(kind, c) for kind, x in next(iter(found.values())).items() for c in x]
    head = ("", *(f"{kind}, {float(c):,.0f}" for kind, c in columns))
    lines = (
        (
            named(name.removesuffix(", XLA")),
            *(f"{own[kind][c]:.0e}" for kind, c in columns),
        )
        for name, own in found.items()
    )
    return rows(head, lines, figures=True)
