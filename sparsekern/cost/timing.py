"""Times taken in turns: what is compared is measured side by side.

A machine whose speed drifts moves all of them, so ratios are taken round by round, and the median
of the ratios is what counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

T = TypeVar("T")
Run = Callable[[], Any]
cuda: Any = torch.cuda  # half of it is untyped

FLUSH_BYTES = 2**28  # several times any L2 cache
SLEEP_CYCLES = 4_000_000
WARM_UPS = 3


class Clock(Protocol):
    """Times functions."""

    def once(self, run: Run) -> float:
        """Seconds of one call."""

    def wall(self, run: Run, repeats: int = 1) -> float:
        """Seconds per call of calls made one after another, with what Python costs."""

    def capture(self, run: Run) -> tuple[Run, Any]:
        """A function that repeats `run` at once, and the results it writes to."""


class HostClock:
    """The host's counter, from an idle device to an idle device.

    Args:
        device: to wait for; nothing to wait for on the CPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")

    def once(self, run: Run) -> float:
        """Seconds of one call."""
        return self.wall(run)

    def wall(self, run: Run, repeats: int = 1) -> float:
        """Seconds per call."""
        synchronize(self.device)
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        synchronize(self.device)
        return (time.perf_counter() - begin) / repeats

    def capture(self, run: Run) -> tuple[Run, Any]:
        """There are no graphs here: `run` itself."""
        return run, run()


class CudaClock(HostClock):
    """Device time by events.

    A timing empties the L2 cache and keeps the GPU asleep for 2 ms, so that Python has queued
    everything by the time the first event fires, and so measures the device alone. What a call
    costs on the host shows in `wall`.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
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

    def wall(self, run: Run, repeats: int = 1) -> float:
        """Seconds per call, after one that warms up."""
        run()
        return super().wall(run, repeats)

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


def clock_of(device: torch.device) -> Clock:
    """Events on a GPU, the host's counter elsewhere."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


class Timing(NamedTuple):
    """Seconds of each round, by name; all names share their rounds."""

    rounds: dict[str, list[float]]

    def seconds(self, name: str) -> float:
        """The median."""
        return statistics.median(self.rounds[name])

    def ms(self, name: str) -> float:
        """Median milliseconds."""
        return 1e3 * self.seconds(name)

    def ratios(self, slow: str, fast: str) -> list[float]:
        """How many times as long `slow` took as `fast`, round by round, ascending."""
        return ratios(self.rounds[slow], self.rounds[fast])


def ratios(others: Sequence[float], own: Sequence[float]) -> list[float]:
    """Times of another over those of the same rounds, ascending."""
    return sorted(other / mine for other, mine in zip(others, own, strict=True))


def order(names: Sequence[T], turn: int) -> list[T]:
    """The order of a turn: each begins with the next name."""
    first = turn % len(names) if names else 0
    return [*names[first:], *names[:first]]


def turns(names: Sequence[T], count: int, warm_up: int = 0) -> Iterator[tuple[int, T]]:
    """(turn, name): every name once in each turn; turns below 0 warm up."""
    for turn in range(-warm_up, count):
        for name in order(names, turn):
            yield turn, name


def take_turns(
    once: Callable[[Run], float], runs: Mapping[str, Run], rounds: int, warm_up: int = 1
) -> Timing:
    """Time all `runs` in turns, so that a machine whose clock drifts moves all of them."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn, name in turns(list(runs), rounds, warm_up):
        seconds = once(runs[name])
        if turn >= 0:
            taken[name].append(seconds)
    return Timing(taken)


def rounds_in(seconds: float, each: float, least: int, most: int) -> int:
    """How many rounds of `each` seconds to take in about so many."""
    return min(max(int(seconds / each), least), most)


@dataclass(frozen=True)
class StepTime:
    """Median time of a training step, and median ratio to the baseline beside it.

    Attributes:
        seconds: of one step.
        ratio: to the baseline's step measured in the same round.
    """

    seconds: float
    ratio: float


def paired_step_times(
    steps: Mapping[str, Run],
    baseline: str,
    *,
    device: torch.device,
    rounds: int = 30,
    burst: int = 5,
) -> dict[str, StepTime]:
    """Time short bursts of steps in turn.

    Each ratio is between neighbours in time, so a machine that drifts favours nobody.

    Args:
        steps: a training step by name, warmed up.
        baseline: whose time the ratios divide by.
        device: to wait for at the end of a burst.
        rounds: bursts of each.
        burst: steps in a burst.
    """
    clock = HostClock(device)
    timing = take_turns(lambda step: clock.wall(step, burst), steps, rounds)
    return {
        name: StepTime(timing.seconds(name), statistics.median(timing.ratios(name, baseline)))
        for name in steps
    }


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given; nothing to do on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
