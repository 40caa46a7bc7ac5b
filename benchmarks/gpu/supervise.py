"""Cases that may hang or crash, carried out in processes that may die of it.

A worker is told the numbers of its cases and prints one JSON object per case, in that order, one to
a line. A case whose worker dies or keeps silent has failed; a fresh worker goes on after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from sparsekern.show.environment import ROOT

Found = dict[str, Any]

MOST_DEATHS = 4  # a kernel that takes that many processes with it will take more
REAP_SECONDS = 15  # a process with a kernel in flight is slow to die
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
        before, reason = len(waiting), _Reason()
        worker = [*command, *map(str, waiting)]
        with contextlib.closing(_answers(worker, silence, until, reason)) as answers:
            for answer in answers:
                waiting.pop(0)
                yield answer
                if not waiting:
                    return
        if time.monotonic() >= until:
            break
        deaths += 1
        if reason.code != LOST_DEVICE or len(waiting) == before:
            waiting.pop(0)
            yield {"status": f"failed: {reason.text}"}
    why = "out of time" if deaths < MOST_DEATHS else f"{deaths} processes died before it"
    for _ in waiting:
        yield {"status": f"not run: {why}"}


class _Reason:
    """Why a worker ended: filled in when it has."""

    code: int | None = None
    text: str = ""


def _answers(command: list[str], silence: float, until: float, reason: _Reason) -> Generator[Found]:
    """What one worker answers, as it comes; it is gone afterwards."""
    worker = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    )
    last = ""
    try:
        for line in _lines(worker, silence, until):
            if line.startswith("{"):
                yield json.loads(line)
            else:
                last = line.strip() or last  # of a traceback, or a compiler's last words
        reason.code = worker.wait(REAP_SECONDS)
        reason.text = f"exit {reason.code}: {last}"[:300]
    except TimeoutError as error:
        reason.text = str(error)
    finally:
        worker.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(REAP_SECONDS)
        if worker.stdout is not None:
            worker.stdout.close()


def _lines(worker: subprocess.Popen[bytes], silence: float, until: float) -> Iterator[str]:
    """Whole lines; raises TimeoutError if none comes."""
    assert worker.stdout is not None
    pipe, rest, heard = worker.stdout.fileno(), b"", time.monotonic()
    while True:
        limit = min(heard + silence, until)
        ready = select.select([pipe], [], [], max(0.0, limit - time.monotonic()))[0]
        if not ready:
            raise TimeoutError(f"no answer after {time.monotonic() - heard:.0f} s")
        chunk = os.read(pipe, 1 << 16)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        if any(line.startswith(b"{") for line in lines):  # warnings are no sign of progress
            heard = time.monotonic()
        for line in lines:
            yield line.decode(errors="replace")
