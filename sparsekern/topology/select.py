"""Choosing the k best of many scores: exact counts, ties broken by position."""

from __future__ import annotations

import torch
from torch import Tensor


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
    threshold = scores.kthvalue(n - k + 1).values
    mask = scores > threshold
    ties = (scores == threshold).nonzero()[:, 0]
    mask[ties[: k - int(mask.sum())]] = True
    return mask


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
        """Offer `scores` (n,), the first of which stands at position `first`; -inf never wins."""
        if not self.k:
            return
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
