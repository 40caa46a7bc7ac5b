"""Progress of long work: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

LINE_SECONDS = 10.0
"""A log gets a line about as often, and one at the end of each run."""


class Progress:
    """Shows how far a number of equally long runs have come, on stderr.

    Without tqdm, or when stderr is no terminal, it writes lines.

    Args:
        steps: of one run.
        runs: how many.
        quiet: show nothing.
    """

    def __init__(self, steps: int, runs: int, *, quiet: bool = False) -> None:
        self.steps, self.runs, self.quiet = steps, runs, quiet
        self.ended, self.label = 0, ""
        self._said = time.monotonic()
        self._bar = None if quiet or not sys.stderr.isatty() else _bar(steps * runs)

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

    def begin(self, label: str) -> None:
        """A run begins."""
        self.label = label
        if self._bar is not None:
            self._bar.set_description(label)

    def step(self, done: int) -> None:
        """`done` steps of the run have been taken."""
        if self._bar is not None:
            self._bar.update(self.ended * self.steps + done - self._bar.n)
        elif time.monotonic() - self._said >= LINE_SECONDS:
            self._say(self.ended + 1, f"step {done:,} of {self.steps:,}")

    def end(self, outcome: str) -> None:
        """The run has ended."""
        self.ended += 1
        if self._bar is not None:
            self._bar.set_postfix_str(f"last: {self.label} {outcome}")
        else:
            self._say(self.ended, outcome)

    def _say(self, run: int, text: str) -> None:
        self._said = time.monotonic()
        if not self.quiet:
            sys.stderr.write(f"[{run}/{self.runs}] {self.label}: {text}\n")
            sys.stderr.flush()


def _bar(total: int) -> Any:
    try:
        from tqdm import tqdm  # noqa: PLC0415  an optional extra
    except ImportError:
        return None
    return tqdm(total=total, unit="step", dynamic_ncols=True, file=sys.stderr)
