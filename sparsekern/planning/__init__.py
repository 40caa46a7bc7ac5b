"""Where sparsity pays in a model: times, memory and FLOPs of its layers, dense and sparse."""

from sparsekern.planning.planner import PlanInterrupted, plan
from sparsekern.planning.result import Budget, Plan

__all__ = ["Budget", "Plan", "PlanInterrupted", "plan"]
