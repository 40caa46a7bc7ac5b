"""Choosing the k best of many scores: exact counts, ties broken by position."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from sparsekern.topology.native import loops

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """Mark the `k` largest scores; among equal ones the lowest positions win.

    `torch.topk` leaves the order of ties open, which would let ranks and devices diverge.

    Args:
        scores: (n,) real numbers without NaN.
        k: how many to mark, 0 <= k <= n.

    Returns:
        (n,) bool with exactly k true entries.
    """
    n = scores.numel()
    if k >= n:
        return torch.ones_like(scores, dtype=torch.bool)
    if k <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    native = loops(n, scores) if scores.dtype in _BITS else None
    if native is not None:
        mask = torch.empty(n, dtype=torch.bool, device=scores.device)
        native.mark_best(_bits(scores).numpy(), k, mask.numpy())
        return mask
    threshold = scores.kthvalue(n - k + 1).values
    mask = scores > threshold
    ties = (scores == threshold).nonzero()[:, 0]
    mask[ties[: k - int(mask.sum())]] = True
    return mask


def streamed_top_k(k: int, like: Tensor, total: int) -> StreamedTopK | CompiledTopK:
    """An empty `StreamedTopK` for `total` scores of the dtype and on the device of `like`."""
    native = loops(total, like) if like.dtype in _BITS else None
    return StreamedTopK(k, like) if native is None else CompiledTopK(k, like, total, native)


def _bits(scores: Tensor) -> Tensor:
    return scores.detach().view(_BITS[scores.dtype])


class StreamedTopK:
    """The k best of scores that arrive in pieces, in O(k) memory.

    Pieces must come in ascending order of position. Candidates that can't win any more are
    discarded as soon as 2k are held.
    """

    def __init__(self, k: int, like: Tensor) -> None:
        self.k = k
        self.held = 0
        self._scores = [like.new_empty(0)]
        self._positions = [torch.empty(0, dtype=torch.int64, device=like.device)]
        self._threshold = like.new_full((), -torch.inf)

    def push(self, scores: Tensor, first: int) -> None:
        """Offer `scores` (n,), which are used up; the first of them stands at position `first`.

        -inf never wins, and NaN counts as +inf, so that it stays visible.
        """
        if not self.k:
            return
        scores = scores.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        at = (scores > self._threshold).nonzero()[:, 0]
        self._scores.append(scores[at])
        self._positions.append(at + first)
        self.held += at.numel()
        if self.held >= 2 * self.k:
            self.result()

    def result(self) -> tuple[Tensor, Tensor]:
        """Positions (ascending) and scores of the k best seen, or of all if fewer were offered."""
        scores, positions = torch.cat(self._scores), torch.cat(self._positions)
        if self.held > self.k:
            mask = top_k_mask(scores, self.k)
            scores, positions = scores[mask], positions[mask]
            self._threshold = scores.min()
        self._scores, self._positions, self.held = [scores], [positions], scores.numel()
        return positions, scores


class RowsTopK:
    """The k best of all scores, and the best of each row besides, from pieces of whole rows.

    Args:
        best: of all, empty.
        each: how many of each row.
        cols: scores in a row.
    """

    def __init__(self, best: StreamedTopK | CompiledTopK, each: int, cols: int) -> None:
        self.best, self.each, self.cols = best, min(each, cols), cols
        self._scores: list[Tensor] = []
        self._positions: list[Tensor] = []

    def push(self, scores: Tensor, first: int) -> None:
        """Offer some rows of `scores`, flat, as `StreamedTopK.push` takes them."""
        scores = scores.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        rows = scores.view(-1, self.cols)
        least = rows.topk(self.each, dim=1).values[:, -1:]
        above, level = rows > least, rows == least
        missing = self.each - above.sum(1, keepdim=True)
        chosen = above | (level & (level.cumsum(1) <= missing))  # of equal ones the first
        at = (chosen & (rows > -torch.inf)).flatten().nonzero()[:, 0]
        self._scores.append(scores[at])
        self._positions.append(at + first)
        self.best.push(scores, first)

    def result(self) -> tuple[Tensor, Tensor]:
        """Positions (ascending) and scores of both, each once."""
        of_all = self.best.result()
        positions = torch.cat([of_all[0], *self._positions])
        scores = torch.cat([of_all[1], *self._scores])
        order = positions.argsort(stable=True)
        positions, scores = positions[order], scores[order]
        once = torch.ones_like(positions, dtype=torch.bool)
        once[1:] = positions[1:] != positions[:-1]
        return positions[once], scores[once]


def best_of_rows(rows: Tensor, scores: Tensor, quota: Tensor) -> Tensor:
    """Mark the largest scores of each row; among equal ones the first.

    Args:
        rows: (n,) int64, the row of each score.
        scores: (n,).
        quota: (all rows,) int64, how many to mark; all of a row that has fewer.

    Returns:
        (n,) bool.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(rows[order], stable=True)]
    ordered = rows[order]
    starts = torch.searchsorted(ordered, torch.arange(quota.numel(), device=rows.device))
    rank = torch.arange(ordered.numel(), device=rows.device) - starts[ordered]
    marked = torch.empty_like(rows, dtype=torch.bool)
    marked[order] = rank < quota[ordered]
    return marked


class CompiledTopK:
    """The same as `StreamedTopK` in one pass over each piece, for CPU tensors.

    Whole chunks of scores below the threshold are passed over by one comparison.
    """

    def __init__(self, k: int, like: Tensor, total: int, native: ModuleType) -> None:
        self.k, self.held = k, 0
        self._native = native
        room = min(k + max(k, 1024), total) + native.CHUNK
        self._scores = like.new_empty(room)
        self._positions = torch.empty(room, dtype=torch.int64, device="cpu")
        self._arrays = tuple(
            t.numpy() for t in (self._scores, _bits(self._scores), self._positions)
        )
        self._threshold = -torch.inf

    def push(self, scores: Tensor, first: int) -> None:
        """Offer `scores` (n,), the first of which stands at position `first`, as there."""
        if self.k:
            scores = scores.detach().to(self._scores).contiguous()
            self.held, self._threshold = self._native.offer(
                scores.numpy(), first, *self._arrays, self.held, self._threshold, self.k
            )

    def result(self) -> tuple[Tensor, Tensor]:
        """Positions (ascending) and scores of the k best seen, or of all if fewer were offered."""
        if self.held > self.k:
            self._threshold = self._native.keep_best(*self._arrays, self.held, self.k)
            self.held = self.k
        return self._positions[: self.held].clone(), self._scores[: self.held].clone()
