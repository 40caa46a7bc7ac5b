"""A 65,536 x 65,536 layer at 1 % density: created, trained and rewired on the CPU.

    python -m benchmarks.scale [--size 65536] [--sparsity 0.99] [--batch 32]

Dense, its weights, gradient and two AdamW moments alone would take 64 GiB.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from typing import Any

import torch
from torch import nn

from benchmarks.result_files import save
from sparsekern import RigL, SparseLinear

GIB = 2**30


def peak_gib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


class Stages:
    """Times named stages and notes the peak memory after each."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.start = time.perf_counter()

    def done(self, name: str) -> None:
        """Close a stage."""
        now = time.perf_counter()
        row = {"stage": name, "seconds": now - self.start, "peak_gib": peak_gib()}
        self.rows.append(row)
        sys.stdout.write(f"{name:<28} {row['seconds']:>8.1f} s   peak {row['peak_gib']:.2f} GiB\n")
        sys.stdout.flush()
        self.start = time.perf_counter()


def main() -> None:
    """Run the stages, print and save them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=65_536)
    parser.add_argument("--sparsity", type=float, default=0.99)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    torch.manual_seed(0)
    stages = Stages()
    layer = SparseLinear(args.size, args.size, sparsity=args.sparsity)
    stages.done("create")
    model = nn.Sequential(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    rigl = RigL(model, optimizer, t_end=100, update_freq=1, first_update=1)
    x = torch.randn(args.batch, args.size)
    for name in ("AdamW step (forward, backward)", "RigL update"):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        stages.done(name)
    layer.topology.validate()
    held = 4 * layer.values.numel() * 4 + layer.topology.nbytes
    change = rigl.history[0].layers["0"]
    summary = {
        "size": args.size,
        "density": layer.density,
        "nnz": layer.nnz,
        "batch": args.batch,
        "held_gib": held / GIB,
        "dense_gib": 16 * args.size**2 / GIB,
        "dropped": change.dropped,
        "grown": change.grown,
        "stages": stages.rows,
    }
    sys.stdout.write(
        f"held by the layer, AdamW included: {summary['held_gib']:.2f} GiB "
        f"(dense: {summary['dense_gib']:.0f} GiB); "
        f"{change.dropped:,} dropped, {change.grown:,} newly grown of {layer.nnz:,}\n"
        f"saved {save('scale', summary)}\n"
    )


if __name__ == "__main__":
    main()
