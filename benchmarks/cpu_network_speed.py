"""A whole training step of WRN-22-2, sparse against dense, on the CPU.

    python -m benchmarks.cpu_network_speed [--rounds 9]

CIFAR's images and batch 64: forward, backward and an SGD step with momentum. Every convolution
takes the largest block that its channels allow, 32 or 16; the 3-channel stem and the output layer
stay dense. Dense and sparse steps take turns within one process, and the ratio is taken round by
round. A sparse network is timed only if it has the outputs of its own dense form, within the bound
that float64 leaves.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.cpu_speed import paired
from benchmarks.environment import save
from benchmarks.models import wide_resnet_22_2
from sparsekern import densify_, sparse_layers, sparsify_

BATCH, SIZE, CLASSES = 64, 32, 10
SPARSITY = 0.9
CASES = (("uniform", (32, 16)), ("erk", (32, 16)), ("uniform", (16,)), ("uniform", (1,)))


def block_for(edges: tuple[int, ...]) -> Callable[[str, nn.Module], int]:
    """The largest of these blocks that fits a layer's channels."""

    def block(_name: str, module: nn.Module) -> int:
        sizes: Any = module
        channels = min(sizes.in_channels, sizes.out_channels)
        return next(edge for edge in edges if edge <= channels)

    return block


def network(distribution: str, edges: tuple[int, ...]) -> nn.Module:
    """WRN-22-2 at 90 % sparsity."""
    torch.manual_seed(0)
    model = wide_resnet_22_2(CLASSES)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]

    def chosen(module: nn.Module, _name: str) -> bool:
        return module in convolutions[1:]

    return sparsify_(
        model, SPARSITY, block=block_for(edges), distribution=distribution, filter_fn=chosen
    )


def stepper(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
    """A training step on one batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(functional.cross_entropy(model(x), target))
        optimizer.step()

    return step


def check(model: nn.Module) -> None:
    """Compare with the dense form in float64, whose 53 bits leave 23 for errors to grow in."""
    twin = copy.deepcopy(model).double()
    x = torch.randn(4, 3, SIZE, SIZE, dtype=torch.float64)
    got = twin(x)
    want = densify_(twin)(x)
    if not bool(((got - want).abs() <= 2.0**-30 * want.abs().max()).all()):
        raise RuntimeError("the sparse network is wrong: its speed means nothing")


def measure(distribution: str, edges: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """One sparse network against the dense one."""
    torch.manual_seed(0)
    dense, sparse = wide_resnet_22_2(CLASSES), network(distribution, edges)
    check(sparse)
    x, target = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(0, CLASSES, (BATCH,))
    times = paired(stepper(dense, x, target), stepper(sparse, x, target), rounds)
    layers = sparse_layers(sparse)
    return {
        "distribution": distribution,
        "blocks": list(edges),
        "density": 1 - SPARSITY,
        "active": sum(layer.nnz for layer in layers.values()),
        "layers": {n: [list(m.block), m.density] for n, m in layers.items()},
        "step": times,
    }


def main() -> None:
    """Measure all cases, print a table, save JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sys.stdout.write(
        f"WRN-22-2, batch {BATCH}, density {1 - SPARSITY:.2g}, float32, {args.threads} threads; "
        "ratio = dense time / sparse time\n"
    )
    results = []
    for distribution, edges in CASES:
        row = measure(distribution, edges, args.rounds)
        results.append(row)
        times = row["step"]
        sys.stdout.write(
            f"{distribution:<8} blocks {'/'.join(map(str, edges)):<6} dense "
            f"{times['dense_ms']:.0f} ms, sparse {times['sparse_ms']:.0f} ms: "
            f"{times['ratio']:.2f}x [{times['ratio_low']:.2f}, {times['ratio_high']:.2f}]\n"
        )
        sys.stdout.flush()
    sys.stdout.write(f"saved {save('network_speed', {'batch': BATCH, 'cases': results})}\n")


if __name__ == "__main__":
    main()
