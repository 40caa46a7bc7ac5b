"""The update itself: pure functions from an old topology and scores to a new topology.

Counts are exact and ties go to the lowest position, so that all ranks and devices agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from sparsekern.ops import GrowScores
from sparsekern.topology import Topology
from sparsekern.topology.native import loops
from sparsekern.topology.sampling import sample_sorted
from sparsekern.topology.select import top_k_mask


@dataclass(frozen=True, eq=False)
class TopologyUpdate:
    """A new topology, and where each of its blocks comes from.

    Attributes:
        topology: as many active blocks as before.
        source: (nnzb,) int64, the old CSR position of each new block; -1 for one newly grown.
    """

    topology: Topology
    source: Tensor

    @cached_property
    def grown(self) -> int:
        """How many blocks were not active before."""
        return int((self.source < 0).sum())

    @classmethod
    def between(cls, old: Topology, new: Topology) -> TopologyUpdate:
        """What leads from one topology to another."""
        return cls(new, new.traced_to(old))


def drop_count(active: int, fraction: float) -> int:
    """How many of `active` blocks to drop: truncated in float32, as the reference code does."""
    return int(np.float32(active) * np.float32(fraction))


def drop_smallest(scores: Tensor, k: int) -> Tensor:
    """Mark the survivors when the `k` blocks of smallest score (nnzb,) are dropped."""
    return top_k_mask(scores, scores.numel() - k)


def grow_largest(topology: Topology, keep: Tensor, n: int, scores: GrowScores) -> Tensor:
    """The `n` positions with the largest score among all non-survivors.

    What was just dropped may be grown again (Evci et al. 2020, Algorithm 1).
    """
    native = loops(keep.numel(), topology.col, keep, *scores)
    if native is not None and scores.active.dtype == scores.scores.dtype:
        return _grow_compiled(native, topology, keep, n, scores)
    positions = torch.cat([topology.positions()[~keep], scores.positions])
    values = torch.cat([scores.active[~keep], scores.scores])
    order = torch.argsort(positions)
    best = top_k_mask(values[order], n)
    return positions[order][best]


def _grow_compiled(
    native: ModuleType, topology: Topology, keep: Tensor, n: int, scores: GrowScores
) -> Tensor:
    """The same by merging: both lists of positions ascend already."""
    count = keep.numel() - native.count(keep.numpy()) + scores.positions.numel()
    positions, values = scores.positions.new_empty(count), scores.scores.new_empty(count)
    native.merge_dropped(
        *(t.numpy() for t in (topology.positions(), keep, *scores, positions, values))
    )
    return positions[top_k_mask(values, n)]


def grow_random(topology: Topology, keep: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """`n` positions, drawn uniformly among all non-survivors."""
    kept = topology.positions()[keep]
    total = topology.block_rows * topology.block_cols
    ranks = sample_sorted(n, total - kept.numel(), generator).to(kept.device)
    # the r-th position that is not kept stands r + (kept positions before it)
    free_before = kept - torch.arange(kept.numel(), device=kept.device)
    return ranks + torch.searchsorted(free_before, ranks, right=True)


def rewire(topology: Topology, keep: Tensor, grown: Tensor) -> TopologyUpdate:
    """Survivors plus `grown` positions as a new topology.

    A block that was dropped and grown again is traced to its old place: it keeps its value and
    optimizer state.
    """
    old = topology.positions()
    native = loops(old.numel(), old, keep, grown)
    if native is not None:
        grown = grown if native.ascending(grown.numpy()) else grown.sort().values
        new = grown.new_empty(native.count(keep.numpy()) + grown.numel())
        source = torch.empty_like(new)
        native.merge_grown(*(t.numpy() for t in (old, keep, grown, new, source)))
        return TopologyUpdate(topology.with_positions(new), source)
    new = torch.cat([old[keep], grown]).sort().values
    at = torch.searchsorted(old, new).clamp_(max=max(old.numel() - 1, 0))
    source = torch.where(old[at] == new, at, -1)
    return TopologyUpdate(topology.with_positions(new), source)
