"""Peak memory of a training step: predicted from the lifetimes of its tensors, and measured."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
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
        values_do_not_matter: make up the value of a tensor that is asked for it. For optimizers,
            which ask how many steps they have taken.
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
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
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
            return 0.5 if args[0].is_floating_point() else 1  # no pole of a bias correction
        out = func(*args, **(kwargs or {}))
        self.hold(out)
        self.peak = max(self.peak, self.now + workspace_bytes(func, args))
        return out


def peak_bytes(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes that `run` holds at once of what it allocates itself.

    What was there before does not count, not even when `run` frees it. On the CPU every request to
    torch's allocator is seen, those inside operators too; scratch memory that a library takes from
    the system by itself is not. On CUDA it is the allocator's own peak.

    Args:
        run: called once, with what it needs warmed up.
        device: where it works.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with _quietly(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    held = peak = 0
    alive: dict[int, int] = {}
    for address, size in _requests(record):
        if size > 0:
            alive[address] = size
            held += size
            peak = max(peak, held)
        else:  # the profiler also tells of blocks that an earlier record saw made
            held -= alive.pop(address, 0)
    return peak


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the profiler from telling stderr of each start and stop."""
    name = "KINETO_LOG_LEVEL"
    given = os.environ.get(name)
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]


def _requests(record: profile) -> Iterator[tuple[int, int]]:
    """Address and bytes of what was allocated, and less than 0 of what was freed, in time."""
    results = record.profiler.kineto_results if record.profiler else None
    left = [] if results is None else list(results.experimental_event_tree())
    found = []
    while left:
        event = left.pop()
        left += event.children
        kind = event.typed[0]
        fields: Any = event.typed[1]
        if kind.name == "Allocation":
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    for _, address, size in sorted(found, key=lambda request: request[0]):
        yield address, size
