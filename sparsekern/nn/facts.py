"""What connections do to a layer: which neurons are left, and how they share the inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.nn.init import fan_in
from sparsekern.topology import Topology


class TopologyFacts(NamedTuple):
    """Neurons and connections of one topology.

    A block connects all outputs in it with all inputs in it. Outputs and inputs of a convolution
    are channels; an input is live if any kernel position reads it.

    Attributes:
        outputs: of the layer.
        live_outputs: those with a connection.
        inputs: of the layer.
        live_inputs: those with a connection.
        fan_in_median: connections of an output, dead ones among them; of two in the middle the
            lower.
        fan_in_max: most connections of an output.
    """

    outputs: int
    live_outputs: int
    inputs: int
    live_inputs: int
    fan_in_median: int
    fan_in_max: int


def facts_of(topologies: Iterable[Topology]) -> list[TopologyFacts]:
    """The facts of several topologies, with one read from their device for all of them."""
    known = list(topologies)
    if not known:
        return []
    figures = [_figures(topology) for topology in known]
    read = torch.stack([f.to(figures[0].device) for f in figures]).tolist()
    made = []
    for topology, (live_outputs, live_inputs, median, most) in zip(known, read, strict=True):
        inputs = topology.grid.part[1] * topology.groups
        made.append(
            TopologyFacts(topology.shape[0], live_outputs, inputs, live_inputs, median, most)
        )
    return made


def _figures(topology: Topology) -> Tensor:
    """(4,) int64 on the device: live outputs, live inputs, median and largest fan-in."""
    counts = fan_in(topology).long()
    return torch.stack([(counts > 0).sum(), _live_inputs(topology), counts.median(), counts.max()])


def _live_inputs(topology: Topology) -> Tensor:
    grid = topology.grid
    across = grid.part_blocks[1]
    read = topology.ccol.diff() > 0
    blocks = read.view(topology.groups, topology.taps, across).any(1)
    columns = blocks.repeat_interleave(grid.block[1], 1)[:, : grid.part[1]]
    return columns.sum()
