"""What a new topology of a layer changes: its arrays, values, optimizer state and averages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern.carry.optimizer_state import StateEntry, moving_state
from sparsekern.carry.transaction import Attribute, Call, Copy, Data, Item, Write
from sparsekern.errors import ShapeError
from sparsekern.nn import SparseLayer
from sparsekern.nn.lineage import Era
from sparsekern.topology import ARRAY_NAMES, Topology


def rewired(
    name: str,
    layer: SparseLayer,
    topology: Topology,
    source: Tensor,
    *,
    values: Tensor | None = None,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    twins: Sequence[SparseLayer] = (),
) -> list[Write]:
    """What is to be written for a layer to have another topology; all of it is computed here.

    With as many blocks as before everything is overwritten in place; with more or fewer the
    parameter and the buffers get other memory.

    Args:
        name: of the layer, for messages.
        layer: to be changed.
        topology: of the same shape and block.
        source: (nnzb,) int64, where each new block stood in CSR order; -1 for a new one.
        values: of the new blocks, in CSR order; None for zeros.
        optimizers: whose state follows.
        twins: layers of averages with the same topology; new blocks are 0 there.

    Raises:
        OptimizerError: a state can't follow.
        ShapeError: the topology is of another matrix.
        TopologyError: the layer has no valid topology as it is.
    """
    if topology.layout != layer._held().layout:
        raise ShapeError(
            f"the new topology of layer {name!r} must have (rows, cols, bh, bw, groups, taps) "
            f"{layer._held().layout}; got {topology.layout}"
        )
    topology.known()  # validated before anything changes, and so are the buffers as they are
    resized = topology.nnzb != layer.topology.nnzb
    entries = moving_state(optimizers, name, layer.values)
    era, fresh = Era(), layer.fresh_slots(topology, source)
    moved = layer.moved(layer.values.detach(), source, fresh, topology, values)
    writes = [_values(layer, moved, resized), Attribute(layer.values, "grad", None)]
    for entry in entries:
        start, blocks = entry.start, None
        if start == "values":
            start, blocks = 0.0, values
        new = layer.moved(entry.tensor, source, fresh, topology, blocks, float(start))
        writes.append(_state(entry, new, resized and layer.dense_mask is None))
    writes += _arrays(layer, topology, resized, era)
    for twin in twins:
        there = twin.values.device
        moved_topology, from_where = topology.to(there), source.to(there)
        fresh = twin.fresh_slots(moved_topology, from_where)
        moved = twin.moved(twin.values.detach(), from_where, fresh, moved_topology)
        writes.append(_values(twin, moved, resized))
        writes += _arrays(twin, moved_topology, resized, era)
    return writes


def _values(layer: SparseLayer, new: Tensor, resized: bool) -> Write:
    if resized and layer.dense_mask is None:
        return Data(layer.values, new)
    return Copy(layer.values, new)


def _state(entry: StateEntry, new: Tensor, resized: bool) -> Write:
    return Item(entry.state, entry.key, new) if resized else Copy(entry.tensor, new)


def _arrays(layer: SparseLayer, topology: Topology, resized: bool, era: Era) -> list[Write]:
    writes: list[Write] = []
    for name, array in zip(ARRAY_NAMES, topology.arrays, strict=True):
        if resized:  # a copy: the topology may be another layer's
            writes.append(Attribute(layer, name, array.clone()))
        else:
            writes.append(Copy(getattr(layer, name), array))
    if layer.dense_mask is not None:
        writes.append(Copy(layer.dense_mask, topology.to_mask()))
    return [*writes, Call(layer._trust), *_new_era(layer, era)]


def _new_era(layer: SparseLayer, era: Era) -> list[Write]:
    return [Attribute(layer, "_era", era), Attribute(layer, "_left", None)]
