"""Parts `dense`, `bsr` and `csr`: the three products against cuBLAS, taking turns with it.

The headline, one shape at one density, is a part of its own: `headline`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.agenda import Case, Row
from benchmarks.gpu.bench import Bench, describe
from benchmarks.gpu.cases import HEADLINE, Plan
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


def dense(plan: Plan, device: torch.device) -> list[Case]:
    """cuBLAS alone: every shape in bf16, the first one in the other kinds too."""
    del device
    cases = [(shape, "bf16") for shape in (*plan.shapes, plan.graph_shape)]
    cases += [(plan.shapes[0], kind) for kind in plan.kinds]
    return [
        Case(f"dense {sizes(shape)} {kind}", partial(_dense, shape=shape, kind=kind))
        for shape, kind in cases
    ]


def _dense(bench: Bench, shape: Shape, kind: str) -> Iterator[Row]:
    with precision(kind), torch.no_grad():
        runs = dense_runs(*_dense_operands(bench, shape, kind))
        timing = bench.time(runs)
    for operation in runs:
        flops = 2 * shape.M * shape.K * shape.N * (3 if operation == "three" else 1)
        ms = timing.ms(operation)
        row = {"operation": operation, **shape._asdict(), "kind": kind, "status": "ok"}
        yield row | {"ms": ms, "tflops": flops / ms / 1e9}


def bsr(plan: Plan, device: torch.device) -> list[Case]:
    """Blocks, densities and shapes beyond the headline; few tokens as CUDA graphs; other kinds."""
    del device
    cases = [
        (shape, edge, density, "bf16")
        for shape in plan.shapes
        for density in plan.densities
        for edge in plan.blocks
        if (shape, density) != (plan.shapes[0], HEADLINE)
    ]
    cases += [
        (plan.shapes[0], edge, plan.other_density, kind)
        for kind in plan.kinds
        for edge in plan.blocks
    ]
    found = [
        Case(
            f"bsr {edge} {sizes(shape)} {density:g} {kind}",
            partial(products_of, shape=shape, block=(edge, edge), density=density, kind=kind),
            3.0 if shape.N > plan.shapes[0].N else 1.5,
        )
        for shape, edge, density, kind in cases
    ]
    graphs = [
        Case(
            f"bsr {edge} {sizes(plan.graph_shape)} {density:g} graph",
            partial(_graph_case, block=(edge, edge), density=density),
        )
        for density in plan.graph_densities
        for edge in plan.blocks
    ]
    first = len(plan.blocks) * (len(plan.densities) - 1)
    return [*found[:first], *graphs, *found[first:]]


def csr(plan: Plan, device: torch.device) -> list[Case]:
    """Unstructured weights, by the kernels and through a short-lived dense weight."""
    del device
    return [
        Case(
            f"csr {sizes(plan.csr_shape)} {density:g} {impl}",
            partial(
                products_of,
                shape=plan.csr_shape,
                block=(1, 1),
                density=density,
                kind="bf16",
                impl=impl,
            ),
            4.0,
        )
        for density in plan.csr_densities
        for impl in ("triton", "dense")
    ]


def sizes(shape: Shape) -> str:
    """A shape in a name."""
    return "x".join(map(str, shape))


def products_of(
    bench: Bench, shape: Shape, block: Block, density: float, kind: str, impl: str = "triton"
) -> Iterator[Row]:
    """One row per product, and one for the three together."""
    with precision(kind), torch.no_grad():
        o = bench.operands(shape, block, density, kind)
        verdicts = bench.verdicts(o, impl)
        sparse, cublas = sparse_runs(o, impl), dense_for(o)
        for operation, verdict in verdicts.items():
            timing = None
            if verdict == "ok":
                pair = {"sparse": sparse[operation], "dense": cublas[operation]}
                timing = bench.time(pair)
            yield row_of(bench, o, operation, verdict, timing, impl=impl, graph=False)


def _graph_case(bench: Bench, block: Block, density: float) -> Iterator[Row]:
    """Few tokens, where launching costs as much as computing: replayed, and called from Python."""
    with precision("bf16"), torch.no_grad():
        o = bench.operands(bench.plan.graph_shape, block, density, "bf16")
        verdicts = bench.verdicts(o)
        sparse, cublas = sparse_runs(o), dense_for(o)
        repeats = bench.times(EAGER_REPEATS)
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
            yield row_of(bench, o, operation, verdict, timing, **more)


def row_of(
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
