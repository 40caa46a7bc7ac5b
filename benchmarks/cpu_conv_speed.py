"""Forward and backward of a `SparseConv2d` against `nn.Conv2d`, on the CPU.

    python -m benchmarks.cpu_conv_speed [--rounds 9] [--only resnet] [--channels-last]

As in `cpu_speed`, dense and sparse steps take turns within one process and the ratio is taken round
by round; before a case is timed its result is compared with the dense layer on integers, bit for
bit. float32; the dense layer is oneDNN's convolution.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cpu_speed import forward, paired, step
from benchmarks.environment import save
from sparsekern import SparseConv2d
from sparsekern.nn.conv import matrix_of
from sparsekern.ops import cpu


class Layer(NamedTuple):
    """A convolution of square images."""

    images: int
    inputs: int
    outputs: int
    size: int
    kernel: int = 3
    stride: int = 1


RESNET = {
    "3x3 256 @ 14": Layer(32, 256, 256, 14),
    "1x1 256-64 @ 56": Layer(16, 256, 64, 56, 1),
    "1x1 64-256 @ 56": Layer(16, 64, 256, 56, 1),
    "3x3/2 128 @ 56": Layer(16, 128, 128, 56, 3, 2),
    "1x1/2 256-512 @ 56": Layer(16, 256, 512, 56, 1, 2),
}
WRN = {  # WRN-22-2 on 32 x 32 images
    "3x3 3-16 @ 32": Layer(64, 3, 16, 32),
    "3x3 16-32 @ 32": Layer(64, 16, 32, 32),
    "3x3 32 @ 32": Layer(64, 32, 32, 32),
    "1x1 16-32 @ 32": Layer(64, 16, 32, 32, 1),
    "3x3/2 32-64 @ 32": Layer(64, 32, 64, 32, 3, 2),
    "1x1/2 32-64 @ 32": Layer(64, 32, 64, 32, 1, 2),
    "3x3 64 @ 16": Layer(64, 64, 64, 16),
    "3x3/2 64-128 @ 16": Layer(64, 64, 128, 16, 3, 2),
    "3x3 128 @ 8": Layer(64, 128, 128, 8),
}
FAMILIES = {"resnet": RESNET, "wrn": WRN}
KINDS = [(64, 0.1), (32, 0.1), (16, 0.1), (1, 0.1), (1, 0.05)]  # block, density


def check_exact(layer: SparseConv2d, x: Tensor, dy: Tensor) -> None:
    """Compare with the dense layer on integers, where every order of sums agrees."""
    saved = layer.active_values().clone()
    layer.set_active_values((saved * 8).round().clamp(-3, 3))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    dense = layer.to_dense()
    x = torch.randint_like(x, -3, 4).requires_grad_()
    dy = torch.randint_like(dy, -3, 4)
    y = layer(x)
    y.backward(dy)
    expected = dense(x)
    dx, dw = torch.autograd.grad(expected, (x, dense.weight), dy)
    pairs = [(y, expected), (x.grad, dx), (layer.values.grad, layer.topology.pack(matrix_of(dw)))]
    if not all(got is not None and torch.equal(got, want) for got, want in pairs):
        raise RuntimeError(f"{layer} is not exact: its speed means nothing")
    layer.set_active_values(saved)


def measure(
    layer: Layer, block: int, density: float, rounds: int, layout: torch.memory_format
) -> dict[str, Any]:
    """One case: forward alone, and forward with backward."""
    torch.manual_seed(0)
    arguments = (layer.inputs, layer.outputs, layer.kernel, layer.stride, layer.kernel // 2)
    sparse = SparseConv2d(*arguments, sparsity=1 - density, block=block)
    dense = nn.Conv2d(*arguments)
    shape = (layer.images, layer.inputs, layer.size, layer.size)
    x = torch.randn(shape).to(memory_format=layout).requires_grad_()
    dy = torch.randn_like(dense(x))
    check_exact(sparse, x.detach(), dy)
    both = paired(lambda: step(dense, x, dy), lambda: step(sparse, x, dy), rounds)
    only = paired(lambda: forward(dense, x, dy), lambda: forward(sparse, x, dy), rounds)
    pixels = dy.shape[0] * dy.shape[2] * dy.shape[3]
    return {
        **layer._asdict(),
        "block": block,
        "density": sparse.density,
        "backend": cpu.backend_for(sparse.topology, torch.float32),
        "forward": only,
        "forward_backward": both,
        "sparse_gflops": 6 * pixels * sparse.values.numel() / both["sparse_ms"] / 1e6,
        "dense_gflops": 6 * pixels * dense.weight.numel() / both["dense_ms"] / 1e6,
    }


def line(name: str, row: dict[str, Any]) -> str:
    """A case as a line of the table."""
    both = row["forward_backward"]
    return (
        f"{name:<20} {row['block']:>5} {row['density']:>7.3f} {both['dense_ms']:>9.2f} "
        f"{both['sparse_ms']:>9.2f} {row['forward']['ratio']:>7.2f}x {both['ratio']:>7.2f}x "
        f"[{both['ratio_low']:.2f}, {both['ratio_high']:.2f}]"
        f"{'   slower' if both['ratio'] < 1 else ''}\n"
    )


def main() -> None:
    """Measure all cases, print a table, save JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=tuple(FAMILIES))
    parser.add_argument("--channels-last", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    sys.stdout.write(
        f"float32, {args.threads} threads, {str(layout)[6:]}; ratio = dense time / sparse time\n"
        "layer                block density  dense ms sparse ms  forward  fwd+bwd [low, high]\n"
    )
    results = []
    for family in [args.only] if args.only else FAMILIES:
        for name, layer in FAMILIES[family].items():
            for block, density in KINDS:
                if block > min(layer.inputs, layer.outputs):
                    continue
                row = measure(layer, block, density, args.rounds, layout)
                results.append({"family": family, "layer": name, **row})
                sys.stdout.write(line(name, row))
                sys.stdout.flush()
    # a part of the cases does not replace the whole
    suffix = f"_{args.only}" if args.only else ""
    name = "conv_speed" + ("_channels_last" if args.channels_last else "") + suffix
    saved = save(name, {"layout": str(layout), "cases": results})
    sys.stdout.write(f"saved {saved}\n")


if __name__ == "__main__":
    main()
