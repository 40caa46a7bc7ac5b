"""Who carries out cases: a process of its own, which may die of one, or this process.

A process is told a case at a time and answers with rows. If it dies of a case or keeps silent, the
case has failed, its rows so far stand, and a fresh process goes on with the next one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.gpu.agenda import Case, Row
from sparsekern.errors import told
from sparsekern.tuning.processes import OutOfTime, Worker

START_SECONDS = 60  # until a process answers at all: torch and the GPU are slow to wake


class Answer(NamedTuple):
    """What came of a case.

    Attributes:
        error: why it did not come to its end; None if it did.
        compiled: kernels found in the cache and kernels compiled, so far in its process.
    """

    rows: list[Row]
    error: str | None
    seconds: float
    compiled: dict[str, float] | None = None


class Here:
    """Cases in this process, as for a dry run."""

    def __init__(self, bench: Callable[[float], Any]) -> None:
        self._bench = bench

    def do(self, case: Case, silence: float, until: float) -> Answer:
        """Carry out one case, to the end whatever it takes."""
        del silence
        begin, rows, error = time.monotonic(), list[Row](), None
        try:
            rows.extend(case.run(self._bench(until)))
        except Exception as failure:  # reported, and the next case goes on
            error = told(failure)[:500]
        return Answer(rows, error, time.monotonic() - begin)

    def close(self) -> None:
        """Nothing is held."""


class Apart:
    """Cases in a process, a new one after each that dies."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._worker: Worker | None = None

    def do(self, case: Case, silence: float, until: float) -> Answer:
        """Carry out one case; nothing goes on after `until` on the monotonic clock."""
        begin, rows = time.monotonic(), list[Row]()
        if self._worker is None:
            self._worker, silence = Worker(self._command), silence + START_SECONDS
        self._worker.send(json.dumps({"case": case.name, "seconds": until - begin}))
        try:
            for event in self._worker.events(silence, until):
                if "row" in event:
                    rows.append(event["row"])
                    continue
                if event["lost"]:
                    self.close()
                taken = time.monotonic() - begin
                return Answer(rows, event["error"], taken, event["compiled"])
            error = self._worker.end()
        except TimeoutError:
            error = f"no answer for {silence:g} s"
        except OutOfTime:
            error = "the time was up"
        self.close()
        return Answer(rows, error, time.monotonic() - begin)

    def close(self) -> None:
        """End the process."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()
