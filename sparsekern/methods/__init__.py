"""Sparse training methods, each on top of schedule, source, budget, update and carry."""

from sparsekern.methods.base import Method
from sparsekern.methods.change import LayerChange, UpdateRecord
from sparsekern.methods.deepr import DeepR
from sparsekern.methods.rigl import RigL
from sparsekern.methods.schedule import UpdateSchedule
from sparsekern.methods.set import SET
from sparsekern.methods.sources import Gradient, Random, Source
from sparsekern.methods.srigl import SRigL
from sparsekern.methods.static import Static
from sparsekern.methods.update import TopologyUpdate

METHODS: dict[str, type[Method]] = {
    "static": Static,
    "set": SET,
    "rigl": RigL,
    "srigl": SRigL,
    "deepr": DeepR,
}
"""Methods by the name the command line uses."""

__all__ = [
    "METHODS",
    "SET",
    "DeepR",
    "Gradient",
    "LayerChange",
    "Method",
    "Random",
    "RigL",
    "SRigL",
    "Source",
    "Static",
    "TopologyUpdate",
    "UpdateRecord",
    "UpdateSchedule",
]
