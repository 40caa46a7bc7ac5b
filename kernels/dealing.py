"""How the tiles of a product are dealt to programs that stay, one to a multiprocessor.

A tile is a rank among the block rows, longest first, and a tile of tokens. Tiles stand in a line:
`group` token tiles together, so that programs in flight share x and w in L2, ranks slow and tokens
fast; every second group backwards, so that lengths go up and down without a jump and the last group
is longest first. They are dealt in rounds of one to each program, or there and back.

A deal depends on sizes alone, never on what a topology holds: which rows are long is in its order.
How even a deal is depends on how the sizes divide, by up to a half, so `deal` tries them all on the
lengths that random topologies have.
"""

from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import torch

__all__ = ["Deal", "deal", "shares", "usual_lengths"]

_TILE = 1.5  # what the end of a tile costs, in blocks of the weight; modelled
_SHARED_BYTES = 24 << 20  # of x that may be in flight: the fast part of L2, weights beside it


class Deal(NamedTuple):
    """`group` token tiles together; rounds one way, or `back` and forth."""

    group: int
    back: bool


def usual_lengths(rows: int, columns: int, blocks: int) -> tuple[float, ...]:
    """Blocks of each of `rows` block rows, longest first, as random topologies have them."""
    mean = blocks / max(rows, 1)
    spread = max(mean * (1 - mean / max(columns, 1)), 0.0) ** 0.5
    normal = NormalDist()
    places = ((i + 0.5) / rows for i in range(rows))
    return tuple(min(max(mean - spread * normal.inv_cdf(p), 0.0), columns) for p in places)


def shares(how: Deal, lengths: tuple[float, ...], tiles: int, programs: int) -> torch.Tensor:
    """Work of each program in blocks, the ends of its tiles counted.

    Args:
        how: the deal.
        lengths: blocks of each rank.
        tiles: of tokens.
        programs: that stay.
    """
    down = torch.tensor(lengths, dtype=torch.float64) + _TILE
    groups = [range(first, min(first + how.group, tiles)) for first in range(0, tiles, how.group)]
    line = torch.cat(
        [
            (down if (len(groups) - 1 - g) % 2 == 0 else down.flip(0)).repeat_interleave(len(group))
            for g, group in enumerate(groups)
        ]
    )
    place = torch.arange(len(line))
    turn, program = place // programs, place % programs
    if how.back:
        program = torch.where(turn % 2 == 1, programs - 1 - program, program)
    return torch.zeros(programs, dtype=torch.float64).index_add_(0, program, line)


@cache
def deal(rows: int, columns: int, blocks: int, tiles: int, programs: int, tile_bytes: int) -> Deal:
    """The most even deal whose groups fit into L2; of equals the one with the smallest group.

    Args:
        rows: block rows of the output.
        columns: blocks along the sum.
        blocks: active ones.
        tiles: of tokens.
        programs: that stay.
        tile_bytes: of x in one tile of tokens, all its columns.
    """
    lengths = usual_lengths(rows, columns, blocks)
    most = max(1, min(tiles, 16, _SHARED_BYTES // max(tile_bytes, 1)))
    ways = [Deal(group, back) for group in range(1, most + 1) for back in (False, True)]
    return min(ways, key=lambda way: round(float(shares(way, lengths, tiles, programs).max()), 6))
