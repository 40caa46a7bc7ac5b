"""What a run does with its time: parts in order of worth, each for its share, then what is left."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.gpu import report
from benchmarks.gpu.agenda import Case, Part
from benchmarks.gpu.cases import DRY, FULL
from benchmarks.gpu.clocks import Clocks
from benchmarks.gpu.hands import Answer, Apart, Here
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.store import Store

INCOMPLETE = "not checked"  # of a row that waits for another part


def say(text: str) -> None:
    """A line at once, also into a pipe."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@dataclass
class Run:
    """One run.

    Attributes:
        store: where rows go; written after every case.
        end: on the monotonic clock.
        hands: makes what carries out cases.
        digests: of the sources of each part.
        taken: seconds by part.
        compiled: what each process has found in the cache and compiled.
    """

    store: Store
    device: torch.device
    dry: bool
    end: float
    hands: Callable[[], Here | Apart]
    clocks: Clocks
    digests: dict[str, str]
    taken: dict[str, float] = field(default_factory=dict)
    compiled: dict[int, dict[str, float]] = field(default_factory=dict)
    begin: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _single: Here | Apart | None = None

    def cases(self, name: str) -> list[Case]:
        """Of a part."""
        return PARTS[name].cases(DRY if self.dry else FULL, self.device)

    def pending(self, name: str) -> list[Case]:
        """Of a part: what is not done, those that failed in another run last."""
        left = [c for c in self.cases(name) if not self.store.done(c.name, self.digests[name])]
        return sorted(left, key=lambda case: self._failed(case, self.digests[name]))

    def _failed(self, case: Case, digest: str) -> bool:
        before = self.store.cases.get(case.name)
        return before is not None and before["digest"] == digest

    def turn(self, names: Sequence[str], *, first: bool) -> None:
        """Each part in turn; in the first one for its share of the time at most."""
        for name in names:
            part, begin = PARTS[name], time.monotonic()
            until = min(self.end, begin + part.seconds) if first and not self.dry else self.end
            # what failed in this run is not tried again in it
            todo = [c for c in self.pending(name) if first or not self._tried(c)]
            if not todo:
                continue
            self._do(name, part, todo, until)
            self.store.save()
            seconds = time.monotonic() - begin
            self.taken[name] = self.taken.get(name, 0.0) + seconds
            left = len(self.pending(name))
            say(f"[{name}] {seconds:.0f} s of {part.seconds}" + (f", {left} left" if left else ""))

    def _tried(self, case: Case) -> bool:
        before = self.store.cases.get(case.name)
        if before is None or before["error"] == INCOMPLETE:
            return False
        return bool(before["run"] == len(self.store.runs) - 1)

    def _do(self, name: str, part: Part, todo: list[Case], until: float) -> None:
        waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
        for case in todo:
            waiting.put(case)
        many = 1 if self.dry else min(part.workers, len(todo))
        if many == 1:
            if self._single is None:
                self._single = self.hands()
            self._serve(name, part, waiting, until, self._single)
            return
        own = [self.hands() for _ in range(many)]
        given = [(name, part, waiting, until, hand) for hand in own]
        threads = [threading.Thread(target=self._serve, args=args) for args in given]
        for thread in threads:
            thread.start()
        for thread, hand in zip(threads, own, strict=True):
            thread.join()
            hand.close()

    def _serve(
        self,
        name: str,
        part: Part,
        waiting: queue.SimpleQueue[Case],
        until: float,
        hand: Here | Apart,
    ) -> None:
        while not waiting.empty():
            try:
                case = waiting.get_nowait()
            except queue.Empty:  # another one was faster
                return
            if time.monotonic() + case.seconds > until and not self.dry:
                continue  # a shorter one may fit
            begin = time.monotonic()
            if begin >= until:
                return
            answer = hand.do(case, part.silence, self.end)
            self._keep(name, case, answer, begin, hand)

    def _keep(
        self, name: str, case: Case, answer: Answer, begin: float, hand: Here | Apart
    ) -> None:
        rows = list(answer.rows)
        error = answer.error
        if error is not None:
            facts = {"what": case.name} | (case.lost or {})
            rows.append(facts | {"status": f"failed: {error}", "detail": error, "ms": None})
        elif any(row.get("status") == INCOMPLETE for row in rows):
            error = INCOMPLETE
        found = {"part": name, "digest": self.digests[name], "run": len(self.store.runs) - 1}
        found |= {"seconds": round(answer.seconds, 3), "clocks": self.clocks.since(begin)}
        with self._lock:
            self.store.put(case.name, found | {"error": error, "rows": rows})
            if answer.compiled is not None:
                self.compiled[id(hand)] = dict(answer.compiled)
            at = f"[{name} {time.monotonic() - self.begin:4.0f} s]"
            for row in rows:
                if row.get("ok") is not True:
                    say(f"{at} {report.line(row)}")

    def note(self, names: Sequence[str]) -> None:
        """Write down what this run has done, and what it left."""
        total = {
            what: sum(one[what] for one in self.compiled.values())
            for what in ("found", "made", "seconds")
        }
        self.store.runs[-1] |= {
            "seconds": round(time.monotonic() - self.begin, 1),
            "taken": {name: round(seconds, 1) for name, seconds in self.taken.items()},
            "left": {name: [c.name for c in self.pending(name)] for name in names},
            "kernels": total,
        }
        self.store.save()

    def close(self) -> None:
        """End what still serves."""
        if self._single is not None:
            self._single.close()
