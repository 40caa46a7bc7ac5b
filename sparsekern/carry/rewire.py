"""What a new topology of a layer changes: its arrays, values, optimizer state and averages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.carry.optimizer_state import StateEntry, moving_state
from sparsekern.carry.transaction import Attribute, Call, Copy, Data, Item, Write
from sparsekern.errors import ShapeError
from sparsekern.nn import SparseLayer
from sparsekern.nn.lineage import Era
from sparsekern.nn.sharded import is_sharded, local, part, trained, whole
from sparsekern.topology import ARRAY_NAMES, Topology


class Carried(NamedTuple):
    """What of a layer moves with its blocks.

    Attributes:
        name: of the layer, for messages.
        layer: it.
        entries: optimizer state.
        twins: layers of averages with the same topology.
    """

    name: str
    layer: SparseLayer
    entries: list[StateEntry]
    twins: Sequence[SparseLayer]

    @property
    def sharded(self) -> bool:
        """Whether `whole` needs all ranks."""
        return any(map(is_sharded, self._tensors()))

    def whole(self) -> list[Tensor]:
        """Values, state and the values of averages, as they are; all ranks must call it."""
        return [whole(tensor.detach()) for tensor in self._tensors()]

    def _tensors(self) -> list[Tensor]:
        held = [entry.tensor for entry in self.entries]
        return [trained(self.layer), *held, *(trained(twin) for twin in self.twins)]


def carried(
    name: str,
    layer: SparseLayer,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    twins: Sequence[SparseLayer] = (),
) -> Carried:
    """What moves when a layer gets another topology.

    Raises:
        OptimizerError: a state can't follow.
    """
    return Carried(name, layer, moving_state(optimizers, name, trained(layer)), twins)


def rewired(
    moving: Carried,
    held: Sequence[Tensor],
    topology: Topology,
    source: Tensor,
    values: Tensor | None = None,
) -> list[Write]:
    """What is to be written for a layer to have another topology; all of it is computed here.

    With as many blocks as before everything is overwritten in place, of sharded tensors what this
    rank holds; with more or fewer the parameter and the buffers get other memory.

    Args:
        moving: what moves.
        held: `moving.whole()`.
        topology: of the same shape and block.
        source: (nnzb,) int64, where each new block stood in CSR order; -1 for a new one.
        values: of the new blocks, in CSR order; None for zeros. New blocks are 0 in averages.

    Raises:
        ShapeError: the topology is of another matrix.
        TopologyError: the layer has no valid topology as it is.
    """
    name, layer, entries, twins = moving
    if topology.layout != layer._held().layout:
        raise ShapeError(
            f"the new topology of layer {name!r} must have (rows, cols, bh, bw, groups, taps) "
            f"{layer._held().layout}; got {topology.layout}"
        )
    topology.known()  # validated before anything changes, and so are the buffers as they are
    resized, parameter = topology.nnzb != layer.topology.nnzb, trained(layer)
    era, fresh = Era(), layer.fresh_slots(topology, source)
    moved = layer.moved(held[0], source, fresh, topology, values)
    writes = [_values(layer, moved, resized), Attribute(parameter, "grad", None)]
    averages = held[1 + len(entries) :]
    for entry, tensor in zip(entries, held[1:], strict=False):
        start, blocks = entry.start, None
        if start == "values":
            start, blocks = 0.0, values
        new = layer.moved(tensor, source, fresh, topology, blocks, float(start))
        writes.append(_state(entry, new, resized and layer.dense_mask is None))
    writes += _arrays(layer, topology, resized, era)
    for twin, tensor in zip(twins, averages, strict=True):
        there = tensor.device
        moved_topology, from_where = topology.to(there), source.to(there)
        fresh = twin.fresh_slots(moved_topology, from_where)
        writes.append(_values(twin, twin.moved(tensor, from_where, fresh, moved_topology), resized))
        writes += _arrays(twin, moved_topology, resized, era)
    return writes


def _values(layer: SparseLayer, new: Tensor, resized: bool) -> Write:
    parameter = trained(layer)
    if resized and layer.dense_mask is None:
        return Data(parameter, new)
    return Copy(local(parameter), part(new, parameter))


def _state(entry: StateEntry, new: Tensor, resized: bool) -> Write:
    if resized:
        return Item(entry.state, entry.key, new)
    return Copy(local(entry.tensor), part(new, entry.tensor))


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
