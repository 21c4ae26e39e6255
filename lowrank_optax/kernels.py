"""Update passes as Pallas kernels for GPU and TPU, and the choice of them.

>>> import lowrank_optax as lro
>>> with lro.kernels.dispatch("xla"):
...     ...  # what is traced here uses no kernel
Ellipsis
"""

from lowrank_optax._src.kernels.dispatch import dispatch as dispatch

__all__ = ["dispatch"]
