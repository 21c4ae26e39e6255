"""Pallas kernels of whole update passes, and what chooses between them and XLA."""
