"""Optimizers that hold another one: who takes the step, and where state lies."""

from __future__ import annotations

from typing import Any

import torch


def unwrapped(optimizer: Any) -> tuple[torch.optim.Optimizer, ...]:
    """An optimizer and all that it wraps, outermost first, the one that takes the step last.

    A wrapper keeps the other one in an attribute, whatever its name: `optimizer`
    (AcceleratedOptimizer, Lookahead), `optim` (ZeroRedundancyOptimizer), `base_optimizer` (SAM).
    """
    found: list[torch.optim.Optimizer] = [optimizer]
    for held in found:  # grows while it is walked
        found += [
            inner
            for inner in vars(held).values()
            if isinstance(inner, torch.optim.Optimizer)
            and not any(inner is known for known in found)
        ]
    return tuple(found)
