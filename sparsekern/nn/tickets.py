"""Which weights of a dense layer to keep: by a given mask, or by magnitude."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekern.blocks import Block, active_count, check_sparsity
from sparsekern.errors import ShapeError, TopologyError
from sparsekern.ops import block_norm
from sparsekern.topology import Topology


def topology_of_mask(mask: Tensor, shape: Sequence[int], block: Block) -> Topology:
    """The topology of a ticket: a mask made of whole blocks.

    Raises:
        ShapeError: the mask has another shape than the weight.
        TopologyError: some block is active only in part.
    """
    if mask.shape != torch.Size(shape):
        raise ShapeError(
            f"`mask` must have the weight's shape {tuple(shape)}; got {tuple(mask.shape)}"
        )
    topology = Topology.from_mask(mask, block)
    partial = topology.nnz - int((mask != 0).sum())
    if partial:
        raise TopologyError(
            f"`mask` must be made of whole {topology.block} blocks; {partial} weights of its "
            "active blocks are masked out (block=1 takes any mask)"
        )
    return topology


def topology_of_largest(weight: Tensor, sparsity: float, block: Block) -> Topology:
    """The blocks with the largest summed magnitude that hold the asked number of weights.

    The count is exact to within one block; ties go to the lowest position.
    """
    target = active_count(weight.numel(), check_sparsity(sparsity))
    full = Topology.random(weight.shape, block, sparsity=0.0).to(weight.device)
    scores = block_norm(full.pack(weight.detach()), "l1")
    sizes = full.pack(torch.ones_like(weight, dtype=torch.int64)).sum((1, 2))
    order = torch.argsort(scores, descending=True, stable=True)
    held = sizes[order].cumsum(0)
    n = int((held <= target).sum())
    if n < len(held) and 2 * (target - (int(held[n - 1]) if n else 0)) >= int(sizes[order[n]]):
        n += 1
    positions = full.positions()[order[: max(n, 1)]].sort().values
    return Topology.from_positions(positions, weight.shape, block)
