"""Where two times cross: between measured densities, and along a prediction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

HALVINGS = 50


class BreakEven(NamedTuple):
    """The largest density at which sparse is no slower than dense.

    Attributes:
        density: 0.0 if dense is faster at every density.
        bound: "" if it was found; ">=" or "<=" if measuring stopped on that side of it.
    """

    density: float
    bound: str = ""

    def __str__(self) -> str:
        return f"{self.bound}{self.density:.2g}"


def last_that_holds(
    holds: Callable[[float], bool], low: float, high: float, halvings: int = HALVINGS
) -> float:
    """The largest number up to `high` for which it holds, if it holds up to one and not beyond.

    `low` is taken to hold.
    """
    if holds(high):
        return high
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def break_even(speeds: Iterable[tuple[float, float]]) -> BreakEven | None:
    """From measured (density, dense time / sparse time); None without any.

    Between the last density at which sparse is no slower and the next, time is taken for a power of
    density: a straight line of logarithms.
    """
    points = sorted(speeds)
    if not points:
        return None
    if points[-1][1] >= 1:
        density = points[-1][0]
        return BreakEven(density, "" if density == 1 else ">=")
    for (d0, s0), (d1, s1) in reversed(list(itertools.pairwise(points))):
        if s0 >= 1 > s1:
            share = math.log(s0) / (math.log(s0) - math.log(s1))
            return BreakEven(d0 * (d1 / d0) ** share)
    return BreakEven(points[0][0], "<=")
