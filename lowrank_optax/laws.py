"""What parts may say of themselves, and the types that their methods meet.

For parts of one's own. Names in capitals are properties, for the attributes
``requires``, ``lacks`` and ``provides``, tuples of them: what a part needs of those
beside it, what it has not although others of its kind have, and what none beside it
need have. Parts that do not go together are refused, at the latest by ``init``.

>>> import dataclasses, jax.numpy as jnp, optax, lowrank_optax as lro
>>> @dataclasses.dataclass(frozen=True)
... class FirstColumns:
...     lacks = (lro.laws.ORTHONORMAL,)
...
...     def select(self, key, grad, old, step):
...         return grad[..., : old.shape[-1]]
>>> tx = lro.project_gradients(
...     optax.scale_by_adam(), rank=2, subspace=FirstColumns(), transfer=lro.Rotate()
... )
>>> try:
...     tx.init({"w": jnp.ones((4, 6))})
... except ValueError as error:
...     print(str(error).partition(":")[0])
Cannot use Rotate with FirstColumns
"""

from lowrank_optax._src.linalg.products import Lying as Lying
from lowrank_optax._src.parts.compatible import ALIGNED as ALIGNED
from lowrank_optax._src.parts.compatible import ALL_SIZES as ALL_SIZES
from lowrank_optax._src.parts.compatible import CHOSEN as CHOSEN
from lowrank_optax._src.parts.compatible import COEFFICIENTS as COEFFICIENTS
from lowrank_optax._src.parts.compatible import INDEPENDENT as INDEPENDENT
from lowrank_optax._src.parts.compatible import NAMED_SIDE as NAMED_SIDE
from lowrank_optax._src.parts.compatible import NONNEGATIVE as NONNEGATIVE
from lowrank_optax._src.parts.compatible import ORTHONORMAL as ORTHONORMAL
from lowrank_optax._src.parts.compatible import SIGNS as SIGNS
from lowrank_optax._src.parts.laws import Observer as Observer
from lowrank_optax._src.parts.laws import Seen as Seen
from lowrank_optax._src.parts.laws import StagedRule as StagedRule

__all__ = [
    "ALIGNED",
    "ALL_SIZES",
    "CHOSEN",
    "COEFFICIENTS",
    "INDEPENDENT",
    "NAMED_SIDE",
    "NONNEGATIVE",
    "ORTHONORMAL",
    "SIGNS",
    "Lying",
    "Observer",
    "Seen",
    "StagedRule",
]
