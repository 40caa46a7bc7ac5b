"""Sparse training methods, each on top of schedule, source, budget, update and carry."""

from sparsekern.methods.base import Method
from sparsekern.methods.change import LayerChange, UpdateRecord
from sparsekern.methods.deepr import DeepR
from sparsekern.methods.dsr import DSR
from sparsekern.methods.granet import GraNet
from sparsekern.methods.momentum import Momentum, OptimizerMomentum
from sparsekern.methods.redistribution import RigLSG, RigLSM
from sparsekern.methods.rigl import RigL
from sparsekern.methods.schedule import CubicSchedule, UpdateSchedule
from sparsekern.methods.set import SET
from sparsekern.methods.snfs import SNFS
from sparsekern.methods.source import Source
from sparsekern.methods.sources import Gradient, Random
from sparsekern.methods.srigl import SRigL
from sparsekern.methods.static import Static
from sparsekern.methods.top_kast import TopKAST
from sparsekern.methods.update import TopologyUpdate

METHODS: dict[str, type[Method]] = {
    "static": Static,
    "set": SET,
    "rigl": RigL,
    "srigl": SRigL,
    "deepr": DeepR,
    "top-kast": TopKAST,
    "snfs": SNFS,
    "rigl-sg": RigLSG,
    "rigl-sm": RigLSM,
    "dsr": DSR,
    "granet": GraNet,
}
"""Methods by the name the command line uses."""

__all__ = [
    "DSR",
    "METHODS",
    "SET",
    "SNFS",
    "CubicSchedule",
    "DeepR",
    "GraNet",
    "Gradient",
    "LayerChange",
    "Method",
    "Momentum",
    "OptimizerMomentum",
    "Random",
    "RigL",
    "RigLSG",
    "RigLSM",
    "SRigL",
    "Source",
    "Static",
    "TopKAST",
    "TopologyUpdate",
    "UpdateRecord",
    "UpdateSchedule",
]
