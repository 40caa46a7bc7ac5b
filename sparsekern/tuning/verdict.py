"""When one configuration counts as faster than another: a pure function of paired times.

In every round each configuration is timed once, and the reference twice. What counts is the median
over rounds of a configuration's time divided by the reference's in the same round, so that clocks
and neighbours that change between rounds cancel. Noise is what the same median leaves of a
configuration against itself: the median distance from 1 of the reference's second time divided by
its first, and never less than `LEAST_NOISE`. Faster means: below 1 by more than the noise. The
driver asks for that twice, as the best of many owes its place partly to luck.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LEAST_NOISE = 0.01

Times = Sequence[Sequence[float]]
"""Seconds: for each problem, those of all rounds."""


@dataclass(frozen=True)
class Verdict:
    """What a batch of times says.

    Attributes:
        reference: the configuration that the ratios are to.
        best: the one with the smallest ratio; the reference, if none is faster.
        ratio: of the best.
        noise: by which a ratio must lie below 1 to count.
        ratios: of all, geometric means over problems.
    """

    reference: int
    best: int
    ratio: float
    noise: float
    ratios: Mapping[int, float] = field(default_factory=dict)

    @property
    def is_faster(self) -> bool:
        """Whether the best is faster than the reference by more than the noise."""
        return self.best != self.reference


def judge(reference: int, twin: Times, times: Mapping[int, Times]) -> Verdict:
    """Compare configurations, timed in the same rounds.

    Args:
        reference: index in `times` of the configuration to beat.
        twin: its second times.
        times: by configuration.
    """
    base = times[reference]
    ratios = {i: _ratio(seconds, base) for i, seconds in times.items()}
    noise = max(LEAST_NOISE, *(_spread(a, b) for a, b in zip(twin, base, strict=True)))
    best = min(ratios, key=lambda i: (ratios[i], i))
    if ratios[best] >= 1 - noise:
        best = reference
    return Verdict(reference, best, ratios[best], noise, ratios)


def _ratio(times: Times, base: Times) -> float:
    medians = [
        statistics.median(t / b for t, b in zip(a, reference, strict=True))
        for a, reference in zip(times, base, strict=True)
    ]
    return math.prod(medians) ** (1 / len(medians))


def _spread(twin: Sequence[float], base: Sequence[float]) -> float:
    return statistics.median(abs(t / b - 1) for t, b in zip(twin, base, strict=True))
