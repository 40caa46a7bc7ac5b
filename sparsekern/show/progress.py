"""Progress of long work: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

LINE_SECONDS = 10.0
"""A log gets a line about as often, and one at the end of each run."""


class Progress:
    """Shows how far a number of runs have come, and when the last will end, on stderr.

    Without tqdm, or when stderr is no terminal, it writes lines. Several runs may go on at a time;
    without a label what is told is of the one that began last.

    Args:
        steps: of one run.
        runs: how many.
        quiet: show nothing.
        total: steps of all runs together, if they are not equally long.
    """

    def __init__(
        self, steps: int, runs: int, *, quiet: bool = False, total: int | None = None
    ) -> None:
        self.steps, self.runs, self.quiet = steps, runs, quiet
        self.total = steps * runs if total is None else total
        self.ended, self.label = 0, ""
        self._over = 0  # steps of the runs that have ended
        self._lengths: dict[str, int] = {}  # of those that go on
        self._done: dict[str, int] = {}
        self._began = self._said = time.monotonic()
        self._moving: tuple[float, int] | None = None
        self._bar = None if quiet or not sys.stderr.isatty() else _bar(self.total)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, label: str, steps: int | None = None) -> None:
        """A run begins, of `steps` if they are not those of all."""
        self.label = label
        self._lengths[label] = self.steps if steps is None else steps
        self._done[label] = 0
        if self._bar is not None:
            self._bar.set_description(label)

    def step(self, done: int, label: str | None = None) -> None:
        """`done` steps of the run have been taken."""
        label = self.label if label is None else label
        self._done[label] = done
        if self._moving is None:  # what is left is told from here on: processes took time to start
            self._moving = (time.monotonic(), self._so_far())
        if self._bar is not None:
            self._bar.update(self._so_far() - self._bar.n)
        elif time.monotonic() - self._said >= LINE_SECONDS:
            text = f"step {done:,} of {self._lengths.get(label, self.steps):,}"
            self._say(label, self.ended + 1, text)

    def end(self, outcome: str, label: str | None = None) -> None:
        """The run has ended."""
        label = self.label if label is None else label
        self.ended += 1
        self._over += self._lengths.pop(label, self.steps)
        self._done.pop(label, None)
        if self._bar is not None:
            self._bar.update(self._so_far() - self._bar.n)
            self._bar.set_postfix_str(f"last: {label} {outcome}")
        else:
            self._say(label, self.ended, outcome)

    def _so_far(self) -> int:
        return self._over + sum(self._done.values())

    def _say(self, label: str, run: int, text: str) -> None:
        self._said = time.monotonic()
        if not self.quiet:
            sys.stderr.write(f"[{run}/{self.runs}] {label}: {text}; {self._times()}\n")
            sys.stderr.flush()

    def _times(self) -> str:
        now, done = time.monotonic(), self._so_far()
        since, before = self._moving or (self._began, 0)
        so_far = f"{span(now - self._began)} so far"
        if done == before or self.ended == self.runs:
            return so_far
        left = (now - since) / (done - before) * (self.total - done)
        return f"{so_far}, about {span(left)} left"


def span(seconds: float) -> str:
    """A time that people read: 40 s, 12 min, 3 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def _bar(total: int) -> Any:
    try:
        from tqdm import tqdm  # noqa: PLC0415  an optional extra
    except ImportError:
        return None
    return tqdm(total=total, unit="step", dynamic_ncols=True, file=sys.stderr)
