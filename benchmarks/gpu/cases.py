"""What is measured: shapes, blocks, densities and number formats, in full and for a dry run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern import Topology
from sparsekern.cost.roofline import Problem

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


@dataclass(frozen=True)
class Plan:
    """Everything a run goes through.

    Attributes:
        dry: on the CPU, through Triton's interpreter: nothing is measured.
        shapes: of the products in bf16.
        csr_shape: of those with unstructured weights.
        graph_shape: few tokens, timed as CUDA graphs.
        kinds: of operand beyond bf16, for the first shape at `other_density`.
        blocks: square ones, for speed.
        checked_blocks: for correctness.
        checked_kinds: of operand, for correctness.
        rectangle_kinds: the same for blocks that aren't square.
        layer_kinds: the same for whole layers.
        check_tokens: M of the checks.
        check_edge: K and N of the checks, before they are made ragged.
        check_densities: launches differ by how long the rows are, so short and long ones.
        csr_edge: K and N of the checks of unstructured weights.
        layer_edge: inputs of the layers that are checked.
        rounds: of a timing, at most; its median is reported.
        probe_bytes: of the copy that measures memory bandwidth.
        probe_edge: of the cube that measures the dense rate.
        variant_shape: of the variants that are compared.
        variant_blocks: for which variants of forward are compared.
        group_blocks: the same for dW, and those of the grow kernel.
    """

    dry: bool
    shapes: tuple[Shape, ...]
    csr_shape: Shape
    graph_shape: Shape
    graph_densities: tuple[float, ...]
    kinds: tuple[str, ...]
    other_density: float
    blocks: tuple[int, ...]
    densities: tuple[float, ...]
    csr_densities: tuple[float, ...]
    peer_densities: tuple[float, ...]
    checked_blocks: tuple[Block, ...]
    checked_kinds: tuple[str, ...]
    rectangle_kinds: tuple[str, ...]
    layer_kinds: tuple[str, ...]
    check_tokens: int
    check_edge: int
    check_densities: tuple[float, ...]
    csr_edge: int
    layer_edge: int
    rounds: int
    probe_bytes: int
    probe_edge: int
    variant_shape: Shape
    variant_blocks: tuple[int, ...]
    group_blocks: tuple[int, ...]


FULL = Plan(
    dry=False,
    shapes=(Shape(8192, 4096, 4096), Shape(8192, 4096, 16384)),
    csr_shape=Shape(8192, 4096, 4096),
    graph_shape=Shape(512, 4096, 4096),
    graph_densities=(0.1, 0.05),
    kinds=("tf32", "fp32"),
    other_density=0.1,
    blocks=(128, 64, 32, 16),
    densities=(0.5, 0.2, 0.1, 0.05, 0.02),
    csr_densities=(0.1, 0.05, 0.02, 0.01),
    peer_densities=(0.5, 0.1, 0.02),
    checked_blocks=(
        *((16, 16), (32, 32), (64, 64), (128, 128)),
        *((16, 64), (64, 32), (128, 16)),
        (1, 1),
    ),
    checked_kinds=("bf16", "fp16", "fp32", "tf32"),
    rectangle_kinds=("bf16", "tf32"),
    layer_kinds=("bf16", "fp32"),
    check_tokens=512,
    check_edge=2048,
    check_densities=(0.1, 0.5),
    csr_edge=256,
    layer_edge=256,
    rounds=20,
    probe_bytes=2**32,
    probe_edge=8192,
    variant_shape=Shape(8192, 4096, 4096),
    variant_blocks=(128, 64),
    group_blocks=(64, 32, 16),
)

DRY = Plan(
    dry=True,
    shapes=(Shape(32, 64, 48),),
    csr_shape=Shape(8, 16, 12),
    graph_shape=Shape(16, 64, 48),
    graph_densities=(0.5,),
    kinds=("fp32",),
    other_density=0.5,
    blocks=(16,),
    densities=(0.5,),
    csr_densities=(0.1,),
    peer_densities=(0.5,),
    checked_blocks=((16, 16), (1, 1)),
    checked_kinds=("bf16", "fp32"),
    rectangle_kinds=(),
    layer_kinds=("fp32",),
    check_tokens=32,
    check_edge=20,
    check_densities=(0.5,),
    csr_edge=8,
    layer_edge=48,
    rounds=1,
    probe_bytes=2**16,
    probe_edge=32,
    variant_shape=Shape(32, 64, 64),
    variant_blocks=(64,),
    group_blocks=(16,),
)


def groups(plan: Plan) -> list[tuple[Block, str]]:
    """Pairs of block and kind that are checked."""
    return [
        (block, kind)
        for block in plan.checked_blocks
        for kind in (plan.checked_kinds if block[0] == block[1] else plan.rectangle_kinds)
    ]


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

    def with_integers(self, generator: torch.Generator) -> Operands:
        """The same shapes with integers in -3..3, whose sums are exact in any order."""
        x, dy, values = (integers_like(t, generator) for t in (self.x, self.dy, self.values))
        values = zero_padding(values, self.topology)
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

    values = zero_padding(normal(*topology.values_shape), topology)
    return Operands(
        topology, kind, asked, normal(shape.M, shape.K), normal(shape.M, shape.N), values
    )


def random_topology(shape: Shape, block: Block, density: float, device: torch.device) -> Topology:
    """Blocks drawn uniformly; the same for every run."""
    draw = torch.Generator().manual_seed(0)
    return Topology.random(
        (shape.N, shape.K), block, sparsity=1 - density, generator=draw, device=device
    )


def integers_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Integers in -3..3 of the shape and dtype of `tensor`."""
    drawn = torch.randint(-3, 4, tensor.shape, generator=generator, device=tensor.device)
    return drawn.to(tensor.dtype)


def zero_padding(values: Tensor, topology: Topology) -> Tensor:
    """`values` with zeros wherever an edge block reaches beyond the matrix."""
    (rows, cols), (bh, bw) = topology.shape, topology.block
    if not (rows % bh or cols % bw):
        return values
    return topology.pack(topology.unpack(values))
