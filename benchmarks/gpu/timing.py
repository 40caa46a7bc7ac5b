"""Clocks: CUDA events on a GPU, the host's counter in a dry run.

A CUDA timing empties the L2 cache, keeps the GPU asleep for half a millisecond so that Python has
queued everything by the time the first event fires, and so measures the device alone. What a call
costs on the host shows in `wall`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch

Run = Callable[[], Any]
cuda: Any = torch.cuda  # half of it is untyped

FLUSH_BYTES = 2**28  # several times any L2 cache
SLEEP_CYCLES = 4_000_000  # 2 ms: the host is done launching before the first event
CASE_SECONDS = 1.0  # a slow case takes fewer rounds
FEWEST_ROUNDS = 3
WARM_UPS = 3


class Clock(Protocol):
    """Times functions that take turns."""

    def once(self, run: Run) -> float:
        """Seconds of one call."""

    def wall(self, run: Run, repeats: int) -> float:
        """Seconds per call of calls made one after another, with what Python costs."""

    def capture(self, run: Run) -> tuple[Run, Any]:
        """A function that repeats `run` at once, and the results it writes to."""


class CudaClock:
    """Device time by events."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def once(self, run: Run) -> float:
        """Seconds of one call on the device, with a cold L2 cache."""
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.sum()  # read: lines that were written would have to be written back first
        cuda._sleep(SLEEP_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e-3 * float(start.elapsed_time(end))

    def wall(self, run: Run, repeats: int) -> float:
        """Seconds per call on the host's clock, from an idle GPU to an idle GPU."""
        run()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / repeats

    def capture(self, run: Run) -> tuple[Run, Any]:
        """A CUDA graph of `run`, as torch's notes on whole-network capture make it."""
        side = cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()
        return graph.replay, results


class HostClock:
    """The host's counter: for dry runs, where a time means nothing."""

    def once(self, run: Run) -> float:
        """Seconds of one call."""
        return self.wall(run, 1)

    def wall(self, run: Run, repeats: int) -> float:
        """Seconds per call."""
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - begin) / repeats

    def capture(self, run: Run) -> tuple[Run, Any]:
        """There are no graphs here: `run` itself."""
        return run, run()


class Timing(NamedTuple):
    """Seconds of each round, by name; all names share their rounds."""

    rounds: dict[str, list[float]]

    def ms(self, name: str) -> float:
        """Median milliseconds."""
        return 1e3 * statistics.median(self.rounds[name])

    def ratios(self, slow: str, fast: str) -> list[float]:
        """How many times as long `slow` took as `fast`, round by round, ascending."""
        pairs = zip(self.rounds[slow], self.rounds[fast], strict=True)
        return sorted(a / b for a, b in pairs)


def take_turns(clock: Clock, runs: Mapping[str, Run], rounds: int) -> Timing:
    """Time all `runs` in turns, so that a GPU whose clock drifts moves all of them.

    Slow ones get fewer rounds, odd rounds go backwards.
    """
    warm = WARM_UPS if rounds > 1 else 1
    for run in runs.values():
        for _ in range(warm):
            run()
    each = sum(clock.once(run) for run in runs.values()) if rounds > 1 else 0.0
    rounds = min(rounds, max(FEWEST_ROUNDS, int(CASE_SECONDS / each))) if each else rounds
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds):
        order = list(runs) if index % 2 == 0 else list(runs)[::-1]
        for name in order:
            taken[name].append(clock.once(runs[name]))
    return Timing(taken)
