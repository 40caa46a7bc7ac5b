"""Cases that may hang or crash, carried out in processes that may die of it.

A worker is told the numbers of its cases and prints one JSON object per case, in that order, one to
a line. A case whose worker dies or keeps silent has failed; a fresh worker goes on after it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from sparsekern.tuning.processes import OutOfTime, Worker

Found = dict[str, Any]

MOST_DEATHS = 4  # a kernel that takes that many processes with it will take more
LOST_DEVICE = 75  # exit code of a worker that answered, but can't go on: nobody is to blame


def supervised(
    command: Sequence[str], cases: Sequence[int], silence: float, until: float
) -> Iterator[Found]:
    """One answer per case, in order, whatever happens.

    Args:
        command: of the worker; the numbers of its cases are appended.
        cases: the numbers.
        silence: seconds without an answer after which a worker is killed.
        until: on the monotonic clock; nothing goes on after it.
    """
    waiting, deaths = list(cases), 0
    while waiting and deaths < MOST_DEATHS and time.monotonic() < until:
        before, reason = len(waiting), f"no answer after {silence:g} s"
        with closing(Worker([*command, *map(str, waiting)])) as worker:
            try:
                for answer in worker.events(silence, until):
                    waiting.pop(0)
                    yield answer
                    if not waiting:
                        return
                reason = worker.end()
            except TimeoutError:
                worker.end()
            except OutOfTime:
                break
        deaths += 1
        if worker.code != LOST_DEVICE or len(waiting) == before:
            waiting.pop(0)
            yield {"status": f"failed: {reason}"}
    why = "out of time" if deaths < MOST_DEATHS else f"{deaths} processes died before it"
    for _ in waiting:
        yield {"status": f"not run: {why}"}
