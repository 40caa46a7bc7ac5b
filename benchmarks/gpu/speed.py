"""Parts `dense`, `bsr` and `csr`: the three products against cuBLAS, taking turns with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.bench import Bench, describe
from benchmarks.gpu.correctness import Row
from sparsekern.cost.timing import Run, Timing
from sparsekern.tuning.trial import DTYPES, Block, Operands, Shape, precision, products

Runs = dict[str, Run]

EAGER_REPEATS = 30


def sparse_runs(o: Operands, impl: str = "triton") -> Runs:
    """The three products, and all of them one after another."""
    return with_three(products(o, impl))


def dense_runs(x: Tensor, dy: Tensor, w: Tensor) -> Runs:
    """The same with a dense weight (N, K), as `nn.Linear` asks cuBLAS for them."""
    return with_three(
        {
            "forward": lambda: nn.functional.linear(x, w),
            "dx": lambda: dy @ w,
            "dw": lambda: dy.t() @ x,
        }
    )


def with_three(runs: Mapping[str, Callable[[], Tensor]]) -> Runs:
    """Add "three", which calls all of them."""

    def three() -> tuple[Tensor, ...]:
        return tuple(run() for run in runs.values())

    return {**runs, "three": three}


def dense_for(o: Operands) -> Runs:
    """Dense products of a case's shape, on random weights: zeros would run faster."""
    w = torch.randn(o.topology.shape, device=o.x.device).to(o.x.dtype)
    return dense_runs(o.x, o.dy, w)


def dense(bench: Bench) -> Iterator[Row]:
    """cuBLAS alone: every shape in bf16, the first one in the other kinds too."""
    plan = bench.plan
    cases = [(shape, "bf16") for shape in (*plan.shapes, plan.graph_shape)]
    cases += [(plan.shapes[0], kind) for kind in plan.kinds]
    for shape, kind in cases:
        with precision(kind), torch.no_grad():
            runs = dense_runs(*_dense_operands(bench, shape, kind))
            timing = bench.time(runs)
        for operation in runs:
            flops = 2 * shape.M * shape.K * shape.N * (3 if operation == "three" else 1)
            ms = timing.ms(operation)
            row = {"operation": operation, **shape._asdict(), "kind": kind, "status": "ok"}
            yield row | {"ms": ms, "tflops": flops / ms / 1e9}


def bsr(bench: Bench) -> Iterator[Row]:
    """Blocks, densities and shapes; then few tokens as CUDA graphs, then the other kinds."""
    plan = bench.plan
    for block in plan.blocks:
        for shape in plan.shapes:
            for density in plan.densities:
                yield from _case(bench, shape, (block, block), density, "bf16")
    for block in plan.blocks:
        for density in plan.graph_densities:
            yield from _graph_case(bench, (block, block), density)
    for kind in plan.kinds:
        for block in plan.blocks:
            yield from _case(bench, plan.shapes[0], (block, block), plan.other_density, kind)


def csr(bench: Bench) -> Iterator[Row]:
    """Unstructured weights, by the kernels and through a short-lived dense weight."""
    for density in bench.plan.csr_densities:
        for impl in ("triton", "dense"):
            yield from _case(bench, bench.plan.csr_shape, (1, 1), density, "bf16", impl)


def _case(
    bench: Bench, shape: Shape, block: Block, density: float, kind: str, impl: str = "triton"
) -> list[Row]:
    """One row per product, and one for the three together."""
    rows = []
    with precision(kind), torch.no_grad():
        o = bench.operands(shape, block, density, kind)
        verdicts = bench.verdicts(o, impl)
        sparse, cublas = sparse_runs(o, impl), dense_for(o)
        for operation, verdict in verdicts.items():
            timing = None
            if verdict == "ok":
                pair = {"sparse": sparse[operation], "dense": cublas[operation]}
                timing = bench.time(pair)
            rows.append(_row(bench, o, operation, verdict, timing, impl=impl, graph=False))
    return rows


def _graph_case(bench: Bench, block: Block, density: float) -> list[Row]:
    """Few tokens, where launching costs as much as computing: replayed, and called from Python."""
    rows = []
    with precision("bf16"), torch.no_grad():
        o = bench.operands(bench.plan.graph_shape, block, density, "bf16")
        verdicts = bench.verdicts(o)
        sparse, cublas = sparse_runs(o), dense_for(o)
        repeats = 1 if bench.plan.dry else EAGER_REPEATS
        for operation, verdict in verdicts.items():
            timing, eager = None, {}
            if verdict == "ok":
                pair = {"sparse": sparse[operation], "dense": cublas[operation]}
                eager = {
                    f"eager_{n}_ms": 1e3 * bench.clock.wall(r, repeats) for n, r in pair.items()
                }
                replays = {name: bench.clock.capture(run)[0] for name, run in pair.items()}
                timing = bench.time(replays)
            more = {"impl": "triton", "graph": True, **eager}
            rows.append(_row(bench, o, operation, verdict, timing, **more))
    return rows


def _row(
    bench: Bench, o: Operands, operation: str, verdict: str, timing: Timing | None, **more: Any
) -> Row:
    """Without a timing there is no number at all."""
    row: Row = {"operation": operation} | describe(o) | {"status": verdict}
    if timing is None:
        return row | {"ms": None, "dense_ms": None, "ratio": None} | more
    found = bench.against_dense(timing, operation, o.problem)
    if more["impl"] != "triton":  # the model is of the kernels
        found = {name: value for name, value in found.items() if "ceiling" not in name}
    return row | found | more


def _dense_operands(bench: Bench, shape: Shape, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = bench.generator()
    sizes = (shape.M, shape.K), (shape.M, shape.N), (shape.N, shape.K)
    made = [torch.randn(size, generator=generator, device=bench.device) for size in sizes]
    x, dy, w = (tensor.to(DTYPES[kind]) for tensor in made)
    return x, dy, w
