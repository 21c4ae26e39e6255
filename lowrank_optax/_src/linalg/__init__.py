"""Linear algebra on arrays: products, factorizations, random matrices."""

from lowrank_optax._src.linalg.factor import (
    cholesky_pass_each as cholesky_pass_each,
)
from lowrank_optax._src.linalg.factor import eigenvectors_each as eigenvectors_each
from lowrank_optax._src.linalg.factor import gram_eigh as gram_eigh
from lowrank_optax._src.linalg.factor import lifted as lifted
from lowrank_optax._src.linalg.factor import orthonormalize as orthonormalize
from lowrank_optax._src.linalg.factor import (
    orthonormalize_each as orthonormalize_each,
)
from lowrank_optax._src.linalg.factor import range_basis as range_basis
from lowrank_optax._src.linalg.factor import singular_factors as singular_factors
from lowrank_optax._src.linalg.factor import whitening as whitening
from lowrank_optax._src.linalg.lapack import eigh as eigh
from lowrank_optax._src.linalg.lapack import inverse_root as inverse_root
from lowrank_optax._src.linalg.lapack import one_by_one as one_by_one
from lowrank_optax._src.linalg.lapack import svd as svd
from lowrank_optax._src.linalg.products import Lying as Lying
from lowrank_optax._src.linalg.products import as_stored as as_stored
from lowrank_optax._src.linalg.products import at_least_float32 as at_least_float32
from lowrank_optax._src.linalg.products import gram as gram
from lowrank_optax._src.linalg.products import magnitude as magnitude
from lowrank_optax._src.linalg.products import matmul as matmul
from lowrank_optax._src.linalg.products import near_one as near_one
from lowrank_optax._src.linalg.products import power_of_two as power_of_two
from lowrank_optax._src.linalg.products import project as project
from lowrank_optax._src.linalg.products import sketch as sketch
from lowrank_optax._src.linalg.products import sums_from_end as sums_from_end
from lowrank_optax._src.linalg.products import unit_columns as unit_columns
from lowrank_optax._src.linalg.products import unit_scale as unit_scale
