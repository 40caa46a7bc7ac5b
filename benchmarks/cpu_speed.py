"""Forward and backward of a `SparseLinear` against `nn.Linear`, on the CPU.

    python -m benchmarks.cpu_speed [--rounds 15] [--backend jit|blas|csr]

Dense and sparse steps take turns within one process, and the ratio is taken round by round: a
machine whose speed drifts moves both. Before a case is timed its result is compared with the dense
layer on integers, bit for bit; a case that fails is not reported.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import save
from sparsekern import SparseLinear
from sparsekern.ops import cpu

M = 512
LAYERS = [(1024, 1024), (4096, 1024)]  # (out_features, in_features)
CASES = [  # (block, density, ratio to reach)
    (128, 0.1, None),
    (64, 0.1, 3.0),
    (32, 0.1, 2.0),
    (16, 0.1, None),
    (4, 0.1, None),
    (1, 0.1, None),
    (1, 0.05, 1.8),
    (1, 0.02, 3.5),
]


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    """One forward and backward: y, dx, dw and db."""
    x.grad = None
    layer.zero_grad(set_to_none=True)
    layer(x).backward(dy)


def forward(layer: nn.Module, x: Tensor, _dy: Tensor) -> None:
    """Forward only."""
    with torch.no_grad():
        layer(x)


def check_exact(layer: SparseLinear) -> None:
    """Compare with the dense layer on integers, where every order of sums agrees."""
    saved = layer.active_values().clone()
    layer.set_active_values((saved * 8).round().clamp(-3, 3))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    dense = layer.to_dense()
    x = torch.randint(-3, 4, (M, layer.in_features)).float().requires_grad_()
    dy = torch.randint(-3, 4, (M, layer.out_features)).float()
    y = layer(x)
    y.backward(dy)
    expected = dense(x)
    dx, dw = torch.autograd.grad(expected, (x, dense.weight), dy)
    pairs = [(y, expected), (x.grad, dx), (layer.values.grad, layer.topology.pack(dw))]
    if not all(got is not None and torch.equal(got, want) for got, want in pairs):
        raise RuntimeError(f"{layer} is not exact: its speed means nothing")
    layer.set_active_values(saved)


def seconds(run: Callable[[], None]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def paired(dense: Callable[[], None], sparse: Callable[[], None], rounds: int) -> dict[str, float]:
    """Median times in milliseconds, and the median, lowest and highest ratio of the rounds."""
    for _ in range(3):
        dense()
        sparse()
    pairs = [(seconds(dense), seconds(sparse)) for _ in range(rounds)]
    ratios = sorted(d / s for d, s in pairs)
    return {
        "dense_ms": 1e3 * statistics.median(d for d, _ in pairs),
        "sparse_ms": 1e3 * statistics.median(s for _, s in pairs),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
    }


def measure(shape: tuple[int, int], block: int, density: float, rounds: int) -> dict[str, Any]:
    """One case: forward alone, and forward with backward."""
    rows, cols = shape
    torch.manual_seed(0)
    layer = SparseLinear(cols, rows, sparsity=1 - density, block=block)
    check_exact(layer)
    dense = nn.Linear(cols, rows)
    x, dy = torch.randn(M, cols, requires_grad=True), torch.randn(M, rows)
    both = paired(lambda: step(dense, x, dy), lambda: step(layer, x, dy), rounds)
    only = paired(lambda: forward(dense, x, dy), lambda: forward(layer, x, dy), rounds)
    flops = 3 * 2 * M * layer.values.numel()
    return {
        "shape": shape,
        "block": block,
        "density": layer.density,
        "backend": cpu.backend_for(layer.topology, torch.float32),
        "forward": only,
        "forward_backward": both,
        "sparse_gflops": flops / both["sparse_ms"] / 1e6,
        "dense_gflops": 3 * 2 * M * rows * cols / both["dense_ms"] / 1e6,
    }


def main() -> None:
    """Measure all cases, print a table, save JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", choices=cpu.NAMES, help="instead of what the rule picks")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    sys.stdout.write(
        f"M = {M}, float32, {args.threads} threads; ratio = dense time / sparse time\n"
    )
    sys.stdout.write("layer        block density backend  forward   fwd+bwd [low, high]   asked\n")
    with cpu.force(args.backend) if args.backend else nullcontext():
        for shape in LAYERS:
            for block, density, asked in CASES:
                if args.backend == "blas" and block == 1:
                    continue
                row = measure(shape, block, density, args.rounds)
                results.append(row | {"asked": asked})
                both = row["forward_backward"]
                sys.stdout.write(
                    f"{shape[0]:>4} x {shape[1]:<5} {block:>5} {density:>7} {row['backend']:>7} "
                    f"{row['forward']['ratio']:>8.2f}x {both['ratio']:>8.2f}x "
                    f"[{both['ratio_low']:.2f}, {both['ratio_high']:.2f}]"
                    f"{f'{asked:>8}x' if asked else ''}\n"
                )
                sys.stdout.flush()
    name = f"speed_{args.backend}" if args.backend else "speed"
    sys.stdout.write(f"saved {save(name, {'M': M, 'cases': results})}\n")


if __name__ == "__main__":
    main()
