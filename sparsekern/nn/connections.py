"""Which weights of a dense layer to keep: by a given mask, or by magnitude."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.errors import ConfigError, DtypeError, ShapeError, TopologyError
from sparsekern.ops import block_norm
from sparsekern.topology import Topology
from sparsekern.topology.blocks import Block, active_count, check_sparsity
from sparsekern.topology.checks import check_tensor


def topology_of(
    weight: Tensor,
    block: Block,
    *,
    sparsity: float | None = None,
    mask: Tensor | None = None,
    groups: int = 1,
    taps: int = 1,
) -> Topology:
    """The connections to take over from a dense weight matrix.

    Args:
        weight: (rows, cols).
        block: edge or pair.
        sparsity: keep the blocks of largest magnitude that hold this share of the weights.
        mask: (rows, cols), keep these weights. Without both, every block with a nonzero.
        groups: parts of the rows.
        taps: parts of the columns.

    Raises:
        ConfigError: both are given, or sparsity is outside [0, 1).
        TopologyError: some block of the mask is active only in part.
    """
    if sparsity is not None and mask is not None:
        raise ConfigError("give `sparsity` or `mask`, not both")
    parts = {"groups": groups, "taps": taps}
    if sparsity is not None:
        return topology_of_largest(weight, sparsity, block, **parts)
    if mask is not None:
        return topology_of_mask(mask.to(weight.device), block, **parts)
    return Topology.from_mask(weight, block, **parts)


def check_topology(topology: object) -> None:
    """Raise `DtypeError` unless it is a `Topology`."""
    if not isinstance(topology, Topology):
        raise DtypeError(f"`topology` must be a Topology; got {type(topology).__name__}")


def check_mask(mask: Tensor, weight: Tensor) -> None:
    """Raise unless `mask` is a tensor of the shape of the dense layer's `weight`."""
    check_tensor("mask", mask)
    if mask.shape != weight.shape:
        raise ShapeError(
            f"`mask` must have the weight's shape {tuple(weight.shape)}; got {tuple(mask.shape)}"
        )


def topology_of_mask(mask: Tensor, block: Block, *, groups: int = 1, taps: int = 1) -> Topology:
    """The topology of a ticket: a mask (rows, cols) made of whole blocks.

    Raises:
        TopologyError: some block is active only in part.
    """
    topology = Topology.from_mask(mask, block, groups=groups, taps=taps)
    partial = topology.nnz - int((mask != 0).sum())
    if partial:
        raise TopologyError(
            f"`mask` must be made of whole {topology.block} blocks; {partial} weights of its "
            "active blocks are masked out (block=1 takes any mask)"
        )
    return topology


def topology_of_largest(
    weight: Tensor, sparsity: float, block: Block, *, groups: int = 1, taps: int = 1
) -> Topology:
    """The blocks with the largest summed magnitude that hold the asked number of weights.

    The count is exact to within one block; ties go to the lowest position.
    """
    full = every_block(weight, block, groups=groups, taps=taps)
    return largest_of(full, full.pack(weight.detach()), sparsity)


def every_block(weight: Tensor, block: Block, *, groups: int = 1, taps: int = 1) -> Topology:
    """The topology of a matrix (rows, cols) that leaves nothing out, on the matrix's device."""
    full = Topology.random(weight.shape, block, sparsity=0.0, groups=groups, taps=taps)
    return full.to(weight.device)


def largest_of(topology: Topology, values: Tensor, sparsity: float) -> Topology:
    """Those of a topology's blocks, of `values` (nnzb, bh, bw), that are to stay.

    `sparsity` is of the whole matrix; see `topology_of_largest`.
    """
    rows, cols = topology.shape
    target = active_count(rows * cols, check_sparsity(sparsity))
    order = torch.argsort(block_norm(values, "l1"), descending=True, stable=True)
    n = count_within(block_weights(topology)[order], target)
    return topology.with_positions(topology.positions()[order[: max(n, 1)]].sort().values)


def block_weights(topology: Topology) -> Tensor:
    """Weights in each active block, (nnzb,) int64: padding is not counted."""
    grid = topology.grid
    heights, widths = (
        torch.tensor(grid.block_sizes(axis), device=topology.device) for axis in (0, 1)
    )
    return heights[topology.slot_rows()] * widths[topology.col.long()]


def count_within(sizes: Tensor, target: int) -> int:
    """How many of blocks that hold `sizes` weights, from the first on, come closest to `target`."""
    held = sizes.cumsum(0)
    n = int((held <= target).sum())
    if n < len(held) and 2 * (target - (int(held[n - 1]) if n else 0)) >= int(sizes[n]):
        n += 1
    return n
