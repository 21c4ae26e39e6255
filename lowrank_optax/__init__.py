"""Low-rank, memory-efficient optimization for JAX and Optax.

Engines (`project_gradients`, `compress_state`, `leafwise`), the parts that they take,
methods without a learning rate, and whole optimizers. Please do not use names from
`lowrank_optax._src`.
"""

from lowrank_optax import adapters as adapters
from lowrank_optax import diagnostics as diagnostics
from lowrank_optax import kernels as kernels
from lowrank_optax import laws as laws
from lowrank_optax import layerwise as layerwise
from lowrank_optax import linalg as linalg
from lowrank_optax import rank as rank
from lowrank_optax._src.engines.accumulation import AccumulateState as AccumulateState
from lowrank_optax._src.engines.compress import CompressState as CompressState
from lowrank_optax._src.engines.compress import compress_state as compress_state
from lowrank_optax._src.engines.project import project_gradients as project_gradients
from lowrank_optax._src.engines.project_state import ProjectState as ProjectState
from lowrank_optax._src.engines.rules import leafwise as leafwise
from lowrank_optax._src.leaves.default import default_matrices as default_matrices
from lowrank_optax._src.leaves.matrix import MatrixAxes as MatrixAxes
from lowrank_optax._src.leaves.matrix import MatrixView as MatrixView
from lowrank_optax._src.leaves.placing import split_states as split_states
from lowrank_optax._src.leaves.specs import matrix_rules as matrix_rules
from lowrank_optax._src.methods.adafactor import galore_adafactor as galore_adafactor
from lowrank_optax._src.methods.adafactor import (
    scale_by_adafactor as scale_by_adafactor,
)
from lowrank_optax._src.methods.adam_mini import adam_mini as adam_mini
from lowrank_optax._src.methods.adam_mini import galore_adam_mini as galore_adam_mini
from lowrank_optax._src.methods.adam_mini import (
    scale_by_adam_mini as scale_by_adam_mini,
)
from lowrank_optax._src.methods.adarankgrad import adaptive_rank as adaptive_rank
from lowrank_optax._src.methods.adarankgrad import (
    adarankgrad_adamw as adarankgrad_adamw,
)
from lowrank_optax._src.methods.apollo import apollo_adamw as apollo_adamw
from lowrank_optax._src.methods.apollo import apollo_scale as apollo_scale
from lowrank_optax._src.methods.fira import fira_adamw as fira_adamw
from lowrank_optax._src.methods.fira import fira_project as fira_project
from lowrank_optax._src.methods.flora import flora as flora
from lowrank_optax._src.methods.flora import flora_project as flora_project
from lowrank_optax._src.methods.galore import galore_adamw as galore_adamw
from lowrank_optax._src.methods.galore import galore_project as galore_project
from lowrank_optax._src.methods.galore_plus import (
    galore_plus_adamw as galore_plus_adamw,
)
from lowrank_optax._src.methods.galore_plus import (
    galore_plus_project as galore_plus_project,
)
from lowrank_optax._src.methods.golore import golore_adamw as golore_adamw
from lowrank_optax._src.methods.golore import golore_project as golore_project
from lowrank_optax._src.methods.i3s import hybrid_subspace as hybrid_subspace
from lowrank_optax._src.methods.i3s import i3s_adamw as i3s_adamw
from lowrank_optax._src.methods.i3s import i3s_subspace as i3s_subspace
from lowrank_optax._src.methods.ldadam import ldadamw as ldadamw
from lowrank_optax._src.methods.ldadam import scale_by_ldadam as scale_by_ldadam
from lowrank_optax._src.methods.mlorc import mlorc_adamw as mlorc_adamw
from lowrank_optax._src.methods.mlorc import mlorc_compress as mlorc_compress
from lowrank_optax._src.methods.mlorc import mlorc_lion as mlorc_lion
from lowrank_optax._src.methods.mlorc import mlorc_scale_by_adam as mlorc_scale_by_adam
from lowrank_optax._src.methods.mlorc import mlorc_scale_by_lion as mlorc_scale_by_lion
from lowrank_optax._src.methods.q_galore import (
    q_galore_adamw_8bit as q_galore_adamw_8bit,
)
from lowrank_optax._src.methods.q_galore import q_galore_project as q_galore_project
from lowrank_optax._src.methods.quantize import adamw_8bit as adamw_8bit
from lowrank_optax._src.methods.quantize import (
    adarankgrad_adamw_8bit as adarankgrad_adamw_8bit,
)
from lowrank_optax._src.methods.quantize import galore_adamw_8bit as galore_adamw_8bit
from lowrank_optax._src.methods.quantize import quantize_state as quantize_state
from lowrank_optax._src.parts.codec import BlockInt8 as BlockInt8
from lowrank_optax._src.parts.codec import Cast as Cast
from lowrank_optax._src.parts.codec import PackedInt4 as PackedInt4
from lowrank_optax._src.parts.laws import Codec as Codec
from lowrank_optax._src.parts.laws import Recovery as Recovery
from lowrank_optax._src.parts.laws import Refresh as Refresh
from lowrank_optax._src.parts.laws import Rule as Rule
from lowrank_optax._src.parts.laws import Subspace as Subspace
from lowrank_optax._src.parts.laws import Transfer as Transfer
from lowrank_optax._src.parts.low_rank import LowRank as LowRank
from lowrank_optax._src.parts.recovery import Drop as Drop
from lowrank_optax._src.parts.recovery import FiraResidual as FiraResidual
from lowrank_optax._src.parts.recovery import ScaleGradient as ScaleGradient
from lowrank_optax._src.parts.recovery import SparseResidual as SparseResidual
from lowrank_optax._src.parts.refresh import Every as Every
from lowrank_optax._src.parts.refresh import OnConvergence as OnConvergence
from lowrank_optax._src.parts.refresh import Staggered as Staggered
from lowrank_optax._src.parts.refresh import WhenDrifted as WhenDrifted
from lowrank_optax._src.parts.subspace import CrossHead as CrossHead
from lowrank_optax._src.parts.subspace import EnergyRank as EnergyRank
from lowrank_optax._src.parts.subspace import Hybrid as Hybrid
from lowrank_optax._src.parts.subspace import ImportanceSampled as ImportanceSampled
from lowrank_optax._src.parts.subspace import RandomGaussian as RandomGaussian
from lowrank_optax._src.parts.subspace import RandomOrthonormal as RandomOrthonormal
from lowrank_optax._src.parts.subspace import Switch as Switch
from lowrank_optax._src.parts.subspace import TopSingular as TopSingular
from lowrank_optax._src.parts.subspace import UniformSampled as UniformSampled
from lowrank_optax._src.parts.transfer import Keep as Keep
from lowrank_optax._src.parts.transfer import Reset as Reset
from lowrank_optax._src.parts.transfer import Rotate as Rotate
from lowrank_optax._src.parts.transfer import RotateFirst as RotateFirst
from lowrank_optax._src.report.compare import check_state as check_state
from lowrank_optax._src.report.memory import describe as describe
from lowrank_optax._src.report.memory import memory_report as memory_report
from lowrank_optax._src.report.memory import state_bytes as state_bytes
from lowrank_optax._src.report.sharding import state_shardings as state_shardings
from lowrank_optax._src.training.accumulate import (
    accumulate_gradients as accumulate_gradients,
)
from lowrank_optax._src.training.average import average_gradients as average_gradients
from lowrank_optax._src.training.convert import convert_state as convert_state
from lowrank_optax._src.training.inject import inject_hyperparams as inject_hyperparams
from lowrank_optax._src.training.two_rates import two_rates as two_rates

__version__ = "0.1.0"

__all__ = [
    "AccumulateState",
    "BlockInt8",
    "Cast",
    "Codec",
    "CompressState",
    "CrossHead",
    "Drop",
    "EnergyRank",
    "Every",
    "FiraResidual",
    "Hybrid",
    "ImportanceSampled",
    "Keep",
    "LowRank",
    "MatrixAxes",
    "MatrixView",
    "OnConvergence",
    "PackedInt4",
    "ProjectState",
    "RandomGaussian",
    "RandomOrthonormal",
    "Recovery",
    "Refresh",
    "Reset",
    "Rotate",
    "RotateFirst",
    "Rule",
    "ScaleGradient",
    "SparseResidual",
    "Staggered",
    "Subspace",
    "Switch",
    "TopSingular",
    "Transfer",
    "UniformSampled",
    "WhenDrifted",
    "accumulate_gradients",
    "adam_mini",
    "adamw_8bit",
    "adapters",
    "adaptive_rank",
    "adarankgrad_adamw",
    "adarankgrad_adamw_8bit",
    "apollo_adamw",
    "apollo_scale",
    "average_gradients",
    "check_state",
    "compress_state",
    "convert_state",
    "default_matrices",
    "describe",
    "diagnostics",
    "fira_adamw",
    "fira_project",
    "flora",
    "flora_project",
    "galore_adafactor",
    "galore_adam_mini",
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_plus_adamw",
    "galore_plus_project",
    "galore_project",
    "golore_adamw",
    "golore_project",
    "hybrid_subspace",
    "i3s_adamw",
    "i3s_subspace",
    "inject_hyperparams",
    "kernels",
    "laws",
    "layerwise",
    "ldadamw",
    "leafwise",
    "linalg",
    "matrix_rules",
    "memory_report",
    "mlorc_adamw",
    "mlorc_compress",
    "mlorc_lion",
    "mlorc_scale_by_adam",
    "mlorc_scale_by_lion",
    "project_gradients",
    "q_galore_adamw_8bit",
    "q_galore_project",
    "quantize_state",
    "rank",
    "scale_by_adafactor",
    "scale_by_adam_mini",
    "scale_by_ldadam",
    "split_states",
    "state_bytes",
    "state_shardings",
    "two_rates",
]
