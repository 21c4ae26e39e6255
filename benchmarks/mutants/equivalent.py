"""Mutants that survive because they compute the same, each with the reason."""

# By the mutant's id.
EQUIVALENT: dict[str, str] = {
    "476f61eb2c6e": "what is added is zero all the same, and is still waited for",
    "953e6fc97103": "only the names of the fields are asked for, of any matrix",
    "de6181addea1": "all operands of a pass are stacks of as many matrices",
    "ede61ba1f976": "how many stages Triton overlaps changes no number",
    "5e3184bfaa8a": "of a leaf more than there are nothing is asked",
    "cb813e766344": "slabs of rows of one number are half as high, and give the same",
    "a21ed438363d": "where phi is zero, the condition around it takes zero instead",
}
