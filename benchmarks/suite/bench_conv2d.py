"""`SparseConv2d`: forward and a whole step, against oneDNN's convolution."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.suite import measure
from benchmarks.suite.layers import fill, forward, integers, only_where, present, step
from benchmarks.suite.problem import Contender, Facts, Problem, Tensors
from sparsekern import SparseConv2d, Topology
from sparsekern.ops.cpu import choice

KINDS = ((32, 0.1), (16, 0.1), (1, 0.1), (1, 0.05))
"""Block and density."""

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)


class Layer(NamedTuple):
    """A convolution of square images."""

    images: int
    inputs: int
    outputs: int
    size: int
    kernel: int = 3
    stride: int = 1


LAYERS = {
    "3x3-256-14": Layer(32, 256, 256, 14),  # of ResNet-50
    "3x3s2-128-56": Layer(16, 128, 128, 56, 3, 2),
    "1x1-256to64-56": Layer(16, 256, 64, 56, 1),
    "3x3-3to16-32": Layer(64, 3, 16, 32),  # of WRN-22-2
    "1x1-16to32-32": Layer(64, 16, 32, 32, 1),
    "3x3-32-32": Layer(64, 32, 32, 32),
    "3x3-64-16": Layer(64, 64, 64, 16),
    "3x3-128-8": Layer(64, 128, 128, 8),
    "3x3-128-14": Layer(16, 128, 128, 14),  # of the sweep
    "3x3-16-6": Layer(2, 16, 16, 6),
}
"""By kernel, stride, channels, and edge of the image."""

SWEPT, TINY = "3x3-128-14", "3x3-16-6"
PRODUCTS = {"forward": 1, "step": 3}


class Case(NamedTuple):
    """A layer by name."""

    operation: str
    layer: str
    block: int
    density: float


SWEEP = [Case("step", SWEPT, block, density) for block in (32, 16, 1) for density in DENSITIES]
SPEED = [
    Case(operation, name, *kind)
    for operation in PRODUCTS
    for name, layer in LAYERS.items()
    for kind in KINDS
    if name not in (SWEPT, TINY) and kind[0] <= min(layer.inputs, layer.outputs)
] + SWEEP
MEMORY = [Case("step", name, *kind) for name in ("3x3-256-14",) for kind in KINDS] + SWEEP
QUICK = [Case(operation, TINY, block, 0.25) for operation in PRODUCTS for block in (16, 1)]
QUICK_MEMORY = [case for case in QUICK if case.operation == "step"]


def setup(case: Case) -> Problem:
    """The same layer sparse, dense and masked."""
    torch.manual_seed(0)
    layer = LAYERS[case.layer]
    arguments = layer.inputs, layer.outputs, layer.kernel, layer.stride, layer.kernel // 2
    sparse = SparseConv2d(*arguments, sparsity=1 - case.density, block=case.block)
    fill(sparse)
    with torch.no_grad():
        sparse.topology.clear_padding_(sparse.values)
    dense: Any = sparse.to_dense()
    mask = sparse.mask()
    masked = SparseConv2d.from_topology(dense, sparse.topology, impl="masked")
    x = integers(layer.images, layer.inputs, layer.size, layer.size).requires_grad_()
    dy = integers(*dense(x).shape)
    others: dict[str, Contender | str] = {"torch.sparse": "has no convolution"}
    if case.operation == "step":
        own, dense_step = step(sparse, x, dy), step(dense, x, dy)
        others |= {"dense": only_where(mask, dense_step, 2), "masked": step(masked, x, dy)}
    else:
        own = forward(sparse, x)
        others |= {"dense": forward(dense, x), "masked": forward(masked, x)}
    expected = _expected(dense, mask, x, dy)[: 1 if case.operation == "forward" else None]
    return Problem(facts(case, sparse.topology, dy), own, others, expected)


def _expected(dense: nn.Conv2d, mask: Tensor, x: Tensor, dy: Tensor) -> Tensors:
    """y, dx, dw and db, by torch."""
    y, wanted = dense(x), (x, dense.weight, present(dense.bias))
    dx, dw, db = torch.autograd.grad(y, wanted, dy)
    return y.detach(), dx, dw * mask, db


def facts(case: Case, topology: Topology, dy: Tensor) -> Facts:
    """FLOPs and bytes by formula."""
    layer, products = LAYERS[case.layer], PRODUCTS[case.operation]
    pixels, stored = dy.numel() // layer.outputs, topology.nnzb * case.block**2
    images = layer.images * layer.inputs * layer.size**2 + dy.numel()
    return Facts(
        family="conv2d",
        operation=case.operation,
        name=case.layer,
        sizes=layer._asdict(),
        block=case.block,
        density=case.density,
        active=topology.density,
        backend=choice.backend_for(topology, torch.float32),
        flops=2 * products * pixels * stored,
        dense_flops=2 * products * pixels * topology.shape[0] * topology.shape[1],
        bytes=4 * products * (images + stored + 2 * topology.nnzb),
    )


def test_speed(benchmark: measure.Benchmark, case: Case, quick: bool) -> None:
    """Time it."""
    measure.speed(benchmark, setup(case), quick=quick)


def test_memory(benchmark: measure.Benchmark, case: Case, quick: bool) -> None:
    """Weigh it."""
    measure.memory(benchmark, setup(case), quick=quick)
