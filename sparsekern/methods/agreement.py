"""What of a method's layers is equal on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparsekern.carry.optimizer_state import moving_state
from sparsekern.methods import ranks
from sparsekern.methods.source import Source
from sparsekern.nn import SparseLayer, sharded
from sparsekern.topology import Topology


def facts(
    name: str,
    layer: SparseLayer,
    topology: Topology,
    source: Source,
    optimizers: Sequence[torch.optim.Optimizer],
    joined: bool,
) -> dict[str, Any]:
    """What must be equal on all ranks, as digests that one changed bit changes.

    Args:
        name: of the layer.
        layer: as it is; of one that is sharded each rank holds something else.
        topology: that it has, or will have.
        source: what growth looks at.
        optimizers: state that only one rank holds is not compared.
        joined: this rank ran out of inputs, so its weights are those of an earlier step.
    """
    tensors = dict(source.facts(name))
    parameter = sharded.trained(layer)
    if not (joined or sharded.is_sharded(parameter)):
        state = moving_state(optimizers, name, parameter)
        tensors |= {"values": parameter} | {f"state {e.key!r}": e.tensor for e in state}
        if parameter.grad is not None and layer.is_reduced():
            tensors["gradient"] = parameter.grad
    sums = [ranks.checksum(tensor).to(layer.crow.device) for tensor in tensors.values()]
    found = torch.stack(sums).tolist() if sums else []
    return {"topology": topology.digest()} | dict(zip(tensors, found, strict=True))
