"""The training loop's side of a method: an optimizer's steps, counted and followed by hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch.utils.hooks import RemovableHandle

from sparsekern.errors import ConfigError, TrainingLoopError
from sparsekern.methods.schedule import UpdateSchedule
from sparsekern.ops.ranges import ranged

_attached: WeakKeyDictionary[torch.optim.Optimizer, WeakSet[Loop]] = WeakKeyDictionary()


class Loop:
    """Follows an optimizer's steps by hooks, so that a training loop does not change.

    It knows when an update is due, and leaves to its subclass what an update is.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, schedule: UpdateSchedule, step_on_update: bool
    ) -> None:
        if any(loop.attached for loop in _attached.get(optimizer, ())):
            raise ConfigError(
                "the optimizer has a method attached already; detach() that one first"
            )
        self.optimizer, self.schedule = optimizer, schedule
        self.step_on_update = step_on_update
        self.weight_steps = 0
        self.last_update: int | None = None
        self._took_step = False
        self._hooks: list[RemovableHandle] = []

    # ---- for the subclass

    def _watch(self, due: bool) -> None:
        """Called before each batch: whether its gradients will be asked for."""
        raise NotImplementedError

    def _ready(self) -> bool:
        """Whether a due update can be made now; if not, it waits for the next batch."""
        raise NotImplementedError

    def _update(self) -> None:
        """Make the update."""
        raise NotImplementedError

    # ---- for the training loop

    @property
    def attached(self) -> bool:
        """Whether the optimizer's steps still drive this method."""
        return bool(self._hooks)

    @property
    def due(self) -> bool:
        """Whether the next optimizer step is an update step."""
        return self.schedule.is_due(self.weight_steps, self.last_update)

    def step(self) -> bool:
        """Update the topology now if an update is due; returns whether it did.

        The optimizer's hooks call this; calling it by hand after backward does no harm. With
        `step_on_update` the update belongs after the weight step, so only the hooks make it.
        """
        if self.step_on_update or not self._update_if_due():
            return False
        # the batch is spent: without gradients the optimizer takes no weight step either
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def __call__(self) -> bool:
        """For loops written as `if method(): optimizer.step()`: False after an update step."""
        if self.step_on_update:
            return True
        return not self.step()

    def detach(self) -> None:
        """Remove the hooks: training goes on with the topology as it is."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._watch(False)

    def state_dict(self) -> dict[str, Any]:
        """Progress of the schedule; topologies and values are in the model's own state_dict."""
        return {"weight_steps": self.weight_steps, "last_update": self.last_update}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume the schedule.

        Raises:
            ConfigError: keys are missing or unknown, or a value is no step count.
        """
        if set(state) != {"weight_steps", "last_update"}:
            raise ConfigError(
                f"method state must have keys weight_steps, last_update; got {sorted(state)}"
            )
        steps, last = state["weight_steps"], state["last_update"]
        if type(steps) is not int or steps < 0 or not (last is None or type(last) is int):
            raise ConfigError(f"method state must hold step counts; got {dict(state)}")
        self.weight_steps, self.last_update = steps, last
        self._watch(self.due)

    # ---- hooks

    def _attach(self) -> None:
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]
        _attached.setdefault(self.optimizer, WeakSet()).add(self)
        self._watch(self.due)

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if any(callable(a) for a in (*args, kwargs.get("closure"))):
            raise TrainingLoopError(
                "a topology update needs the gradients before optimizer.step(); got a closure: "
                "call backward first"
            )
        if not self.step_on_update:
            self.step()
        self._took_step = any(
            p.grad is not None for group in optimizer.param_groups for p in group["params"]
        )

    def _after_step(self, *_: Any) -> None:
        if not self._took_step:
            return
        if self.step_on_update:
            self._update_if_due()
        self.weight_steps += 1
        self._watch(self.due)

    def _update_if_due(self) -> bool:
        if not (self.due and self._ready()):
            return False
        with ranged("update"):
            self._update()
        self.last_update = self.weight_steps
        self._watch(self.due)
        return True
