"""Forward and backward of `SparseGRU`, `SparseLSTM` and `SparseRNN` against torch's, on the CPU.

    python -m benchmarks.cpu_recurrent_speed [--rounds 7] [--threads 2]

One layer of 512 units over 128 time steps of 32 sequences, the width of the character model of Evci
et al. 2020 (appendix I). Dense and sparse steps take turns within one process, and the ratio is
taken round by round. Before a case is timed, its outputs and gradients are compared in float64 with
torch's module holding the same weights; a case that fails is not reported.
"""

from __future__ import annotations

import argparse
import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cpu_speed import paired
from benchmarks.environment import save
from sparsekern import SparseGRU, SparseLSTM, SparseRNN
from sparsekern.ops import cpu

HIDDEN, BATCH, STEPS = 512, 32, 128
CHECKED_STEPS = 6
LAYERS: list[Any] = [SparseGRU, SparseLSTM, SparseRNN]
CASES = [(32, 0.25), (16, 0.25), (1, 0.25), (32, 0.1), (16, 0.1), (1, 0.1)]  # (block, density)


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    """One forward and backward: y, dx and all weight gradients."""
    x.grad = None
    layer.zero_grad(set_to_none=True)
    layer(x)[0].backward(dy)


def forward(layer: nn.Module, x: Tensor) -> None:
    """Forward only."""
    with torch.no_grad():
        layer(x)


def check(layer: Any) -> None:
    """Compare with torch's module in float64, whose 53 bits leave 23 for errors to grow in."""
    layer = copy.deepcopy(layer).double()
    dense = layer.to_dense()
    x = torch.randn(CHECKED_STEPS, BATCH, HIDDEN, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (layer, dense):
        y = module(x)[0]
        (dx,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        y.square().sum().backward()
        results.append([y, dx])
    for name in ("ih_l0", "hh_l0"):
        matrix = layer.get_submodule(name)
        results[0].append(matrix.values.grad)
        results[1].append(matrix.topology.pack(getattr(dense, f"weight_{name}").grad))
    for got, want in zip(*results, strict=True):
        if not bool(((got - want).abs() <= 2.0**-30 * want.abs().max()).all()):
            raise RuntimeError(f"{layer} is wrong: its speed means nothing")


def measure(made: Any, block: int, density: float, rounds: int) -> dict[str, Any]:
    """One case: forward alone, and forward with backward."""
    torch.manual_seed(0)
    layer = made(HIDDEN, HIDDEN, sparsity=1 - density, block=block)
    check(layer)
    dense = made.dense_type(HIDDEN, HIDDEN)
    x = torch.randn(STEPS, BATCH, HIDDEN, requires_grad=True)
    dy = torch.randn(STEPS, BATCH, HIDDEN)
    both = paired(lambda: step(dense, x, dy), lambda: step(layer, x, dy), rounds)
    only = paired(lambda: forward(dense, x), lambda: forward(layer, x), rounds)
    return {
        "layer": made.dense_type.__name__,
        "block": block,
        "density": layer.hh_l0.density,
        "backend": cpu.backend_for(layer.hh_l0.topology, torch.float32),
        "forward": only,
        "forward_backward": both,
    }


def main() -> None:
    """Measure all cases, print a table, save JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = {"hidden": HIDDEN, "batch": BATCH, "steps": STEPS}
    sys.stdout.write(
        f"H = {HIDDEN}, batch {BATCH}, {STEPS} steps, float32, {args.threads} threads; "
        "ratio = dense time / sparse time\n"
        "layer block density backend  forward   fwd+bwd [low, high]   dense ms  sparse ms\n"
    )
    results = []
    for made in LAYERS:
        for block, density in CASES:
            row = measure(made, block, density, args.rounds)
            results.append(row)
            both = row["forward_backward"]
            sys.stdout.write(
                f"{row['layer']:>5} {block:>5} {density:>7} {row['backend']:>7} "
                f"{row['forward']['ratio']:>8.2f}x {both['ratio']:>8.2f}x "
                f"[{both['ratio_low']:.2f}, {both['ratio_high']:.2f}] "
                f"{both['dense_ms']:>10.0f} {both['sparse_ms']:>10.0f}\n"
            )
            sys.stdout.flush()
    sys.stdout.write(f"saved {save('recurrent_speed', sizes | {'cases': results})}\n")


if __name__ == "__main__":
    main()
