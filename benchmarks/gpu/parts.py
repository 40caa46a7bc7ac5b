"""The parts of a run: what each is, what it is expected to take, and how it is carried out."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

import torch

from benchmarks.gpu import speed
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cases import groups
from benchmarks.gpu.conv import conv
from benchmarks.gpu.correctness import Row, broken_group, check_group
from benchmarks.gpu.layers import check_layers
from benchmarks.gpu.peers import peers
from benchmarks.gpu.probe import probe
from benchmarks.gpu.update import update
from sparsekern.show.environment import ROOT
from sparsekern.tuning.trial import Block

GROUP_SECONDS = 300  # of one correctness process, compiling included
MAX_WORKERS = 14
PYTEST_SECONDS = 240


class Part(NamedTuple):
    """One part.

    Attributes:
        seconds: a run with less left does not start it. Estimates, not measurements.
        gated: whether it needs the correctness part first.
        extra: the first to be left out when time is short; a run goes on without it.
    """

    run: Callable[[Bench], Iterator[Row]]
    seconds: int
    gated: bool = True
    extra: bool = False


def correctness(bench: Bench) -> Iterator[Row]:
    """Every kernel, block and kind of operand; then whole layers.

    On a GPU each block and kind has its own process: they compile side by side, and one that dies
    takes only its own rows with it.
    """
    if bench.plan.dry:
        for block, kind in groups(bench.plan):
            yield from check_group(block, kind, bench.plan, bench.device)
    else:
        pool = ThreadPoolExecutor(max(1, min(MAX_WORKERS, (os.cpu_count() or 2) - 2)))
        try:
            asked = [pool.submit(check_in_own_process, *group) for group in groups(bench.plan)]
            for done in as_completed(asked):
                yield from done.result()
        finally:
            pool.shutdown(cancel_futures=True)
    yield from check_layers(bench.plan, bench.device, bench.clock)


def check_in_own_process(block: Block, kind: str, *more: str) -> list[Row]:
    """`check_group` in another process; all of its kernels fail if that one dies."""
    command = [sys.executable, "-m", "benchmarks.gpu.correctness", *more, "--kind", kind, "--block"]
    try:
        done = subprocess.run(
            [*command, *map(str, block)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=GROUP_SECONDS,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # they run side by side
        )
    except subprocess.TimeoutExpired:
        return broken_group(block, kind, f"no answer after {GROUP_SECONDS} s")
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [""]
        return broken_group(block, kind, f"exit {done.returncode}: {last[0]}"[:300])
    if not done.stdout.strip():
        return broken_group(block, kind, "ended without an answer")
    rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return rows


def kernel_tests(bench: Bench) -> Iterator[Row]:
    """The suite's own kernel tests, as far as the time goes."""
    if bench.plan.dry:
        yield {"what": "pytest", "status": "skipped: dry run"}
        return
    limit = min(PYTEST_SECONDS, max(1.0, bench.deadline - time.monotonic()))
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-q", "-m", "not slow", "-x"]
    try:
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        yield {"what": "pytest", "status": f"stopped after {limit:.0f} s"}
        return
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:] or [""]
    status = "ok" if done.returncode == 0 else f"failed: exit {done.returncode}"
    yield {"what": "pytest", "status": status, "detail": last[0]}


def _from_module(name: str) -> Callable[[Bench], Iterator[Row]]:
    """A part whose module needs Triton at once: the other parts are imported without it."""

    def run(bench: Bench) -> Iterator[Row]:
        module = importlib.import_module(f"benchmarks.gpu.{name}")
        yield from getattr(module, name)(bench)

    return run


PARTS = {
    "correctness": Part(correctness, 150, gated=False),
    "dense": Part(speed.dense, 15, gated=False),
    "bsr": Part(speed.bsr, 100),
    "csr": Part(speed.csr, 50),
    "conv": Part(conv, 60, gated=False),
    "update": Part(update, 60),
    "peers": Part(peers, 90),
    "probe": Part(probe, 25),
    "variants": Part(_from_module("variants"), 90, extra=True),
    # last: if it hangs, nobody waits for it
    "resident": Part(_from_module("resident"), 60, gated=False, extra=True),
    "pytest": Part(kernel_tests, 60, gated=False),
}
DEFAULT = tuple(name for name in PARTS if name != "pytest")


def ordered(asked: list[str] | None) -> list[str]:
    """The parts to run, correctness first wherever a number depends on it."""
    names = [name for name in PARTS if name in (asked or DEFAULT)]
    if any(PARTS[name].gated for name in names) and "correctness" not in names:
        names.insert(0, "correctness")
    return names


def default_device(dry: bool) -> torch.device:
    """The first GPU, or the CPU in a dry run."""
    return torch.device("cpu") if dry else torch.device("cuda", 0)
