"""Running jobs in a process that may die: compilers abort, and a fault ends a GPU context.

One process serves job after job, for it takes seconds to start. When it dies or stalls, that costs
the configuration at work, which is reported, and a new one goes on with the rest: checks run again,
from the compiler's cache, so the times that are compared always come from one process.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess  # starts this interpreter with fixed arguments
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Any, Self

from sparsekern.show.environment import ROOT
from sparsekern.tuning.job import Job
from sparsekern.tuning.verdict import Times

WORKER = (sys.executable, "-m", "sparsekern.tuning.measure")
REAP_SECONDS = 15
"""A process with a kernel in flight is slow to die."""
STALL_SECONDS = 180.0
"""Longest silence of a process: a candidate takes seconds to compile, a hanging one all day."""


class OutOfTime(Exception):  # noqa: N818  an interruption, not an error
    """The budget ended in the middle of a job."""


class JobError(Exception):
    """A job could not begin: no configuration is to blame."""


@dataclass
class Outcome:
    """What came of a job.

    Attributes:
        errors: why a configuration was not timed, by index.
        reference: the configuration timed twice; None if none was timed.
        twin: its second times.
        times: of all that are right.
    """

    errors: dict[int, str] = field(default_factory=dict)
    reference: int | None = None
    twin: Times = ()
    times: Mapping[int, Times] = field(default_factory=dict)


class Worker:
    """A process that writes events to stdout, a JSON object a line; it is to be closed.

    Args:
        command: starts it.
        dry_run: whether Triton interprets there; None: as here.

    Attributes:
        code: its exit code, once it has ended.
    """

    def __init__(self, command: Sequence[str], *, dry_run: bool | None = None) -> None:
        self.code: int | None = None
        self._reason = ""
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  closed in `end`
        self._process = subprocess.Popen(  # noqa: S603  this interpreter, fixed arguments
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=_environment(dry_run=dry_run),
            text=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        thread = threading.Thread(
            target=_read, args=(self._process.stdout, self._lines), daemon=True
        )
        thread.start()

    def send(self, line: str) -> None:
        """Hand it a line; one that is dead already is noticed when it does not answer."""
        stdin = self._process.stdin
        if stdin is not None:
            with suppress(BrokenPipeError):
                stdin.write(line + "\n")
                stdin.flush()

    def events(self, stall: float, deadline: float) -> Iterator[dict[str, Any]]:
        """Events up to the end of the process.

        Raises:
            TimeoutError: it was silent for `stall` seconds.
            OutOfTime: the deadline passed.
        """
        while True:
            left = deadline - time.monotonic()
            try:
                line = self._lines.get(timeout=max(0.0, min(stall, left)))
            except queue.Empty:
                raise (OutOfTime if left <= stall else TimeoutError) from None
            if line is None:
                # else `end` might come before its own exit code
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(REAP_SECONDS)
                return
            yield json.loads(line)

    def end(self) -> str:
        """End it, if it is there still; returns its exit code and last words."""
        if self._said.closed:
            return self._reason
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.code = self._process.wait(REAP_SECONDS)
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # what was left in the buffer
                self._process.stdin.close()
        with self._said:
            self._said.seek(0)
            text = self._said.read().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        last = lines[-1][:300] if lines else "nothing on stderr"
        self._reason = f"the process ended with code {self.code}: {last}"
        return self._reason

    close = end


@dataclass
class Runner:
    """Runs jobs; to be closed by leaving its `with` block.

    Attributes:
        command: starts a process that reads jobs from stdin, a line each.
        deadline: on the monotonic clock; `OutOfTime` is raised then.
        stall: seconds of silence after which a process is ended.
    """

    command: Sequence[str] = WORKER
    deadline: float = float("inf")
    stall: float = STALL_SECONDS
    _worker: Worker | None = field(default=None, init=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def run(self, job: Job, on_checked: Callable[[int], None] = lambda _: None) -> Outcome:
        """Run a job to its end, without the configurations that end its process.

        Args:
            job: what to measure.
            on_checked: called with the number of configurations that are checked or have failed.

        Raises:
            OutOfTime: the deadline passed.
            JobError: a process ended before its first configuration.
        """
        outcome = Outcome()
        while True:
            left = job.without(outcome.errors)
            if not left.configs:
                return outcome
            culprit, reason = self._run_once(left, outcome, on_checked)
            if reason is None:
                return outcome
            if culprit is None:
                raise JobError(reason)
            outcome.errors.setdefault(culprit, reason)

    def _run_once(
        self, job: Job, outcome: Outcome, on_checked: Callable[[int], None]
    ) -> tuple[int | None, str | None]:
        """(configuration at work, how the process failed); (None, None) for a finished job."""
        if self._worker is None:
            self._worker = Worker(self.command, dry_run=job.dry_run)
        self._worker.send(job.to_json())
        culprit, handled = None, set(outcome.errors)
        try:
            for event in self._worker.events(self.stall, self.deadline):
                if event["event"] == "begin":
                    culprit = event["index"]
                elif event["event"] == "checked":
                    handled.add(event["index"])
                    on_checked(len(handled))
                    if event["error"] is not None:
                        outcome.errors[event["index"]] = event["error"]
                elif event["event"] == "times":
                    outcome.reference, outcome.twin = event["reference"], event["twin"]
                    outcome.times = {int(i): times for i, times in event["times"].items()}
                elif event["event"] == "refused":
                    return None, event["error"]
                elif event["event"] == "done":
                    return None, None
        except TimeoutError:
            self._end()
            return culprit, f"nothing heard for {self.stall:g} s"
        except BaseException:
            self._end()
            raise
        return culprit, self._end()

    def _end(self) -> str:
        worker, self._worker = self._worker, None
        return worker.end() if worker is not None else ""


def _read(lines: IO[str], into: queue.Queue[str | None]) -> None:
    with lines:
        for line in lines:
            if line.startswith("{"):  # libraries may print there, too
                into.put(line)
    into.put(None)


def _environment(*, dry_run: bool | None) -> dict[str, str]:
    """This environment, in which the child finds the same package."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    found = os.environ | {"PYTHONPATH": path}
    # read when a kernel is decorated, so it must be there before anything is imported
    return found if dry_run is None else found | {"TRITON_INTERPRET": "1" if dry_run else "0"}
