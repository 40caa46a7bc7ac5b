"""Backward passes through a method's layers, where its loop needs to know of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class BackwardPasses:
    """Counts the backward passes that reach some parameters.

    Args:
        parameters: those that are frozen now are not looked at.
        on_pass: called at each with the most passes that one parameter has seen.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], on_pass: Callable[[int], None]) -> None:
        self._on_pass = on_pass
        self._seen: dict[int, int] = {}
        self._hooks: list[RemovableHandle] = []
        for parameter in parameters:
            if parameter.requires_grad:
                register: Any = parameter.register_post_accumulate_grad_hook
                self._hooks.append(register(self._count))

    def restart(self) -> None:
        """Count from zero again."""
        self._seen.clear()

    def stop(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _count(self, parameter: nn.Parameter) -> None:
        self._seen[id(parameter)] = n = self._seen.get(id(parameter), 0) + 1
        self._on_pass(n)
