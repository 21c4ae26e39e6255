"""Training around transformations: accumulation, layers, hyperparameters."""
