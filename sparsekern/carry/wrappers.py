"""Optimizers that hold another one: who takes the step, and where state lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from sparsekern.errors import OptimizerError


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


def parameters(chain: Sequence[torch.optim.Optimizer]) -> Iterator[torch.Tensor]:
    """All that an unwrapped optimizer steps; a shard of ZeRO's holds but a part, ZeRO itself all.

    A parameter that several of them hold comes several times.
    """
    for optimizer in chain:
        for group in optimizer.param_groups:
            yield from group["params"]


def check_holds(
    optimizers: Sequence[torch.optim.Optimizer], name: str, values: nn.Parameter
) -> None:
    """Raise `OptimizerError` unless one optimizer, and one only, updates `values` of a layer."""
    holders = sum(any(p is values for p in parameters(unwrapped(o))) for o in optimizers)
    if holders == 1:
        return
    if len(optimizers) == 1:
        who = "the optimizer must hold `values` of layer {!r}; it does not"
    else:
        who = "exactly one of the optimizers must hold `values` of layer {!r}; {} do"
    raise OptimizerError(
        f"{who.format(name, holders)} (build it after sparsify_, from model.parameters())"
    )


def check_steps(optimizer: torch.optim.Optimizer) -> None:
    """Raise `OptimizerError` if hooks on an optimizer can't follow its steps."""
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise OptimizerError(
            "a method must see the optimizer's steps; ZeroRedundancyOptimizer with "
            "overlap_with_ddp=True takes them inside backward"
        )
    taker = unwrapped(optimizer)[-1]
    if not has_hooks(taker):
        raise OptimizerError(
            f"{type(taker).__name__} has no step hooks: its __init__ must call Optimizer.__init__"
        )


def has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks can be registered: a wrapper may leave out Optimizer.__init__."""
    return "_optimizer_step_pre_hooks" in vars(optimizer)
