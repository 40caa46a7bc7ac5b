"""Scores of the dense gradient, which never exists as a whole: block norms, or slab by slab.

RigL grows where the dense gradient dyᵀ x is largest (Evci et al. 2020, section 3). The paper
already notes that it can be computed online, keeping only the top connections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.errors import ConfigError
from sparsekern.ops.geometry import ConvGeometry
from sparsekern.ops.masked import dense_wgrad
from sparsekern.topology import Topology
from sparsekern.topology.blocks import Grid, tiles_of
from sparsekern.topology.native import loops
from sparsekern.topology.select import CompiledTopK, RowsTopK, StreamedTopK, streamed_top_k

SLAB_ELEMENTS = 2**22
"""A slab of the dense gradient holds at most this many elements (16 MiB in float32)."""

NORMS: dict[str, Callable[[Tensor, tuple[int, ...]], Tensor]] = {
    "l1": lambda t, dims: t.abs().sum(dims),
    "l2": lambda t, dims: t.square().sum(dims),
    "max": lambda t, dims: t.abs().amax(dims),
}
"""How a block's entries become one score. `l2` leaves out the root, which keeps the order."""


Slabs = Callable[[slice], Tensor]
"""Makes some rows of a dense gradient, as (n, cols), in memory that the next call may use again."""


class GrowScores(NamedTuple):
    """What a topology update needs to know of the dense gradient.

    Attributes:
        active: (nnzb,) score of each active block, in CSR order.
        positions: (k,) int64, ascending: the k best inactive blocks.
        scores: (k,) their scores.
    """

    active: Tensor
    positions: Tensor
    scores: Tensor

    def is_finite(self) -> bool:
        """Whether the gradient held no NaN or infinity."""
        return bool(self.active.isfinite().all() & self.scores.isfinite().all())


def check_norm(norm: str) -> None:
    """Raise `ConfigError` unless `norm` is one of `NORMS`."""
    if norm not in NORMS:
        raise ConfigError(f"`norm` must be one of {sorted(NORMS)}; got {norm!r}")


def block_norm(blocks: Tensor, norm: str) -> Tensor:
    """One score per block: (n, bh, bw) -> (n,)."""
    if blocks.shape[1:] == (1, 1):
        return blocks.abs().flatten()
    return NORMS[norm](blocks, (1, 2))


def slab_block_rows(topology: Topology) -> int:
    """Block rows per slab: at most `SLAB_ELEMENTS` elements, an eighth of the layer, one group."""
    width, rows = topology.block[0] * topology.shape[1], topology.block_rows
    return max(1, min(SLAB_ELEMENTS // width, rows // 8, rows // topology.groups))


def grow_scores_of(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    topology: Topology,
    k: int,
    norm: str,
    impl: str,
) -> GrowScores:
    """Score the signed sum of dyᵀ x over all pairs, by a fused kernel where there is one.

    The kernel takes the norm as soon as a tile is summed, so it serves one pair, in blocks; several
    pairs and unstructured weights are streamed.
    """
    if impl == "triton" and len(dys) == 1 and topology.block != (1, 1):
        from sparsekern.kernels.bsr_grow import bsr_grow  # noqa: PLC0415  triton is optional

        return _pick(bsr_grow(dys[0], xs[0], topology.block, norm).flatten(), topology, k)
    return stream_grow_scores(linear_slabs(dys, xs), xs[0], topology, k, norm)


def _pick(scores: Tensor, topology: Topology, k: int) -> GrowScores:
    """Split flat scores of all blocks, which are used up: active ones, and the k best others."""
    at = topology.positions()
    active = scores[at]
    scores[at] = -torch.inf
    best = streamed_top_k(k, active, scores.numel())
    best.push(scores, 0)
    return GrowScores(active, *best.result())


def linear_slabs(dys: Sequence[Tensor], xs: Sequence[Tensor]) -> Slabs:
    """Slabs of the signed sum of dyᵀ x over pairs (M_i, rows), (M_i, cols)."""
    wide = [_wide(x) for x in xs]
    held: list[Tensor] = []  # memory of the first slab, which no other is larger than

    def slab(rows: slice) -> Tensor:
        first, *others = (_wide(dy[:, rows]) for dy in dys)
        if not held or len(held[0]) < first.shape[1]:
            held[:] = [wide[0].new_empty(first.shape[1], wide[0].shape[1])]
        total = held[0][: first.shape[1]]
        torch.mm(first.t(), wide[0], out=total)
        for dy, x in zip(others, wide[1:], strict=True):
            # in place, but as `total.addmm_` a counter of FLOPs would not know it
            torch.addmm(total, dy.t(), x, out=total)
        return total

    return slab


def conv_slabs(dys: Sequence[Tensor], xs: Sequence[Tensor], geometry: ConvGeometry) -> Slabs:
    """The same for a convolution's pairs (N_i, C_out, P, Q), (N_i, C_in, H, W)."""
    outputs, inputs = dys[0].shape[1] // geometry.groups, xs[0].shape[1] // geometry.groups
    one_group = replace(geometry, groups=1)

    def slab(rows: slice) -> Tensor:
        group = rows.start // outputs
        channels = slice(group * inputs, (group + 1) * inputs)
        pairs = ((_wide(dy[:, rows]), _wide(x[:, channels])) for dy, x in zip(dys, xs, strict=True))
        first, *others = (dense_wgrad(dy, x, one_group) for dy, x in pairs)
        for other in others:
            first += other
        return first

    return slab


def stream_grow_scores(
    slab_of: Slabs,
    like: Tensor,
    topology: Topology,
    k: int,
    norm: str,
    reduce: Callable[[Tensor], None] | None = None,
    each_row: int = 0,
) -> GrowScores:
    """Score a dense gradient that comes one slab of rows at a time.

    Args:
        slab_of: makes the rows of a slice of the gradient, (n, cols), to be written to; a
            slice lies within one group.
        like: has the device and dtype of the activations.
        topology: what is active now.
        k: how many inactive blocks to report; fewer come back if fewer are inactive.
        norm: one of `NORMS`; plain magnitude for block (1, 1).
        reduce: sums a slab over ranks in place, before any absolute value is taken.
        each_row: report so many of the best inactive blocks of each block row besides.
    """
    wide = _wide(like.new_empty(0))
    active = wide.new_empty(topology.nnzb)
    best: StreamedTopK | CompiledTopK | RowsTopK
    best = streamed_top_k(k, wide, topology.grid.total)
    if each_row:
        best = RowsTopK(best, each_row, topology.block_cols)
    bounds = topology.crow.tolist()
    for first, last, rows in _slab_rows(topology):
        slab = slab_of(rows)
        if reduce is not None:
            reduce(slab)
        scores = _slab_scores(slab, topology.grid, last - first, norm)
        _take_active(scores, topology, first, last, active[bounds[first] : bounds[last]])
        best.push(scores, first * topology.block_cols)
    return GrowScores(active, *best.result())


def _take_active(scores: Tensor, topology: Topology, first: int, last: int, active: Tensor) -> None:
    """Make scores magnitudes; move those of active blocks in block rows [first, last) to `active`.

    They leave -inf behind.
    """
    crow, cols = topology.crow[first : last + 1], topology.block_cols
    native = loops(scores.numel(), scores, crow, topology.col, active)
    if native is not None:
        arrays = (t.numpy() for t in (crow, topology.col, active))
        native.take_active(scores.numpy(), cols, *arrays)
        return
    lo, hi = int(crow[0]), int(crow[-1])
    rows = torch.repeat_interleave(crow.long().diff(), output_size=hi - lo)
    at = rows * cols + topology.col[lo:hi]
    active.copy_(scores.abs_()[at])
    scores[at] = -torch.inf


def _slab_rows(topology: Topology) -> Iterator[tuple[int, int, slice]]:
    """Block rows [first, last) of each slab, and the rows that they hold; in order."""
    step, bh, grid = slab_block_rows(topology), topology.block[0], topology.grid
    height, down = grid.part[0], grid.part_blocks[0]
    for group in range(topology.groups):
        for first in range(0, down, step):
            last = min(first + step, down)
            rows = slice(group * height + first * bh, group * height + min(last * bh, height))
            yield group * down + first, group * down + last, rows


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype is torch.float64 else x.float()


def _slab_scores(slab: Tensor, grid: Grid, block_rows: int, norm: str) -> Tensor:
    """Flat block scores of a slab, which is used up; single entries keep their sign."""
    if grid.block == (1, 1):
        return slab.flatten()  # `_take_active` makes them magnitudes
    part = Grid((len(slab), grid.shape[1]), grid.block, block_rows, grid.cols, 1, grid.taps)
    return NORMS[norm](tiles_of(slab, part), (1, 3)).flatten()
