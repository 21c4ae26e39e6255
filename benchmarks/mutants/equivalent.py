"""Mutants that survive because they compute the same, each with the reason."""

# By the mutant's id.
EQUIVALENT: dict[str, str] = {
    "476f61eb2c6e": "what is added is zero all the same, and is still waited for",
    "953e6fc97103": "only the names of the fields are asked for, of any matrix",
    "de6181addea1": "all operands of a pass are stacks of as many matrices",
    "ede61ba1f976": "how many stages Triton overlaps changes no number",
    "5e3184bfaa8a": "of a leaf more than there are nothing is asked",
    "cb813e766344": "slabs of rows of one number are half as high, and give the same",
    "d61acaae3298": "a path stands twice among those that it is in",
    "8df5788bfcee": "a renewal replaces it before it is looked at",
    "d58c4ff3097e": "the fixed numbers are moved by a hundred-millionth of their range",
    "94955681e06f": "the second operand is a stack of as many matrices, too",
    "6e89e6e3a3a9": "the axis has one entry, to which an index beyond it is cut",
    "001ca87615e9": "the axis has one entry, to which an index beyond it is cut",
    "d7e4960c5228": "where p is zero, the condition around it takes zero instead",
    "2f905f40fd39": "where the whole is zero, the condition around it takes zero",
    "0821639e4574": "sketch and factors end at both sizes all the same",
    "2d8b9f7a906f": "slices end where the vectors do",
    "ff1ea3c7c8f2": "leaves that meet are one group in the end, whose number counts",
    "a21ed438363d": "where phi is zero, the condition around it takes zero instead",
}
