"""Measured time of training steps, in turn with a baseline's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


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
    steps: Mapping[str, Callable[[], object]],
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
        rounds: bursts of each; their order is reversed every other round.
        burst: steps in a burst.
    """
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 1):
        for name in names if i % 2 else reversed(names):
            seconds = _timed(steps[name], burst, device)
            if i:  # the first round warms up
                times[name].append(seconds)
    return {
        name: StepTime(
            seconds=statistics.median(taken),
            ratio=statistics.median(
                t / base for t, base in zip(taken, times[baseline], strict=True)
            ),
        )
        for name, taken in times.items()
    }


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given; nothing to do on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(step: Callable[[], object], burst: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(burst):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / burst
