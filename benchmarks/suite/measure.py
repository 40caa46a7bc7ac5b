"""The two measurements of a case: its speed, and its memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import nn

from benchmarks.paired import Beside, quartiles, ratios
from benchmarks.suite.problem import Contender, Facts, Problem, able, ceilings, check
from sparsekern.cost.held import held_bytes
from sparsekern.cost.memory import peak_bytes
from sparsekern.cost.timing import rounds_in

SECONDS = 1.2
"""About how long the rounds of a case take, all contenders together."""

FEWEST, MOST = 5, 60
"""Rounds."""


class Benchmark(Protocol):
    """The part of pytest-benchmark's fixture that is used."""

    group: str | None
    extra_info: dict[str, Any]
    stats: Any

    def pedantic(self, target: Callable[[], Any], **options: Any) -> Any:
        """Time `target` so many rounds."""


def speed(benchmark: Benchmark, problem: Problem, *, quick: bool = False) -> None:
    """Check all contenders, then time them in turns.

    Raises:
        WrongResultError: the sparse computation is not exact; it gets no time.
    """
    facts, own = problem.facts, problem.sparse
    check(own, problem.expected, facts.id())
    others, cannot = able(problem)
    once = own.run.seconds() + sum(other.run.seconds() for other in others.values())
    rounds = 2 if quick else rounds_in(SECONDS, once, FEWEST, MOST)
    beside = Beside({name: other.run for name, other in others.items()}, own.run.prepare)
    benchmark.group = facts.family
    benchmark.pedantic(own.run.call, setup=beside, rounds=rounds, warmup_rounds=1)
    taken = list(benchmark.stats.stats.data)
    against: dict[str, dict[str, Any]] = {name: {"cannot": why} for name, why in cannot.items()}
    for name, times in beside.times.items():
        q1, median, q3 = quartiles(times[1:])  # the first warmed up
        against[name] = {"seconds": median, "iqr": q3 - q1, **ratios(times[1:], taken)}
    benchmark.extra_info |= _facts(facts, facts.id(), "speed")
    benchmark.extra_info |= _rates(facts, benchmark.stats.stats.median) | {"against": against}


def memory(benchmark: Benchmark, problem: Problem, *, quick: bool = False) -> None:
    """Measure the bytes that a step allocates at most, and those that training holds.

    Held are weights, gradient, the two moments of AdamW, and index arrays.
    """
    del quick  # there is but one round
    facts, own = problem.facts, problem.sparse
    check(own, problem.expected, facts.id("memory"))
    others, cannot = able(problem)
    taking = {"sparse": own, **others}
    peaks = {name: _peak(contender) for name, contender in taking.items()}
    held = {n: _held(c.module, c.run.call) for n, c in taking.items() if c.module is not None}
    benchmark.group = facts.family
    benchmark.pedantic(own.run.call, setup=own.run.prepare, rounds=1)
    benchmark.extra_info |= _facts(facts, facts.id("memory"), "memory")
    benchmark.extra_info |= {"peak_bytes": peaks, "held_bytes": held, "cannot": cannot}


def _peak(contender: Contender) -> int:
    """Of a step that finds no gradients of the one before."""
    if contender.run.prepare is not None:
        contender.run.prepare()
    if contender.module is not None:
        contender.module.zero_grad(set_to_none=True)
    gc.collect()
    return peak_bytes(contender.run.call)


def _held(module: nn.Module, step: Callable[[], Any]) -> int:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.0)
    step()
    optimizer.step()
    return held_bytes(module, optimizer).total


def _facts(facts: Facts, name: str, kind: str) -> dict[str, Any]:
    return {"id": name, "kind": kind, **asdict(facts)}


def _rates(facts: Facts, seconds: float) -> dict[str, Any]:
    """GFLOP/s, and the share of the roofline: the slower of products and copies at their best."""
    best = ceilings()
    limits = {"compute": facts.flops / best.gemm, "bandwidth": facts.bytes / best.copy}
    bound = max(limits, key=lambda name: limits[name])
    roofline = {"share": limits[bound] / seconds, "bound": bound}
    return {"gflops": facts.flops / seconds / 1e9, "roofline": roofline}
