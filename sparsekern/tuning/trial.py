"""What a kernel is tried on: operands, exact integers among them, and what must come out.

Shared by `sparsekern tune` and by the benchmarks of a GPU. Correct first: on small integers every
order of summation gives the same bits, so a product must equal the dense float64 one exactly, into
memory that was filled with NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern import ops
from sparsekern.cost.roofline import Problem
from sparsekern.topology import Topology
from sparsekern.topology.blocks import Grid, tiles_of

Block = tuple[int, int]

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
"""By kind of operand: `tf32` and `fp32` differ by what a product may do to float32."""


class Shape(NamedTuple):
    """M tokens, K inputs, N outputs."""

    M: int
    K: int
    N: int


@contextmanager
def precision(kind: str) -> Iterator[None]:
    """Let float32 products use TF32, in cuBLAS and in this package alike, or forbid it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill fresh memory with NaN: freed memory may still hold the right result of another run."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


@dataclass(frozen=True, eq=False)
class Operands:
    """One sparse layer's tensors, and the dense weight of the same shape.

    Attributes:
        asked: the density asked for; whole blocks miss it by a little.
        x: (M, K).
        dy: (M, N).
        values: (nnzb, bh, bw).
    """

    topology: Topology
    kind: str
    asked: float
    x: Tensor
    dy: Tensor
    values: Tensor

    @property
    def shape(self) -> Shape:
        """M, K, N."""
        N, K = self.topology.shape
        return Shape(len(self.x), K, N)

    @property
    def problem(self) -> Problem:
        """The same, as the roofline model takes it."""
        M, K, N = self.shape
        return Problem(M, K, N, self.topology.block, self.values.numel() / (N * K), self.kind)

    @property
    def flops(self) -> float:
        """Of one product: 2 M times the stored weights."""
        return 2.0 * len(self.x) * self.values.numel()

    def with_integers(self, generator: torch.Generator, highest: int = 3) -> Operands:
        """The same shapes with small integers, whose sums are exact in any order."""
        own = self.x, self.dy, self.values
        x, dy, values = (integers_like(t, generator, highest) for t in own)
        values = self.topology.clear_padding_(values)
        return Operands(self.topology, self.kind, self.asked, x, dy, values)

    def dense_weight(self) -> Tensor:
        """The weight as a dense (N, K) matrix."""
        return self.topology.unpack(self.values)


def operands(
    shape: Shape, topology: Topology, kind: str, asked: float, generator: torch.Generator
) -> Operands:
    """Normally distributed operands on the generator's device."""
    dtype, device = DTYPES[kind], generator.device

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    values = topology.clear_padding_(normal(*topology.values_shape))
    return Operands(
        topology, kind, asked, normal(shape.M, shape.K), normal(shape.M, shape.N), values
    )


def random_topology(shape: Shape, block: Block, density: float, device: torch.device) -> Topology:
    """Blocks drawn uniformly; the same for every run."""
    draw = torch.Generator().manual_seed(0)
    return Topology.random(
        (shape.N, shape.K), block, sparsity=1 - density, generator=draw, device=device
    )


def integers_like(tensor: Tensor, generator: torch.Generator, highest: int = 3) -> Tensor:
    """Integers from -highest to highest, of the shape and dtype of `tensor`."""
    size, span = tensor.shape, (-highest, highest + 1)
    drawn = torch.randint(*span, size, generator=generator, device=tensor.device)
    return drawn.to(tensor.dtype)


class Sum(NamedTuple):
    """A result in float64, the same sum over magnitudes, and the terms of its longest sum."""

    value: Tensor
    magnitude: Tensor
    terms: int


def products(o: Operands, impl: str, bias: Tensor | None = None) -> dict[str, Callable[[], Tensor]]:
    """The three products of a training step, by operation."""
    return {
        "forward": lambda: ops.spmm(o.x, o.values, o.topology, bias, impl=impl),
        "dx": lambda: ops.spmm_t(o.dy, o.values, o.topology, impl=impl),
        "dw": lambda: ops.sddmm(o.dy, o.x, o.topology, impl=impl),
    }


def expected(operation: str, o: Operands, bias: Tensor | None = None) -> Sum:
    """The same products in float64, through the dense weight."""
    if operation == "dw":
        dy, x = o.dy.double(), o.x.double()
        value, magnitude = dy.t() @ x, dy.abs().t() @ x.abs()
        return Sum(o.topology.pack(value), o.topology.pack(magnitude), len(x))
    w = o.dense_weight().double()
    left, right = (o.x.double(), w.t()) if operation == "forward" else (o.dy.double(), w)
    value, magnitude = left @ right, left.abs() @ right.abs()
    terms = int((right != 0).sum(0).max())
    if bias is not None and operation == "forward":
        value, magnitude = value + bias.double(), magnitude + bias.double().abs()
        terms += 1
    return Sum(value, magnitude, terms)


def difference(got: Tensor, want: Tensor) -> str:
    """Empty if equal in shape and every element; else what differs."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"expected {tuple(want.shape)} {want.dtype}; got {tuple(got.shape)} {got.dtype}"
    wrong = got != want
    count = int(wrong.sum())
    if not count:
        return ""
    first = wrong.nonzero()[0].tolist()
    return f"{count} of {want.numel()} differ, first at {first}"


def block_norms(dense: Tensor, block: Block, norm: str) -> Tensor:
    """Sum or largest of the magnitudes of every block, by flat position."""
    tiles = tiles_of(dense.abs(), Grid.of(dense.shape, block))
    return (tiles.sum((1, 3)) if norm == "l1" else tiles.amax((1, 3))).flatten()
