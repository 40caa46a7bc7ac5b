"""Which methods are attached to which optimizers."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

import torch

from sparsekern.carry.wrappers import unwrapped

if TYPE_CHECKING:
    from sparsekern.methods.loop import Loop

_attached: WeakKeyDictionary[torch.optim.Optimizer, WeakSet[Loop]] = WeakKeyDictionary()


def note(optimizer: torch.optim.Optimizer, loop: Loop) -> None:
    """A method is attached to an optimizer, the innermost one."""
    _attached.setdefault(optimizer, WeakSet()).add(loop)


def attached_to(optimizer: torch.optim.Optimizer) -> Loop | None:
    """The method that the steps of an optimizer, or of what it wraps, drive; None without one."""
    found = (loop for inner in unwrapped(optimizer) for loop in _attached.get(inner, ()))
    return next((loop for loop in found if loop.attached), None)
