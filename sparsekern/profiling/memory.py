"""Peak memory of a training step: predicted from the lifetimes of its tensors, and measured."""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsekern.ops.workspace import workspace_bytes


class Lifetimes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Follows every storage that an operator returns from its making to its end.

    With fake tensors nothing is allocated, and the peak is a prediction: bytes of all storages
    alive at once, and what a sparse operator needs beside its results while it runs.

    Attributes:
        now: bytes alive.
        peak: most bytes alive at once since `restart`.
        values_do_not_matter: answer 1 to what asks a tensor for its value. For optimizers, which
            ask how many steps they have taken.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self.values_do_not_matter = False
        self._alive: dict[int, Any] = {}

    def hold(self, value: Any) -> None:
        """Follow the tensors among these from now on."""
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)

    def restart(self) -> None:
        """Forget the peak."""
        self.peak = self.now

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self.now += size

        def ended(_ref: Any) -> None:
            self.now -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, ended)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator and follow its results."""
        if self.values_do_not_matter and func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **(kwargs or {}))
        self.hold(out)
        self.peak = max(self.peak, self.now + workspace_bytes(func, args))
        return out


def measured_peak(step: Any, device: torch.device) -> int:
    """Most bytes that torch's allocator handed out during `step()`, beyond those it held before.

    On a GPU the allocator counts by itself; on the CPU torch's profiler records every block that is
    handed out and given back.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells stderr when it starts and stops
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True, acc_events=True) as profiler:
        step()
    recorded: Any = profiler.profiler
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
