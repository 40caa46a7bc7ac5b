"""One topology update of all layers: what was decided, and its making."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.carry.averages import in_step
from sparsekern.carry.optimizer_state import state_tensors
from sparsekern.methods.update import TopologyUpdate
from sparsekern.nn import SparseLayer
from sparsekern.ops.ranges import ranged


class LayerChange(NamedTuple):
    """One layer's part in a topology update, in blocks.

    Attributes:
        dropped: dropped, those grown again at once included.
        grown: those that were not active before.
    """

    dropped: int
    grown: int


class UpdateRecord(NamedTuple):
    """What one topology update did, and at which weight step."""

    step: int
    fraction: float
    layers: dict[str, LayerChange]


class Decision(NamedTuple):
    """What is to happen to one layer.

    Attributes:
        update: the new topology, and where its blocks come from.
        dropped: how many blocks are dropped.
        values: (update.grown, bh, bw) of the new blocks, in CSR order; None for zeros.
    """

    update: TopologyUpdate
    dropped: int
    values: Tensor | None


def change(
    layers: Mapping[str, SparseLayer],
    decisions: Mapping[str, Decision],
    optimizer: torch.optim.Optimizer,
    twins: Mapping[str, Sequence[SparseLayer]],
) -> dict[str, LayerChange]:
    """Rewire the layers in place; values, optimizer state and averages follow their weights.

    Raises:
        OptimizerError: a state can't follow; nothing has changed then.
    """
    states = {n: state_tensors(optimizer, n, layers[n].values) for n in decisions}
    for name, (update, _, values) in decisions.items():
        layer = layers[name]
        with ranged("rewire", name):
            layer.rewire_(update.topology, update.source, [layer.values.data, *states[name]])
            for twin in twins.get(name, ()):
                there = twin.values.device
                topology, source = update.topology.to(there), update.source.to(there)
                twin.rewire_(topology, source, [twin.values.data])
        if values is not None:
            blocks = layer.active_values().clone()
            blocks[update.source < 0] = values.to(blocks)
            layer.set_active_values(blocks)
        layer.values.grad = None  # it belongs to the old positions
    in_step(layers, twins)
    return {name: LayerChange(d.dropped, d.update.grown) for name, d in decisions.items()}
