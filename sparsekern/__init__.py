"""sparsekern trains neural networks whose weights are sparse in memory.

import sparsekern as sk

sk.sparsify_(model, sparsity=0.9, block=32)
optimizer = torch.optim.AdamW(model.parameters())
sk.RigL(model, optimizer, t_end=int(0.75 * steps))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsekern import methods, ops, tickets
from sparsekern.checkpoint import SavedLayer, load, save
from sparsekern.errors import (
    AverageError,
    CheckpointError,
    ConfigError,
    DataError,
    DeviceError,
    DtypeError,
    IncompleteError,
    MeasurementError,
    ModelError,
    OptimizerError,
    RankMismatchError,
    ShapeError,
    SparseKernError,
    TopologyError,
    TrainingLoopError,
    UnavailableError,
    WeightError,
)
from sparsekern.methods import (
    DSR,
    SET,
    SNFS,
    DeepR,
    GraNet,
    Method,
    RigL,
    RigLSG,
    RigLSM,
    SRigL,
    Static,
    TopKAST,
)
from sparsekern.nn import (
    SparseConv1d,
    SparseConv2d,
    SparseGRU,
    SparseGRUCell,
    SparseLinear,
    SparseLSTM,
    SparseLSTMCell,
    SparseMultiheadAttention,
    SparseRNN,
    SparseRNNCell,
)
from sparsekern.planning import Budget, Plan, plan
from sparsekern.profiling import Report, profile
from sparsekern.swap import (
    Summary,
    densify_,
    sparse_layers,
    sparsify_,
    summary,
    topology_facts,
)
from sparsekern.tickets import Pruning
from sparsekern.topology import Topology

if TYPE_CHECKING:
    from sparsekern.study import diagnose

__version__ = "0.1.0"

__all__ = [
    "DSR",
    "SET",
    "SNFS",
    "AverageError",
    "Budget",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeepR",
    "DeviceError",
    "DtypeError",
    "GraNet",
    "IncompleteError",
    "MeasurementError",
    "Method",
    "ModelError",
    "OptimizerError",
    "Plan",
    "Pruning",
    "RankMismatchError",
    "Report",
    "RigL",
    "RigLSG",
    "RigLSM",
    "SRigL",
    "SavedLayer",
    "ShapeError",
    "SparseConv1d",
    "SparseConv2d",
    "SparseGRU",
    "SparseGRUCell",
    "SparseKernError",
    "SparseLSTM",
    "SparseLSTMCell",
    "SparseLinear",
    "SparseMultiheadAttention",
    "SparseRNN",
    "SparseRNNCell",
    "Static",
    "Summary",
    "TopKAST",
    "Topology",
    "TopologyError",
    "TrainingLoopError",
    "UnavailableError",
    "WeightError",
    "densify_",
    "diagnose",
    "load",
    "methods",
    "ops",
    "plan",
    "profile",
    "save",
    "sparse_layers",
    "sparsify_",
    "summary",
    "tickets",
    "topology_facts",
]


def __getattr__(name: str) -> Any:
    """What is loaded when it is first used."""
    if name == "diagnose":
        return import_module("sparsekern.study").diagnose
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
