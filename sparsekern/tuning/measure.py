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

import functools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import IO, Any

import torch
from torch import Tensor

from sparsekern.cost.timing import clock_of, turns
from sparsekern.errors import ConfigError, SparseKernError, told
from sparsekern.kernels.bsr_grow import bsr_grow
from sparsekern.kernels.launch import arch_class
from sparsekern.kernels.tables import Config, Key
from sparsekern.ops import triton
from sparsekern.tuning.entries import is_read, launching
from sparsekern.tuning.job import Job
from sparsekern.tuning.problems import Problem
from sparsekern.tuning.trial import (
    Operands,
    Shape,
    block_norms,
    difference,
    expected,
    operands,
    poisoned,
    precision,
    random_topology,
)

Event = Mapping[str, Any]

_WARM_UP = 3
_HIGHEST = 2
"""Of the integers: so small that a block's sum of magnitudes is exact in fp32 as well."""


class Case:
    """One operation on one problem: integers to check it on, random floats to time it on."""

    def __init__(self, op: str, problem: Problem, device: torch.device) -> None:
        self.op, self.problem = op.removeprefix("csr_"), problem
        generator = torch.Generator(device).manual_seed(0)
        shape, block = Shape(problem.tokens, problem.cols, problem.rows), (problem.block,) * 2
        topology = random_topology(shape, block, problem.density, device)
        self.floats = operands(shape, topology, problem.dtype, problem.density, generator)
        self.integers = self.floats.with_integers(generator, _HIGHEST)
        self.expected = self._expected()

    def _expected(self) -> Tensor:
        """By dense products; rounded once, as the kernels round their exact sums."""
        o = self.integers
        if self.op == "grow":
            block = o.topology.block
            return block_norms(o.dy.double().T @ o.x.double(), block, "l1").float()
        return expected(_OPERATIONS[self.op], o).value.to(o.x.dtype)

    def run(self, o: Operands) -> Tensor:
        """Launch the kernel."""
        if self.op == "spmm":
            return triton.spmm(o.x, o.values, o.topology, None)
        if self.op == "spmm_t":
            return triton.spmm_t(o.dy, o.values, o.topology)
        if self.op == "sddmm":
            return triton.sddmm(o.dy, o.x, o.topology)
        return bsr_grow(o.dy, o.x, o.topology.block).flatten()

    def check(self) -> str | None:
        """What is wrong with the result, or None."""
        with poisoned():
            result = self.run(self.integers)
        wrong = difference(result, self.expected)
        return f"wrong result: {wrong}" if wrong else None


_OPERATIONS = {"spmm": "forward", "spmm_t": "dx", "sddmm": "dw"}


def run(job: Job) -> Iterator[Event]:
    """Check all configurations of a job, then time the right ones in interleaved rounds.

    Raises:
        ConfigError: the problems launch with another entry than the job's.
    """
    device = torch.device("cpu" if job.dry_run else "cuda")
    arch = arch_class(device)
    with precision("fp32" if job.key.kind == "ieee" else "tf32"):
        cases = [Case(job.key.op, problem, device) for problem in job.problems]
        for case in cases:
            _require_lookup(case, arch, job.key)
        right = {}
        for index, config in job.configs.items():
            yield {"event": "begin", "index": index}
            with launching(arch, job.key, config):
                error = _error(cases)
            yield {"event": "checked", "index": index, "error": error}
            if device.type == "cuda":
                torch.cuda.synchronize()  # raises if the error broke the device for this process
            if error is None:
                right[index] = config
        if right:
            yield from _time(job, device, cases, right)
    yield {"event": "done"}


def _require_lookup(case: Case, arch: str, key: Key) -> None:
    """Make sure that it is the key's entry that decides."""
    if not is_read(arch, key, lambda: case.run(case.integers)):
        raise ConfigError(
            f"expected a problem that launches with the entry {key}; got {case.problem}"
        )


def _error(cases: list[Case]) -> str | None:
    for case in cases:
        try:
            wrong = case.check()
        except Exception as error:  # reported; the next candidate goes on
            return told(error)[:200]
        if wrong is not None:
            return wrong
    return None


def _time(
    job: Job, device: torch.device, cases: list[Case], right: Mapping[int, Config]
) -> Iterator[Event]:
    """Every configuration once a round, the reference twice."""
    arch = arch_class(device)
    clock, reference = clock_of(device), next(iter(right))
    warm_up = 0 if job.dry_run else _WARM_UP
    slots = [-1, *right]  # -1 is the reference's twin
    seconds: dict[int, list[list[float]]] = {slot: [[] for _ in cases] for slot in slots}
    for turn, slot in turns(slots, job.rounds, warm_up):
        index = reference if slot == -1 else slot
        yield {"event": "begin", "index": index}
        with launching(arch, job.key, right[index]):
            for case, kept in zip(cases, seconds[slot], strict=True):
                taken = clock.once(functools.partial(case.run, case.floats))
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
