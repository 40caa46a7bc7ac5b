"""Clocks, temperature and power beside what is timed, as nvidia-smi tells them."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading
import time
from types import TracebackType
from typing import IO, NamedTuple, Self

FIELDS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "celsius": "temperature.gpu",
    "watts": "power.draw",
}
EVERY_MS = 200


class Sample(NamedTuple):
    """What was read at a time of the monotonic clock; None for what the driver does not tell."""

    at: float
    values: tuple[float | None, ...]


class Clocks:
    """Reads them from a process in the background, which is ended on leaving its `with` block."""

    def __init__(self) -> None:
        self._samples: list[Sample] = []
        self._process: subprocess.Popen[str] | None = None
        self._reader = threading.Thread()

    def __enter__(self) -> Self:
        smi = shutil.which("nvidia-smi")
        if smi is not None:
            query = f"--query-gpu={','.join(FIELDS.values())}"
            options = ["--format=csv,noheader,nounits", "--id=0", f"--loop-ms={EVERY_MS}"]
            self._process = subprocess.Popen(
                [smi, query, *options],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            lines = self._process.stdout
            self._reader = threading.Thread(target=self._read, args=(lines,), daemon=True)
            self._reader.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._reader.join()  # it has met the end, and closes the pipe

    def _read(self, lines: IO[str]) -> None:
        with lines:
            for line in lines:
                values = tuple(_number(text) for text in line.split(","))
                if len(values) == len(FIELDS):
                    self._samples.append(Sample(time.monotonic(), values))

    def since(self, begin: float) -> dict[str, float | None]:
        """Medians of what was read from a time on, and the slowest SM clock; else None."""
        found = [s.values for s in list(self._samples) if s.at >= begin]
        columns = zip(*found, strict=True) if found else [()] * len(FIELDS)
        told = {
            name: [value for value in column if value is not None]
            for name, column in zip(FIELDS, columns, strict=True)
        }
        medians = {name: statistics.median(c) if c else None for name, c in told.items()}
        return {**medians, "sm_mhz_least": min(told["sm_mhz"], default=None)}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
