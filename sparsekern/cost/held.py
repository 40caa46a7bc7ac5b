"""Bytes that a model and its optimizer hold between two training steps: sums over real tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsekern.nn import SparseLayer


@dataclass(frozen=True)
class HeldBytes:
    """Bytes that stay allocated between two training steps, summed over real tensors.

    Attributes:
        weights: parameters, and buffers like the running statistics of norms.
        gradients: of the parameters.
        optimizer: its state.
        index: which connections exist.
        method: what a sparse training method keeps besides, like a running average of gradients.
    """

    weights: int
    gradients: int
    optimizer: int
    index: int
    method: int = 0

    @property
    def trained(self) -> int:
        """Weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Index arrays, and what a method keeps, included."""
        return self.trained + self.index + self.method


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, method: int = 0) -> HeldBytes:
    """Sum the tensors that exist now; call it after a step, while the gradients are there.

    Args:
        model: whose parameters and buffers count.
        optimizer: whose state counts.
        method: bytes that a method keeps besides: `method.growth.bytes()`.
    """
    parameters = list(model.parameters())
    index = {b for m in model.modules() if isinstance(m, SparseLayer) for b in m.buffers()}
    state = tree_leaves([dict(optimizer.state.get(p, {})) for p in parameters])
    return HeldBytes(
        weights=tensor_bytes([*parameters, *(b for b in model.buffers() if b not in index)]),
        gradients=tensor_bytes(p.grad for p in parameters if p.grad is not None),
        optimizer=tensor_bytes(entry for entry in state if isinstance(entry, Tensor)),
        index=tensor_bytes(index),
        method=method,
    )


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
