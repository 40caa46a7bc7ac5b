"""Sparse training methods, each on top of schedule, score, update and carry."""

from sparsekern.methods.base import LayerChange, Method, UpdateRecord
from sparsekern.methods.rigl import RigL
from sparsekern.methods.schedule import UpdateSchedule
from sparsekern.methods.set import SET
from sparsekern.methods.static import Static
from sparsekern.methods.update import TopologyUpdate

METHODS: dict[str, type[Method]] = {"static": Static, "set": SET, "rigl": RigL}
"""Methods by the name the command line uses."""

__all__ = [
    "METHODS",
    "SET",
    "LayerChange",
    "Method",
    "RigL",
    "Static",
    "TopologyUpdate",
    "UpdateRecord",
    "UpdateSchedule",
]
