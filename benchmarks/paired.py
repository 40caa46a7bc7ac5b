"""What the suite times beside a benchmark, and how a ratio is told."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sparsekern.cost import timing


class Run(NamedTuple):
    """Something to time.

    Attributes:
        call: what is timed.
        prepare: what comes before it, not timed.
    """

    call: Callable[[], Any]
    prepare: Callable[[], object] | None = None

    def seconds(self) -> float:
        """Wall time of one call."""
        if self.prepare is not None:
            self.prepare()
        return timing.HostClock().once(self.call)


class Beside:
    """Times others before each round of a benchmark: the `setup` of `benchmark.pedantic`.

    Args:
        others: by name; the one that begins changes from round to round.
        then: called last, so that the benchmark's own round finds everything ready.
    """

    def __init__(self, others: Mapping[str, Run], then: Callable[[], object] | None = None) -> None:
        self.others, self.then = dict(others), then
        self.times: dict[str, list[float]] = {name: [] for name in others}
        self.rounds = 0

    def __call__(self) -> None:
        """Take a time of each."""
        for name in timing.order(list(self.others), self.rounds):
            self.times[name].append(self.others[name].seconds())
        self.rounds += 1
        if self.then is not None:
            self.then()


def ratios(others: Sequence[float], own: Sequence[float]) -> dict[str, float]:
    """Times of another over those of the same rounds: median, quartiles and extremes.

    Raises:
        ValueError: the two have different lengths, or none at all.
    """
    found = timing.ratios(others, own)
    q1, median, q3 = quartiles(found)
    return {"ratio": median, "q1": q1, "q3": q3, "low": found[0], "high": found[-1]}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles, of the values themselves as the whole population; one value is all three.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("quartiles need at least one value; got none")
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3
