"""Leaves of parameter trees: which are matrices, and where their state stands."""
