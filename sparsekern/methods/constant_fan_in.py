"""Topologies in which all neurons that are left have as many inputs, to within one block.

Pure functions: what they choose follows from their arguments alone, and ties go to the lowest
position.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.ops import GrowScores
from sparsekern.topology import Topology
from sparsekern.topology.select import best_of_rows, top_k_mask

SLAB_ELEMENTS = 2**22
"""Places that random numbers are drawn for at once."""


class Choice(NamedTuple):
    """What stays of a topology, and what comes in.

    Attributes:
        keep: (nnzb,) bool.
        grown: (n,) int64 positions, ascending, as many as are dropped.
    """

    keep: Tensor
    grown: Tensor


def most_in_a_row(topology: Topology) -> int:
    """The fan-in, in blocks, that one update can lead to: twice that of now."""
    live = max(int((topology.crow.diff() > 0).sum()), 1)
    return min(topology.block_cols, 2 * math.ceil(topology.nnzb / live))


def chosen(
    topology: Topology, weights: Tensor, found: GrowScores, dropped: int, threshold: int
) -> Choice:
    """An update by RigL's criteria (Lasby et al. 2024, section 3).

    Args:
        topology: as it is.
        weights: (nnzb,) score of each active block.
        found: scores of the dense gradient, with `most_in_a_row` of each block row.
        dropped: how many blocks RigL would drop.
        threshold: a block row with fewer salient blocks is left out; 0 leaves none out.
    """
    rows, n = topology.slot_rows(), topology.nnzb
    keep = top_k_mask(weights, n - dropped)
    salient = _salient(topology, keep, found, dropped)
    living = salient >= threshold
    least = math.ceil(n / max(most_in_a_row(topology), 1))
    if int(living.sum()) < least:  # the others could not take up the blocks
        living = top_k_mask(salient.double(), least)
    quota = _shared(n, living, salient)
    keep = top_k_mask(weights.masked_fill(~living[rows], -torch.inf), n - dropped) & living[rows]
    keep[keep.clone()] = best_of_rows(rows[keep], weights[keep], quota)
    missing = quota - torch.bincount(rows[keep], minlength=quota.numel())
    positions = torch.cat([topology.positions()[~keep], found.positions])
    scores = torch.cat([found.active[~keep], found.scores])
    order = positions.argsort()
    positions, scores = positions[order], scores[order]
    of = torch.div(positions, topology.block_cols, rounding_mode="floor")
    return Choice(keep, positions[best_of_rows(of, scores, missing)])


def levelled(topology: Topology, weights: Tensor, generator: torch.Generator) -> Choice | None:
    """What makes the fan-in constant; None if it is. The smallest go where there are too many.

    Args:
        topology: as it is.
        weights: (nnzb,) score of each active block.
        generator: on the CPU, of the positions that come in.
    """
    counts = topology.crow.diff().long()
    live = counts[counts > 0]
    if not live.numel() or int(live.max()) - int(live.min()) <= 1:
        return None
    quota = _shared(topology.nnzb, torch.ones_like(counts, dtype=torch.bool), counts)
    rows = topology.slot_rows()
    keep = best_of_rows(rows, weights, quota)
    missing = quota - torch.bincount(rows[keep], minlength=quota.numel())
    return Choice(keep, _drawn(topology, missing, generator))


def _salient(topology: Topology, keep: Tensor, found: GrowScores, dropped: int) -> Tensor:
    """Salient blocks of each block row: those kept, and the `dropped` of largest gradient."""
    own = topology.positions()
    positions = torch.cat([own, found.positions])
    order = positions.argsort()
    marked = torch.empty_like(positions, dtype=torch.bool)
    marked[order] = top_k_mask(torch.cat([found.active, found.scores])[order], dropped)
    marked[: own.numel()] |= keep
    of = torch.div(positions[marked], topology.block_cols, rounding_mode="floor")
    return torch.bincount(of, minlength=topology.block_rows)


def _shared(n: int, living: Tensor, salient: Tensor) -> Tensor:
    """Blocks for each block row: as many for each living one, one more for the most salient."""
    each, rest = divmod(n, max(int(living.sum()), 1))
    more = top_k_mask(torch.where(living, salient, -1).double(), rest)
    return living.long() * each + more


def _drawn(topology: Topology, missing: Tensor, generator: torch.Generator) -> Tensor:
    """`missing` random positions of each block row among those that are not active."""
    crow, col, cols = topology.crow.tolist(), topology.col.long().cpu(), topology.block_cols
    wanted, step = missing.cpu(), max(1, SLAB_ELEMENTS // cols)
    drawn = []
    for first in range(0, topology.block_rows, step):
        quota = wanted[first : first + step]
        scores = torch.rand(len(quota), cols, generator=generator, dtype=torch.float64)
        lo, hi = crow[first], crow[first + len(quota)]
        counts = torch.tensor(crow[first : first + len(quota) + 1]).diff()
        scores[torch.repeat_interleave(counts), col[lo:hi]] = -1.0
        rows = torch.arange(len(quota)).repeat_interleave(cols)
        best = best_of_rows(rows, scores.flatten(), quota)
        drawn.append(best.nonzero()[:, 0] + first * cols)
    return torch.cat(drawn).to(topology.device)
