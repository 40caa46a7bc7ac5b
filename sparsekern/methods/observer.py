"""Collecting what the dense gradient of one layer says, on armed steps only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sparsekern.nn import SparseLayer
from sparsekern.ops import GrowScores
from sparsekern.ops.capture import register
from sparsekern.ops.ranges import ranged


class GradientObserver:
    """Turns the backward passes of one layer into `GrowScores`.

    While armed, it streams the dense gradient inside the last of `passes` backward passes and keeps
    nothing else; with more than one, the (dy, x) pairs of the earlier ones are held until then, so
    that the score is the norm of the *summed* gradient, as if they were one batch. A layer used
    several times in one forward pass is summed likewise. Starting a new accumulation (gradients
    were cleared, as after a skipped AMP step) starts over.
    """

    def __init__(self, layer: SparseLayer, norm: str, passes: int) -> None:
        self.layer, self.norm, self.passes = layer, norm, passes
        self.reduce: Callable[[Tensor], None] | None = None
        self.key = register(self)
        self.k = 0
        self.rounds = 0
        self._pending = 0
        self._grad_version = -1
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._scores: GrowScores | None = None
        self._hook: RemovableHandle | None = None

    def arm(self, k: int, reduce: Callable[[Tensor], None] | None) -> None:
        """Observe coming passes, for the `k` best inactive blocks; `reduce` sums over ranks."""
        self.disarm()
        self.k, self.reduce = k, reduce
        self.layer.observe(self.key)
        register_hook: Any = self.layer.values.register_post_accumulate_grad_hook
        self._hook = register_hook(self._accumulated)

    def disarm(self) -> None:
        """Stop observing, and forget."""
        self.layer.observe(0)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._reset()

    def expect(self) -> None:
        """A forward pass went through the layer (called by the capture operator)."""
        self._pending += 1

    def receive(self, dy: Tensor, x: Tensor) -> None:
        """Its backward pass came (called by the capture operator)."""
        if self.rounds and self._was_cleared():
            pending = self._pending
            self._reset()
            self._pending = pending
        self._pairs.append((dy.detach(), x.detach()))
        self._pending -= 1
        if self._pending <= 0:
            self.rounds += 1
            if self.rounds == self.passes:
                self._stream()

    def scores(self) -> GrowScores | None:
        """The scores, or None if no backward pass came."""
        if self._pairs and self.rounds <= self.passes:
            # passes whose forward was never answered, as under activation checkpointing
            self._stream()
        return self._scores

    def _accumulated(self, values: Tensor) -> None:
        self._grad_version = -1 if values.grad is None else values.grad._version

    def _was_cleared(self) -> bool:
        """Whether the gradients were set to None or zero since the last backward pass.

        A gradient that is zero by itself has not been touched since it was accumulated.
        """
        grad = self.layer.values.grad
        if grad is None:
            return True
        return grad._version != self._grad_version and not bool(grad.any())

    def _stream(self) -> None:
        dys, xs = zip(*self._pairs, strict=True)
        self._pairs.clear()
        with ranged("score"):
            self._scores = self.layer.grow_scores(dys, xs, self.k, self.norm, self.reduce)

    def _reset(self) -> None:
        self._pairs.clear()
        self._pending = self.rounds = 0
        self._grad_version = -1
        self._scores = None
