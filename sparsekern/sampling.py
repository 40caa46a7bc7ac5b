"""Drawing positions without replacement in memory proportional to the number drawn."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def sample_sorted(n: int, total: int, generator: torch.Generator | None = None) -> Tensor:
    """`n` distinct integers out of [0, total), uniformly, ascending: (n,) int64.

    Draws with replacement and discards repeats, so memory is a few times 8 n bytes.
    """
    if n > total // 2:
        return torch.randperm(total, generator=generator, device="cpu")[:n].sort().values
    drawn = torch.empty(0, dtype=torch.int64, device="cpu")
    while drawn.numel() < n:
        missing = n - drawn.numel()
        count = missing + missing // 8 + 16
        fresh = torch.randint(total, (count,), generator=generator, device="cpu")
        drawn = torch.unique(torch.cat([drawn, fresh]))
    # the set is uniform, so leaving out a uniform part of it keeps it so
    keep = torch.randperm(drawn.numel(), generator=generator, device="cpu")[:n]
    return drawn[keep.sort().values]


class _Region(NamedTuple):
    """A rectangle of equal-sized blocks, in block coordinates."""

    row: int
    col: int
    rows: int
    cols: int
    area: int


def _regions(shape: tuple[int, int], block: tuple[int, int]) -> list[_Region]:
    """Interior, right edge, bottom edge and corner of a blocked matrix, largest blocks first."""
    (rows, cols), (bh, bw) = shape, block
    vertical = [(0, rows // bh, bh), (rows // bh, 1, rows % bh)]
    horizontal = [(0, cols // bw, bw), (cols // bw, 1, cols % bw)]
    regions = [
        _Region(r, c, nr, nc, h * w)
        for r, nr, h in vertical
        for c, nc, w in horizontal
        if nr * nc * h * w
    ]
    return sorted(regions, key=lambda region: -region.area)


def sample_blocks(
    shape: tuple[int, int],
    block: tuple[int, int],
    target: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Blocks holding `target` weights to within one block, uniformly: sorted flat positions.

    Ragged edge blocks hold fewer weights than others. Each kind of block gets its share of the
    target, and a last block is added where it brings the total closer. At least one is drawn.
    """
    regions = _regions(shape, block)
    size = shape[0] * shape[1]
    counts = [target * region.rows * region.cols // size for region in regions]
    missing = target - sum(n * region.area for n, region in zip(counts, regions, strict=True))
    for i, region in enumerate(regions):
        extra = min(max(round(missing / region.area), 0), region.rows * region.cols - counts[i])
        counts[i] += extra
        missing -= extra * region.area
    if not any(counts):
        counts[0] = 1
    block_cols = -(-shape[1] // block[1])
    drawn = []
    for n, region in zip(counts, regions, strict=True):
        local = sample_sorted(n, region.rows * region.cols, generator)
        row = torch.div(local, region.cols, rounding_mode="floor")
        drawn.append((row + region.row) * block_cols + (local - row * region.cols) + region.col)
    return drawn[0] if len(drawn) == 1 else torch.cat(drawn).sort().values
