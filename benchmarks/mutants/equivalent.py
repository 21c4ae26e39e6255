"""Mutants that survive because they compute the same, each with the reason."""

# By the mutant's id.
EQUIVALENT: dict[str, str] = {
    "476f61eb2c6e": "what is added is zero all the same, and is still waited for",
    "953e6fc97103": "only the names of the fields are asked for, of any matrix",
    "a21ed438363d": "where phi is zero, the condition around it takes zero instead",
}
