"""Part `headline`: the numbers that decide, each with everything it is compared with in its rounds.

One shape at one density, in bf16: forward, dX, dW and the three together, in turns with cuBLAS and
with torch's own kernels for such weights where there are any. What the host spends on a call is
timed apart, as the GPU's time hides it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.gpu.agenda import Case, Row
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cases import HEADLINE, Plan
from benchmarks.gpu.peers import BSR_PEERS, ready
from benchmarks.gpu.speed import dense_for, row_of, sparse_runs
from sparsekern import SparseLinear
from sparsekern.cost.roofline import OPERATIONS
from sparsekern.cost.timing import Run, synchronize
from sparsekern.tuning.trial import precision

KIND = "bf16"
HOST_TOKENS, HOST_EDGE = 64, 512  # so little work that the GPU waits for the host
HOST_CALLS, HOST_BURSTS = 100, 7


def headline(plan: Plan, device: torch.device) -> list[Case]:
    """Products by block, those of a training step first; then what calls cost the host."""
    del device
    facts: Row = plan.shapes[0]._asdict() | {"kind": KIND, "density": HEADLINE, "graph": False}
    cases = [
        Case(
            f"headline {edge} {operation}",
            partial(_product, edge=edge, operation=operation),
            2.5,
            facts | {"block": [edge, edge], "operation": operation, "impl": "triton"},
        )
        for operation in (*OPERATIONS, "three")
        for edge in plan.blocks
    ]
    return cases + [Case(f"host {edge}", partial(_host, edge=edge), 1.0) for edge in plan.blocks]


def _product(bench: Bench, edge: int, operation: str) -> Iterator[Row]:
    """Our row, then one for each peer."""
    with precision(KIND), torch.no_grad():
        o = bench.operands(bench.plan.shapes[0], (edge, edge), HEADLINE, KIND)
        verdict = bench.verdicts(o)[operation]
        runs: dict[str, Run] = {"dense": dense_for(o)[operation]}
        if verdict == "ok":
            runs["sparse"] = sparse_runs(o)[operation]
        found = {p.name: ready(bench, p, o) for p in BSR_PEERS if p.operation == operation}
        runs |= {name: run for name, (run, _) in found.items() if run is not None}
        timing = bench.time(runs)
        ours = timing if verdict == "ok" else None
        yield row_of(bench, o, operation, verdict, ours, impl="triton", graph=False)
        for name, (run, status) in found.items():
            row: Row = {"peer": name, "operation": operation, "block": [edge, edge]}
            row |= o.shape._asdict() | {"kind": KIND, "density": HEADLINE, "status": status}
            row["ms"] = None if run is None else timing.ms(name)
            if run is not None and ours is not None:
                row["ours_is_faster_by"] = statistics.median(timing.ratios(name, "sparse"))
            yield row


def _host(bench: Bench, edge: int) -> Iterator[Row]:
    """Microseconds until a call returns, with work that a GPU has done long before."""
    torch.manual_seed(0)
    size = bench.plan.layer_edge if bench.plan.dry else HOST_EDGE
    dense = nn.Linear(size, size, dtype=torch.bfloat16)
    sparse = SparseLinear(
        size, size, block=edge, sparsity=1 - HEADLINE, dtype=torch.bfloat16, impl="triton"
    )
    x = torch.randn(HOST_TOKENS, size).to(bench.device, torch.bfloat16).requires_grad_()
    dy = torch.randn(HOST_TOKENS, size).to(bench.device, torch.bfloat16)
    verdict = bench.gate.verdict("three", (edge, edge), KIND)
    row: Row = {"what": "host time of a call", "block": [edge, edge], "status": verdict}
    if verdict != "ok":
        yield row
        return
    calls = bench.times(HOST_CALLS)
    for name, layer in (("", sparse.to(bench.device)), ("dense_", dense.to(bench.device))):
        forward: Run = partial(layer, x)
        row[f"{name}forward_us"] = _issued(bench, forward, calls)
        both: Run = partial(_both, layer, x, dy)
        row[f"{name}forward_backward_us"] = _issued(bench, both, calls)
    yield row


def _both(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    torch.autograd.backward(layer(x), dy)


def _issued(bench: Bench, run: Run, calls: int) -> float:
    """Median over bursts: after one call the queue is empty, and so few never fill it."""
    found = []
    for _ in range(bench.times(HOST_BURSTS)):
        run()
        synchronize(bench.device)
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        found.append((time.perf_counter() - begin) / calls)
    return 1e6 * statistics.median(found)
