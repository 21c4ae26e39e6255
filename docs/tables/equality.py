"""How far steps on a mesh are from those of one device, from the record."""

from tables.records import named, record, rows


def table() -> str:
    """Of each optimizer: its rounding floor, and the largest errors of the meshes."""
    lines = [
        (
            named(name),
            f"{x['floor']:.0e}",
            f"{max(x['errors'].values()):.0e}",
            f"{x['state_bytes_of_8'] / x['state_bytes']:.1%}",
        )
        for name, x in record("equality")["figures"].items()
    ]
    head = ("", "of one device, last bits changed", "of a mesh", "state on one of 8")
    return rows(head, lines, figures=True) + "\n"
