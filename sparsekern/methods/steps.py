"""What an optimizer's step is to a method: its closure, and whether it changes weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekern.carry.wrappers import parameters

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What an optimizer's step was called with: positional (itself first) and by name."""


class Closure:
    """A step's closure, run before the step: its gradients decide an update.

    It is handed on in the closure's place. An optimizer asks once, at the start of its step, and
    gets the loss. One that asks again, elsewhere, has the closure run again, unless the batch is
    `spent` on an update: it must find no gradients then.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        with torch.enable_grad():
            self.loss = function()
        self.spent = False
        self._asked = False

    def __call__(self) -> Any:
        """The loss."""
        if self._asked and not self.spent:
            return self.function()
        self._asked = True
        return self.loss


def run_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Closure, Arguments] | None:
    """Run the closure of a step, and give the arguments that stand for those; None if it has none.

    Args:
        args: positional arguments, the optimizer first.
        kwargs: arguments by name.
    """
    for i, argument in enumerate(args[1:], 1):
        if callable(argument):
            closure = Closure(argument)
            return closure, ((*args[:i], closure, *args[i + 1 :]), kwargs)
    function = kwargs.get("closure")
    if not callable(function):
        return None
    closure = Closure(function)
    return closure, (args, kwargs | {"closure": closure})


def changes_weights(chain: Sequence[torch.optim.Optimizer], passed: bool) -> bool:
    """Whether a step of an unwrapped optimizer can change a weight.

    It can't without gradients; nor where GradScaler found an overflow and leaves it to a fused
    optimizer to do nothing (a read of one number from the device); nor is it a step when
    torch.distributed.checkpoint fills an optimizer's state.

    Args:
        chain: the optimizer, and what it wraps.
        passed: a backward pass is known to have come before it.
    """
    if all(p.grad is None for p in parameters(chain)):
        return False
    # GradScaler's word to an optimizer that handles scales by itself
    if any(bool(getattr(optimizer, "found_inf", False)) for optimizer in chain):
        return False
    return passed or not _only_fills_state(chain)


def _only_fills_state(chain: Sequence[torch.optim.Optimizer]) -> bool:
    """Whether a fresh optimizer steps at learning rate 0 with zero gradients: nothing to count."""
    if any(optimizer.state for optimizer in chain):
        return False
    rates = [group["lr"] for group in chain[-1].param_groups if "lr" in group]
    if not all(map(_is_zero, rates)):
        return False
    return not any(bool(p.grad.any()) for p in parameters(chain) if p.grad is not None)


def _is_zero(rate: float | Tensor) -> bool:
    """Without a wait for a device."""
    on_device = isinstance(rate, Tensor) and rate.device.type != "cpu"
    return not on_device and float(rate) == 0


def has_stepped(chain: Sequence[torch.optim.Optimizer]) -> bool:
    """Whether an optimizer's state tells of steps; some make their state before the first."""
    states = [state for optimizer in chain for state in optimizer.state.values() if state]
    return any(float(state.get("step", 1)) > 0 for state in states)
