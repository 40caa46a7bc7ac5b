"""Peak memory of a piece of work, as torch's allocators see it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ALLOCATION = "Allocation"


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
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of each start and stop else
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
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
        if kind.name == ALLOCATION:
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    for _, address, size in sorted(found, key=lambda request: request[0]):
        yield address, size
