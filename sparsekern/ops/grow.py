"""Scores of the dense gradient, which never exists as a whole: block norms, or slab by slab.

RigL grows where the dense gradient dyᵀ x is largest (Evci et al. 2020, section 3). The paper
already notes that it can be computed online, keeping only the top connections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.errors import ConfigError
from sparsekern.select import StreamedTopK
from sparsekern.topology import Topology

SLAB_ELEMENTS = 2**22
"""A slab of the dense gradient holds at most this many elements (16 MiB in float32)."""

NORMS: dict[str, Callable[[Tensor, tuple[int, ...]], Tensor]] = {
    "l1": lambda t, dims: t.abs().sum(dims),
    "l2": lambda t, dims: t.square().sum(dims),
    "max": lambda t, dims: t.abs().amax(dims),
}
"""How a block's entries become one score. `l2` leaves out the root, which keeps the order."""


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
    """Block rows per slab: at most `SLAB_ELEMENTS` elements and an eighth of the layer."""
    width = topology.block[0] * topology.shape[1]
    return max(1, min(SLAB_ELEMENTS // width, topology.block_rows // 8))


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
    return stream_grow_scores(dys, xs, topology, k, norm)


def _pick(scores: Tensor, topology: Topology, k: int) -> GrowScores:
    """Split flat scores of all blocks, which are used up: active ones, and the k best others."""
    at = topology.positions()
    active = scores[at]
    # NaN must stay visible in `active`; elsewhere it is caught by counting it as +inf
    scores = scores.nan_to_num_(nan=torch.inf, posinf=torch.inf)
    scores[at] = -torch.inf
    best = StreamedTopK(k, active)
    best.push(scores, 0)
    return GrowScores(active, *best.result())


def stream_grow_scores(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    topology: Topology,
    k: int,
    norm: str,
    reduce: Callable[[Tensor], None] | None = None,
) -> GrowScores:
    """Score the signed sum of dyᵀ x over all pairs, one slab of rows at a time.

    Args:
        dys: gradients of the outputs, each (M_i, rows).
        xs: inputs, each (M_i, cols).
        topology: what is active now.
        k: how many inactive blocks to report; fewer come back if fewer are inactive.
        norm: one of `NORMS`; plain magnitude for block (1, 1).
        reduce: sums a slab over ranks in place, before any absolute value is taken.
    """
    dtype = torch.float64 if xs[0].dtype is torch.float64 else torch.float32
    wide = [x.to(dtype) for x in xs]
    step, (bh, bw) = slab_block_rows(topology), topology.block
    active = torch.empty(topology.nnzb, dtype=dtype, device=xs[0].device)
    best = StreamedTopK(k, active)
    bounds = topology.crow.tolist()
    for first in range(0, topology.block_rows, step):
        last = min(first + step, topology.block_rows)
        rows = slice(first * bh, min(last * bh, topology.shape[0]))
        slab = _dense_slab([dy[:, rows].to(dtype) for dy in dys], wide)
        if reduce is not None:
            reduce(slab)
        scores = _slab_scores(slab, (bh, bw), norm)
        lo, hi = bounds[first], bounds[last]
        counts = topology.crow[first : last + 1].long().diff()
        local = torch.repeat_interleave(counts, output_size=hi - lo) * topology.block_cols
        at = local + topology.col[lo:hi]
        active[lo:hi] = scores[at]
        # NaN must stay visible in `active`; elsewhere it is caught by counting it as +inf
        scores = scores.nan_to_num_(nan=torch.inf, posinf=torch.inf)
        scores[at] = -torch.inf
        best.push(scores, first * topology.block_cols)
    return GrowScores(active, *best.result())


def _dense_slab(dys: list[Tensor], xs: list[Tensor]) -> Tensor:
    slab = dys[0].t() @ xs[0]
    for dy, x in zip(dys[1:], xs[1:], strict=True):
        slab.addmm_(dy.t(), x)
    return slab


def _slab_scores(slab: Tensor, block: tuple[int, int], norm: str) -> Tensor:
    """Flat block scores of a slab, which is used up."""
    bh, bw = block
    if block == (1, 1):
        return slab.abs_().flatten()
    pad = (0, -slab.shape[1] % bw, 0, -slab.shape[0] % bh)
    if any(pad):
        slab = torch.nn.functional.pad(slab, pad)
    tiles = slab.view(slab.shape[0] // bh, bh, slab.shape[1] // bw, bw)
    return NORMS[norm](tiles, (1, 3)).flatten()
