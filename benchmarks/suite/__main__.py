"""Run the suite and write one result file.

    python -m benchmarks.suite [--only linear conv2d] [-k EXPRESSION] [--quick] [--out FILE]

pytest runs the cases in a process of its own and notes each as it ends. One that crashes the
process or hangs costs only itself: another process goes on after it. The file is written after
every case.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.result_files import RESULTS
from benchmarks.suite import convert

ROOT = Path(__file__).resolve().parent.parent.parent
FAMILIES = ("linear", "conv2d", "recurrent", "update")
WHOLE = RESULTS / "cpu" / "suite.json"
PART = ROOT / "runs" / "bench.json"
POLL_SECONDS = 0.2
MOST_DEATHS = 5
"""Processes that may die before the rest is given up."""


@dataclass
class Record:
    """What the journals tell so far.

    Attributes:
        out: the result file.
        environment: of the first process.
        nodes: all cases, in order.
        rows: by node.
        failed: why, by node.
        running: the case that has begun and not ended.
    """

    out: Path
    environment: dict[str, Any] = field(default_factory=dict)
    nodes: list[str] = field(default_factory=list)
    rows: dict[str, convert.Row] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    running: str | None = None

    @property
    def left(self) -> list[str]:
        """Cases that have neither a result nor failed."""
        return [node for node in self.nodes if node not in self.rows and node not in self.failed]

    def take(self, event: dict[str, Any]) -> None:
        """Note one line of a journal, and write the file if it brings something."""
        if "nodes" in event:
            self.nodes = self.nodes or event["nodes"]
            self.environment = self.environment or event["environment"]
        elif "begins" in event:
            self.running = event["begins"]
        elif "failed" in event:
            self.fail(event["failed"], event["reason"])
        else:
            self.rows[event["node"]] = convert.row(event["entry"])
            self._tell(_line(self.rows[event["node"]]))
            self.save()

    def fail(self, node: str, reason: str) -> None:
        """The case gets no numbers."""
        if node not in self.failed:
            self.rows.pop(node, None)
            self.failed[node] = reason
            self._tell(f"{node.partition('::')[2]}: FAILED: {reason}")
            self.save()

    def save(self) -> None:
        """Write what is known, in the order of the suite."""
        nodes = [node for node in self.nodes if node in self.rows or node in self.failed]
        rows = [self.rows.get(n) or {"id": n, "failed": self.failed[n]} for n in nodes]
        convert.write(self.out, self.environment, rows)

    def _tell(self, text: str) -> None:
        done = len(self.rows) + len(self.failed)
        sys.stdout.write(f"[{done:>3}/{len(self.nodes)}] {text}\n")
        sys.stdout.flush()


def run(arguments: argparse.Namespace, record: Record) -> None:
    """Start processes until every case has ended, or too many have died."""
    deaths = 0
    with tempfile.TemporaryDirectory() as folder:
        while deaths < MOST_DEATHS:
            known = len(record.rows) + len(record.failed)
            journal = Path(folder) / f"{deaths}.jsonl"
            why = _one_process(arguments, record, journal)
            if not record.left and record.nodes:
                return
            deaths += 1
            if record.running is not None and record.running in record.left:
                record.fail(record.running, why)
            elif len(record.rows) + len(record.failed) == known:
                sys.stdout.write(f"gave up: {why}\n")
                break  # nothing has begun: the next would do no better
    for node in record.left:
        record.fail(node, f"not run: {deaths} processes ended before it, the last: {why}")


def _one_process(arguments: argparse.Namespace, record: Record, journal: Path) -> str:
    """Follow one process to its end; says how it ended."""
    log = journal.with_suffix(".log")
    journal.touch()
    command = _command(arguments, record.left, journal)
    # pytest-benchmark measures nothing in what it takes for a worker of pytest-xdist
    own = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=own
        )
    try:
        heard = time.monotonic()
        for line in _lines(journal, process):
            if line:
                record.take(json.loads(line))
                heard = time.monotonic()
            elif time.monotonic() - heard > arguments.case_limit:
                return f"no end after {arguments.case_limit:g} s"
        code = process.wait()
        last = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        return f"the process ended with {code}: {last[-1][:200]}"
    finally:
        process.kill()
        process.wait()


def _lines(journal: Path, process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Whole lines as they come; "" while there is none."""
    with journal.open() as file:
        rest = ""
        while True:
            ended = process.poll() is not None
            *lines, rest = (rest + file.read()).split("\n")
            yield from (line for line in lines if line)
            if ended:
                return
            yield ""
            time.sleep(POLL_SECONDS)


def _command(arguments: argparse.Namespace, left: Sequence[str], journal: Path) -> list[str]:
    files = [f"benchmarks/suite/bench_{name}.py" for name in arguments.only]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--benchmark-disable-gc", "--benchmark-warmup=off", f"--journal={journal}"]
    command += [f"--threads={arguments.threads}", "--tb=short"]
    command += ["--quick"] if arguments.quick else []
    if left:
        return [*command, *left]
    return [*command, *(["-k", arguments.select] if arguments.select else []), *files]


def _line(row: convert.Row) -> str:
    """A case in a line."""
    if row["kind"] == "memory":
        cells = [f"{name} {peak / 2**20:.1f}" for name, peak in row["peak_bytes"].items()]
        return f"{row['id']}: peak MiB: {', '.join(cells)}"
    times = [
        f"{name} {one['ratio']:.2f}x" for name, one in row["against"].items() if "ratio" in one
    ]
    share, bound = row["roofline"]["share"], row["roofline"]["bound"]
    return (
        f"{row['id']}: {1e3 * row['seconds']['median']:.2f} ms, {row['gflops']:.0f} GFLOP/s, "
        f"{share:.0%} of {bound}; against {', '.join(times)}"
    )


def main() -> int:
    """Returns 1 if a case failed; the others are saved all the same."""
    parser = _parser()
    arguments = parser.parse_args()
    whole = set(arguments.only) == set(FAMILIES) and not (arguments.select or arguments.quick)
    out = arguments.out or (WHOLE if whole else PART)  # a part does not replace the whole
    if why := convert.unwritable(out):
        parser.error(why)
    # the file that is there stays until the new one is complete
    record = Record(out.with_name(f"{out.stem}.partial.json"))
    began = time.monotonic()
    try:
        run(arguments, record)
    except KeyboardInterrupt:
        sys.stdout.write(f"interrupted; what was measured is in {record.out}\n")
        return 130
    if record.rows:
        record.out.replace(out)
    sys.stdout.write(
        f"{len(record.rows)} cases measured, {len(record.failed)} failed, in "
        f"{time.monotonic() - began:.0f} s; saved {out if record.rows else 'nothing'}\n"
    )
    return 1 if record.failed or not record.rows else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("-k", dest="select", metavar="EXPRESSION", help="as pytest's -k")
    parser.add_argument("--quick", action="store_true", help="tiny cases: shows that it works")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"default: {WHOLE.name}")
    parser.add_argument("--threads", type=int, default=2, metavar="T", help="default: 2")
    parser.add_argument(
        "--case-limit", type=float, default=180, metavar="S", help="seconds a case may take"
    )
    return parser


if __name__ == "__main__":
    # ended by others, it ends its process and says where the results are, as by Ctrl-C
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
