"""Drawing positions without replacement in memory proportional to the number drawn."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.errors import DtypeError, TopologyError
from sparsekern.topology.blocks import Grid
from sparsekern.topology.native import loops

MAX_ACTIVE = 2**31 - 1
"""Blocks that int32 index arrays can count."""

_LARGE = 2**20
"""From here on a permutation, which goes all over memory, takes longer than the draw itself."""


def check_generator(generator: object) -> None:
    """Raise `DtypeError` unless `generator` is None or a `torch.Generator`."""
    if not isinstance(generator, torch.Generator | None):
        raise DtypeError(
            f"`generator` must be None or a torch.Generator; got {type(generator).__name__}"
        )


def check_count(active: int, grid: Grid, where: str = "") -> None:
    """Raise `TopologyError` if index arrays, which are int32, can't count `active` blocks."""
    if active > MAX_ACTIVE:
        raise TopologyError(
            f"{where}at most {MAX_ACTIVE} blocks can be active; a matrix of {grid.shape} in blocks "
            f"of {grid.block} would have {active}: take larger blocks, or more sparsity"
        )


def sample_sorted(n: int, total: int, generator: torch.Generator | None = None) -> Tensor:
    """`n` distinct integers out of [0, total), uniformly, ascending: (n,) int64.

    Draws with replacement and discards repeats, so memory is a few times 8 n bytes.
    """
    if n > total // 2:
        return torch.randperm(total, generator=generator, device="cpu")[:n].sort().values
    drawn = torch.empty(0, dtype=torch.int64, device="cpu")
    while drawn.numel() < n:
        missing = n - drawn.numel()
        few = n < _LARGE or drawn.numel() > 0
        count = missing + missing // 8 + 16 if few else _draws(n, total)
        fresh = torch.randint(total, (count,), generator=generator, device="cpu")
        drawn = _distinct(torch.cat([drawn, fresh]) if drawn.numel() else fresh, total)
    # the set is uniform, so leaving out a uniform part of it keeps it so
    size = drawn.numel()
    chosen = torch.zeros(size, dtype=torch.bool, device="cpu")
    if size < _LARGE:
        chosen[torch.randperm(size, generator=generator, device="cpu")[:n]] = True
    else:
        chosen[sample_sorted(size - n, size, generator)] = True
        chosen.logical_not_()
    return drawn[chosen]


def _draws(n: int, total: int) -> int:
    """Draws out of [0, total) among which `n` are distinct, but for one time in 10^9."""
    return math.ceil(math.log1p(-n / total) / math.log1p(-1 / total) + 6 * math.sqrt(n))


def _distinct(drawn: Tensor, total: int) -> Tensor:
    """The numbers out of [0, total), which are used up, ascending and without repeats."""
    native = loops(drawn.numel(), drawn)
    if native is None:
        distinct: Tensor = torch.unique(drawn)
        return distinct
    other = torch.empty_like(drawn)
    left, swapped = native.sort_distinct(drawn.numpy(), other.numpy(), (total - 1).bit_length())
    distinct = other if swapped else drawn
    return distinct[:left]


class _Region(NamedTuple):
    """Blocks of one size: `rows` x `cols` of them from (row, col) on in every part of a grid."""

    row: int
    col: int
    rows: int
    cols: int
    area: int


def _regions(grid: Grid) -> list[_Region]:
    """Interior, right edge, bottom edge and corner of a grid's parts, largest blocks first."""
    (rows, cols), (bh, bw) = grid.part, grid.block
    vertical = [(0, rows // bh, bh), (rows // bh, 1, rows % bh)]
    horizontal = [(0, cols // bw, bw), (cols // bw, 1, cols % bw)]
    regions = [
        _Region(r, c, nr, nc, h * w)
        for r, nr, h in vertical
        for c, nc, w in horizontal
        if nr * nc * h * w
    ]
    return sorted(regions, key=lambda region: -region.area)


def block_counts(grid: Grid, target: int) -> tuple[int, int]:
    """How many blocks `sample_blocks` draws, and the weights in them, padding left out."""
    regions = _regions(grid)
    counts = _counts(grid, regions, target)
    return sum(counts), sum(n * region.area for n, region in zip(counts, regions, strict=True))


def sample_blocks(grid: Grid, target: int, generator: torch.Generator | None = None) -> Tensor:
    """Blocks holding `target` weights to within one block, uniformly: sorted flat positions.

    Ragged edge blocks hold fewer weights than others. Each kind of block gets its share of the
    target, and a last block is added where it brings the total closer. At least one is drawn.
    """
    regions = _regions(grid)
    drawn = [
        _positions(grid, region, sample_sorted(n, _total(grid, region), generator))
        for n, region in zip(_counts(grid, regions, target), regions, strict=True)
    ]
    return drawn[0] if len(drawn) == 1 else torch.cat(drawn).sort().values


def _total(grid: Grid, region: _Region) -> int:
    return grid.groups * grid.taps * region.rows * region.cols


def _counts(grid: Grid, regions: list[_Region], target: int) -> list[int]:
    """Blocks to draw of each region."""
    size, totals = grid.shape[0] * grid.shape[1], [_total(grid, region) for region in regions]
    counts = [target * total // size for total in totals]
    missing = target - sum(n * region.area for n, region in zip(counts, regions, strict=True))
    for i, region in enumerate(regions):
        extra = min(max(round(missing / region.area), 0), totals[i] - counts[i])
        counts[i] += extra
        missing -= extra * region.area
    if not any(counts):
        counts[0] = 1
    return counts


def _positions(grid: Grid, region: _Region, local: Tensor) -> Tensor:
    """Flat positions in the grid of a region's blocks, numbered row by row through all parts."""
    down, across = grid.part_blocks
    if (region.rows, region.cols) == (down, across):
        return local  # there is no other region
    width = grid.taps * region.cols
    row, col = torch.div(local, width, rounding_mode="floor"), local % width
    row = row // region.rows * down + row % region.rows + region.row
    return row * grid.cols + col // region.cols * across + col % region.cols + region.col
