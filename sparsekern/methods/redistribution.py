"""RigL with redistribution: growth goes to the layers whose active weights move most.

Sundar & Dwaraknath, "Reproducibility study: comparing RigL to state-of-the-art", 2021 (RigL-SG and
RigL-SM): the budget of SNFS, with statistics of active weights, so nothing dense is kept.
"""

from __future__ import annotations

from sparsekern.methods.budget import proportional
from sparsekern.methods.momentum import OptimizerMomentum
from sparsekern.methods.rigl import RigL


class RigLSG(RigL):
    """RigL whose layers grow in proportion to their mean |gradient| over active weights.

    Arguments as in `Method`. Layers change their size, so no wrapper may count on it; the model
    keeps its own.
    """

    budget = proportional
    resizes = True


class RigLSM(RigLSG):
    """RigL whose layers grow in proportion to the optimizer's mean |momentum| over active weights.

    Arguments as in `Method`. Before the first step there is none, and layers keep their size.
    """

    source = OptimizerMomentum
