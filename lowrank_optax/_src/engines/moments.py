"""Which moments of an optimizer are compressed: all that are known, or as named."""

from collections.abc import Callable, Mapping
from typing import get_args

from lowrank_optax._src.leaves.fields import Layout, field_name
from lowrank_optax._src.leaves.roles import Role
from lowrank_optax._src.leaves.told import warn_of_unknown
from lowrank_optax._src.parts.laws import Codec

# From the fields to the codecs of some, by name; and whether state is being created.
Choose = Callable[[Layout, bool], Mapping[str, Codec]]

# Names of the fields to compress, or their roles, or None for all known moments.
Fields = Mapping[str, Role] | tuple[str, ...] | None


def by_moment(first: Codec, second: Codec, fields: Fields) -> Choose:
    """A choice for `compress_fields`: one codec for first, one for second moments."""
    given = fields if isinstance(fields, Mapping) else {}
    for name, role in given.items():
        if role not in get_args(Role):
            raise ValueError(
                f"`fields` must map names to 'first' or 'second', got {role!r} for "
                f"'{name}'."
            )

    def choose(layout, creating):
        roles = {}
        for name in layout.names:
            if fields is None or name in fields or field_name(name) in fields:
                own = given.get(field_name(name), layout.role(name))
                roles[name] = given.get(name, own)
        unknown = [name for name, role in roles.items() if role is None]
        if unknown and fields is not None:
            raise ValueError(
                f"Cannot compress the state field '{unknown[0]}': nothing tells "
                "whether it has signs. Name its role: "
                f"fields={{'{field_name(unknown[0])}': 'first'}} if it has, 'second' "
                "if it is never negative."
            )
        if len(unknown) == len(roles):
            raise ValueError(
                "Cannot compress the momentum of an optimizer without any: its state "
                f"has the fields {', '.join(layout.names)}. Name some of them in "
                "`fields`."
            )
        if creating:
            warn_of_unknown([name for name in unknown if layout.is_foreign(name)])
        codecs = {"first": first, "second": second}
        return {name: codecs[role] for name, role in roles.items() if role}

    return choose
