"""Linear layers from the smallest to the largest batch, each in turn with its `nn.Linear`.

    OMP_NUM_THREADS=2 python -m benchmarks.linear_grid [--seconds 1.5] [--only TEXT] [--print]

Of each row the median over rounds of sparse time over dense time; where arithmetic is what takes
the time, also the share of the speed-up 1/density that is reached. Writes
benchmarks/results/cpu/linear_grid.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.paired import quartiles
from benchmarks.result_files import save
from sparsekern import SparseLinear

LEAST_ROUNDS = 7
BURST_SECONDS = 2e-3  # calls shorter than this are timed several at a time


class Row(NamedTuple):
    """A layer, its batch, and what is timed."""

    tokens: int
    inputs: int
    outputs: int
    block: int
    density: float
    backward: bool = True
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        kind = f"block {self.block}" if self.block > 1 else "unstructured"
        what = "forward and backward" if self.backward else "inference"
        name = (
            f"{self.tokens} x {self.inputs} -> {self.outputs}, {kind} at {self.density:g}, {what}"
        )
        return name if self.dtype is torch.float32 else f"{name}, {str(self.dtype)[6:]}"


KINDS = ((64, 0.1), (32, 0.1), (16, 0.1), (1, 0.05))
SMALL = (
    Row(8, 64, 64, 16, 0.5, backward=False),
    Row(8, 64, 64, 16, 0.5),
    Row(100, 64, 300, 1, 0.05),
    Row(128, 256, 256, 16, 0.1),
)
SHAPES = ((512, 4096, 4096), (512, 1024, 1024), (4096, 4096, 1024), (64, 1024, 1024))
LARGE = tuple(Row(*shape, *kind) for shape in SHAPES for kind in KINDS)
GENERATE = tuple(
    Row(m, width, width, *kind, backward=False)
    for width in (1024, 4096)
    for kind in ((32, 0.1), (1, 0.05))
    for m in (1, 2, 4, 8)
)
HALF = tuple(
    Row(512, 1024, 1024, *kind, backward, torch.bfloat16)
    for kind in ((32, 0.1), (1, 0.05))
    for backward in (False, True)
)
ROWS = (*SMALL, *LARGE, *GENERATE, *HALF)


def measure(row: Row, seconds: float) -> dict[str, Any]:
    """Median times of both layers and quartiles of their ratios."""
    torch.manual_seed(0)
    dense = nn.Linear(row.inputs, row.outputs, dtype=row.dtype)
    sparse = SparseLinear(
        row.inputs, row.outputs, sparsity=1 - row.density, block=row.block, dtype=row.dtype
    )
    x = torch.randn(row.tokens, row.inputs, dtype=row.dtype, requires_grad=row.backward)
    dy = torch.randn(row.tokens, row.outputs, dtype=row.dtype)
    layers, times = (sparse, dense), (list[float](), list[float]())
    burst = 1 + int(BURST_SECONDS / max(1e-6, min(_warm(layer, x, dy, row) for layer in layers)))
    end = time.perf_counter() + seconds
    while len(times[0]) < LEAST_ROUNDS or time.perf_counter() < end:
        for layer, found in zip(layers, times, strict=True):
            start = time.perf_counter()
            for _ in range(burst):
                _call(layer, x, dy, row)
            found.append((time.perf_counter() - start) / burst)
    q1, ratio, q3 = quartiles([own / other for own, other in zip(*times, strict=True)])
    micro = [1e6 * statistics.median(found) for found in times]
    active = sparse.topology.density
    return {
        "row": str(row),
        "ratio": ratio,
        "q1": q1,
        "q3": q3,
        "rounds": len(times[0]),
        "share": active / ratio,
        "sparse_us": micro[0],
        "dense_us": micro[1],
        "least": min(times[0]) / min(times[1]),
    }


def _warm(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor, row: Row) -> float:
    """Seconds of the second of two calls; the first compiles."""
    _call(layer, x, dy, row)
    start = time.perf_counter()
    _call(layer, x, dy, row)
    return time.perf_counter() - start


def _call(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor, row: Row) -> None:
    if not row.backward:
        with torch.no_grad():
            layer(x)
        return
    x.grad = None
    layer.zero_grad(set_to_none=True)
    layer(x).backward(dy)


def main(argv: list[str] | None = None) -> int:
    """Measure the rows and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="of each row")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--print", action="store_true", help="write no file")
    options = parser.parse_args(argv)
    found = []
    for row in ROWS:
        if options.only in str(row):
            found.append(measure(row, options.seconds))
            result = found[-1]
            print(
                f"{row}: {result['ratio']:.2f} x dense ({result['sparse_us']:.0f} us); "
                f"{result['share']:.0%} of 1/density",
                flush=True,
            )
    if not options.print:
        print(save("linear_grid", {"rows": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
