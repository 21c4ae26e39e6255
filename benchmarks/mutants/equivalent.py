"""Mutants that survive because they compute the same, each with the reason."""

# By the mutant's id.
EQUIVALENT: dict[str, str] = {}
