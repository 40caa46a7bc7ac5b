"""Sets of positions in little memory: the gaps between them, or a bit for each place."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.topology.build import contains
from sparsekern.topology.native import loops

FAR = 255
"""A byte of a list of gaps: so many places are passed over, and none of them is in the set."""


def gaps_of(positions: Tensor) -> Tensor:
    """Ascending distinct positions (n,) int64 as bytes: one each, and one for every 255 passed."""
    before = torch.cat([positions.new_full((1,), -1), positions[:-1]])
    passed = positions - before[: positions.numel()] - 1
    far = torch.div(passed, FAR, rounding_mode="floor")
    ends = (far + 1).cumsum(0)
    size = int(ends[-1]) if ends.numel() else 0
    gaps = torch.full((size,), FAR, dtype=torch.uint8, device=positions.device)
    gaps[ends - 1] = (passed - far * FAR).to(torch.uint8)
    return gaps


def positions_of(gaps: Tensor) -> Tensor:
    """The positions that `gaps_of` has packed."""
    member = gaps != FAR
    steps = gaps.to(torch.int64) + member
    return steps.cumsum(0)[member] - 1


def places_of(gaps: Tensor) -> int:
    """How many places they pass, members counted: no position is as large."""
    return int((gaps.to(torch.int64) + (gaps != FAR)).sum())


def in_both(gaps: Tensor, positions: Tensor) -> int:
    """How many of the packed positions are among ascending `positions`, on whose device it is."""
    gaps = gaps.to(positions.device)
    native = loops(gaps.numel(), gaps, positions)
    if native is not None:
        return int(native.in_both(gaps.numpy(), FAR, positions.numpy()))
    return int(contains(positions, positions_of(gaps)).sum())


def no_bits(total: int, device: torch.device) -> Tensor:
    """An empty set of places in [0, total): (ceil(total / 8),) uint8."""
    return torch.zeros(-(-total // 8), dtype=torch.uint8, device=device)


def with_bits(bits: Tensor, positions: Tensor) -> Tensor:
    """A copy of a set with distinct positions (n,) int64 added to it."""
    byte, place = positions >> 3, (positions & 7).to(torch.uint8)
    one = torch.ones_like(place) << place
    new = (bits[byte] & one) == 0
    # none of these is set, and no two are the same: adding them up sets them
    return bits.index_add(0, byte[new], one[new])


def count_bits(bits: Tensor) -> Tensor:
    """How many places are in a set, as a scalar tensor."""
    found = [((bits >> i) & 1).sum() for i in range(8)]
    return torch.stack(found).sum()
