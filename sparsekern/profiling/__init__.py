"""What a training step of a model costs: FLOPs, bytes and time by layer, predicted and measured."""

from sparsekern.cost.methods import MethodCost, PruningSchedule, method_costs
from sparsekern.profiling.measure import Measured
from sparsekern.profiling.profiler import profile
from sparsekern.profiling.report import Report
from sparsekern.profiling.rows import LayerRow

__all__ = [
    "LayerRow",
    "Measured",
    "MethodCost",
    "PruningSchedule",
    "Report",
    "method_costs",
    "profile",
]
