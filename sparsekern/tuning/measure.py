"""The measuring process: reads a job from each line of stdin, answers with a JSON line per event.

Correct first: on small integers every order of summation gives the same bits, so a configuration
must equal the dense float64 product exactly, into memory that was filled with NaN. One that does
not is reported and never timed. Events, besides what `processes` needs to know who was at work:

    {"event": "begin", "index": i}       what follows is the doing of configuration i
    {"event": "checked", "index": i, "error": null or text}
    {"event": "times", "reference": i, "twin": [[s]], "times": {i: [[s]]}}   by problem, by round
    {"event": "done"}
    {"event": "refused", "error": text}      instead of all that: the job can't be done here
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor

from sparsekern.errors import ConfigError, SparseKernError
from sparsekern.kernels import tables
from sparsekern.kernels.bsr_grow import bsr_grow
from sparsekern.kernels.launch import arch_class
from sparsekern.kernels.tables import Config, Key
from sparsekern.ops import triton
from sparsekern.topology import Topology
from sparsekern.topology.blocks import Grid, tiles_of
from sparsekern.tuning.job import Job
from sparsekern.tuning.problems import Problem

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}

Event = Mapping[str, Any]

# written before every timed call: several times any L2 cache, and for longer than the host takes
# to launch a kernel, so that the GPU never waits for Python
_FLUSH_BYTES = 1 << 30
_WARM_UP = 3


class _Operands(NamedTuple):
    x: Tensor
    dy: Tensor
    values: Tensor


class Case:
    """One operation on one problem: integers to check it on, random floats to time it on."""

    def __init__(self, op: str, problem: Problem, device: torch.device) -> None:
        self.op = op.removeprefix("csr_")
        self.problem, self.device = problem, device
        self._generator = torch.Generator(device).manual_seed(0)
        self.topology = Topology.random(
            (problem.rows, problem.cols),
            problem.block,
            sparsity=1 - problem.density,
            generator=torch.Generator().manual_seed(0),
            device=device,
        )
        self.integers = self._operands(integers=True)
        self.floats = self._operands(integers=False)
        self.expected = self._expected(*(a.double() for a in self.integers))

    def _operands(self, *, integers: bool) -> _Operands:
        p = self.problem
        sizes = (p.tokens, p.cols), (p.tokens, p.rows), (p.rows, p.cols)
        x, dy, w = (self._random(size, integers).to(DTYPES[p.dtype]) for size in sizes)
        return _Operands(x, dy, self.topology.pack(w))

    def _random(self, size: tuple[int, int], integers: bool) -> Tensor:
        options: Any = {"generator": self._generator, "device": self.device}
        if integers:  # so small that a block's sum of magnitudes is exact in fp32 as well
            return torch.randint(-2, 3, size, **options)
        return torch.randn(size, **options)

    def _expected(self, x: Tensor, dy: Tensor, values: Tensor) -> Tensor:
        """By dense products; rounded once, as the kernels round their exact sums."""
        dtype = DTYPES[self.problem.dtype]
        if self.op == "spmm":
            return (x @ self.topology.unpack(values).T).to(dtype)
        if self.op == "spmm_t":
            return (dy @ self.topology.unpack(values)).to(dtype)
        dw = dy.T @ x
        if self.op == "sddmm":
            return self.topology.pack(dw).to(dtype)
        tiles = tiles_of(dw, Grid.of(self.topology.shape, self.topology.block))
        return tiles.abs().sum((1, 3)).float()

    def run(self, operands: _Operands) -> Tensor:
        """Launch the kernel."""
        x, dy, values = operands
        if self.op == "spmm":
            return triton.spmm(x, values, self.topology, None)
        if self.op == "spmm_t":
            return triton.spmm_t(dy, values, self.topology)
        if self.op == "sddmm":
            return triton.sddmm(dy, x, self.topology)
        return bsr_grow(dy, x, self.topology.block)

    def check(self) -> str | None:
        """What is wrong with the result, or None."""
        with _poisoned():
            result = self.run(self.integers)
        if torch.equal(result, self.expected):
            return None
        wrong = int((result != self.expected).sum())
        return f"wrong result: {wrong} of {result.numel()} numbers differ from the dense product"


@contextmanager
def _poisoned() -> Iterator[None]:
    """Fill fresh memory with NaN, so that what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


@contextmanager
def _products_of(kind: str) -> Iterator[None]:
    """Set what float32 products mean."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if kind == "ieee" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _descriptors_only_if_asked(arch: str, key: Key) -> Iterator[None]:
    """Take the tma entry away while its pointer twin is measured: it would be launched instead."""
    entries, tma = tables.table(arch), key._replace(loads="tma")
    taken = entries.pop(tma, None) if key.loads == "pointer" else None
    try:
        yield
    finally:
        if taken is not None:
            entries[tma] = taken
        tables.find.cache_clear()


class Stopwatch:
    """Seconds of a call with cold caches: by CUDA events, or by the clock on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            self.flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
            self.start, self.end = _event(), _event()

    def time(self, case: Case) -> float:
        """One launch on the floats."""
        if not self.cuda:
            begin = time.perf_counter()
            case.run(case.floats)
            return time.perf_counter() - begin
        self.flush.zero_()
        self.start.record()
        case.run(case.floats)
        self.end.record()
        self.end.synchronize()
        return float(self.start.elapsed_time(self.end)) / 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def run(job: Job) -> Iterator[Event]:
    """Check all configurations of a job, then time the right ones in interleaved rounds.

    Raises:
        ConfigError: the problems launch with another entry than the job's.
    """
    device = torch.device("cpu" if job.dry_run else "cuda")
    arch = arch_class(device)
    with _products_of(job.key.kind), _descriptors_only_if_asked(arch, job.key):
        cases = [Case(job.key.op, problem, device) for problem in job.problems]
        for case in cases:
            _require_lookup(case, arch, job.key)
        right = {}
        for index, config in job.configs.items():
            yield {"event": "begin", "index": index}
            with tables.overridden(arch, {job.key: config}):
                error = _error(cases)
            yield {"event": "checked", "index": index, "error": error}
            if device.type == "cuda":
                torch.cuda.synchronize()  # raises if the error broke the device for this process
            if error is None:
                right[index] = config
        if right:
            yield from _time(job, arch, cases, right)
    yield {"event": "done"}


def _require_lookup(case: Case, arch: str, key: Key) -> None:
    """Make sure that it is the key's entry that decides: without fields it must be missed."""
    with tables.overridden(arch, {key: cast(Config, object())}):
        try:
            case.run(case.integers)
        except AttributeError:
            return
    raise ConfigError(f"expected a problem that launches with the entry {key}; got {case.problem}")


def _error(cases: list[Case]) -> str | None:
    for case in cases:
        try:
            wrong = case.check()
        except Exception as error:  # reported; the next candidate goes on
            lines = str(error).splitlines() or [""]
            return f"{type(error).__name__}: {lines[0]}"[:200]
        if wrong is not None:
            return wrong
    return None


def _time(job: Job, arch: str, cases: list[Case], right: Mapping[int, Config]) -> Iterator[Event]:
    """Every configuration once a round, the reference twice, each round from another one on."""
    watch, reference = Stopwatch(cases[0].device), next(iter(right))
    warm_up = 0 if job.dry_run else _WARM_UP
    slots = [-1, *right]  # -1 is the reference's twin
    seconds: dict[int, list[list[float]]] = {slot: [[] for _ in cases] for slot in slots}
    for turn in range(-warm_up, job.rounds):
        first = turn % len(slots)
        for slot in slots[first:] + slots[:first]:
            index = reference if slot == -1 else slot
            yield {"event": "begin", "index": index}
            with tables.overridden(arch, {job.key: right[index]}):
                for case, kept in zip(cases, seconds[slot], strict=True):
                    taken = watch.time(case)
                    if turn >= 0:
                        kept.append(taken)
    twin = seconds.pop(-1)
    yield {"event": "times", "reference": reference, "twin": twin, "times": seconds}


def main() -> int:
    """Serve jobs until stdin ends."""
    # compilers write to stdout too: events get a descriptor of their own
    with os.fdopen(os.dup(1), "w") as events:
        os.dup2(2, 1)
        for line in sys.stdin:
            try:
                for event in run(Job.from_json(line)):
                    _say(events, event)
            except SparseKernError as error:
                _say(events, {"event": "refused", "error": str(error)})
    return 0


def _say(events: IO[str], event: Event) -> None:
    events.write(json.dumps(event) + "\n")
    events.flush()


if __name__ == "__main__":
    sys.exit(main())
