"""One topology update of all layers: what was decided, and its making."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.carry.optimizer_state import state_tensors
from sparsekern.carry.wrappers import unwrapped
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
    optimizers: Sequence[torch.optim.Optimizer],
) -> dict[str, LayerChange]:
    """Rewire the layers in place; values and optimizer state follow their weights.

    Raises:
        OptimizerError: a state can't follow; nothing has changed then.
    """
    chain = [inner for optimizer in optimizers for inner in unwrapped(optimizer)]
    states = {}
    for name in decisions:
        found = [t for o in chain for t in state_tensors(o, name, layers[name].values)]
        states[name] = list({id(t): t for t in found}.values())  # a wrapper may show another's
    for name, (update, _, values) in decisions.items():
        layer = layers[name]
        with ranged("rewire", name):
            layer.rewire_(update.topology, update.source, [layer.values.data, *states[name]])
        if values is not None:
            blocks = layer.active_values().clone()
            blocks[update.source < 0] = values.to(blocks)
            layer.set_active_values(blocks)
        layer.values.grad = None  # it belongs to the old positions
    return {name: LayerChange(d.dropped, d.update.grown) for name, d in decisions.items()}
