"""SET: drop the smallest weights, grow at random.

Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity
inspired by network science", Nature Communications 2018, on RigL's schedule as in Evci et al. 2020.
"""

from __future__ import annotations

from sparsekern.methods.base import Method
from sparsekern.methods.sources import Random


class SET(Method):
    """Train with SET; arguments as in `Method`.

    It needs no dense gradient, and takes the weight step of an update's batch before it changes the
    topology, as the RigL authors' code does for SET.
    """

    source = Random
    default_step_on_update = True
