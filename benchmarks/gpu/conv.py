"""Part `conv`: convolutions against cuDNN, channels-last, taking turns with it.

A case is timed only if all of its products are exact on integers, where every order of summation
gives the same bits: they are compared with a float64 convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.agenda import Case, Row
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cases import Plan
from benchmarks.gpu.speed import Runs, with_three
from sparsekern import Topology, ops
from sparsekern.cost.roofline import OPERATIONS, Problem
from sparsekern.ops.geometry import ConvGeometry
from sparsekern.tuning.trial import DTYPES, Block, difference, integers_like, poisoned, precision


@dataclass(frozen=True)
class ConvShape:
    """One layer: batch, channels, input pixels along an edge, kernel, stride."""

    batch: int
    inputs: int
    outputs: int
    edge: int
    kernel: int = 3
    stride: int = 1

    @property
    def geometry(self) -> ConvGeometry:
        """Padded so that stride 1 keeps the size."""
        k, s, p = self.kernel, self.stride, self.kernel // 2
        return ConvGeometry((k, k), (s, s), (p, p))

    @property
    def out_edge(self) -> int:
        """Output pixels along an edge."""
        return self.geometry.output_size(self.edge, self.edge)[0]

    def problem(self, block: Block, density: float, kind: str) -> Problem:
        """As the roofline model takes it: output pixels are tokens, each input is read once."""
        pixels = self.batch * self.out_edge**2
        taps = self.kernel**2
        read = self.inputs * min(self.stride**2, taps)
        return Problem(pixels, taps * self.inputs, self.outputs, block, density, kind, read)


@dataclass(frozen=True)
class Layer:
    """One with a block and a density."""

    shape: ConvShape
    block: Block
    density: float = 0.1


_WIDE = ConvShape(256, 256, 256, 14)
FULL = (
    *(Layer(_WIDE, (b, b), d) for b in (64, 32, 16) for d in (0.1, 0.05)),
    Layer(_WIDE, (1, 1), 0.02),
    *(Layer(ConvShape(256, 128, 128, 28), (b, b)) for b in (64, 32)),
    *(Layer(ConvShape(256, 512, 512, 7), (b, b)) for b in (64, 32)),
    Layer(ConvShape(256, 256, 512, 14, stride=2), (32, 32)),  # strided
    Layer(ConvShape(256, 1024, 256, 14, kernel=1), (32, 32)),  # pointwise: the linear kernels
    Layer(ConvShape(256, 64, 64, 56), (32, 32)),
)
DRY = (
    Layer(ConvShape(1, 16, 32, 5), (16, 16), 0.4),
    Layer(ConvShape(1, 3, 4, 4, stride=2), (1, 1), 0.4),
)


@dataclass(frozen=True, eq=False)
class Operands:
    """Tensors of one case, all channels-last, and the dense weight of the same shape."""

    topology: Topology
    geometry: ConvGeometry
    x: Tensor
    dy: Tensor
    values: Tensor
    weight: Tensor

    def sparse(self) -> Runs:
        """The three products of this package."""
        size = (self.x.shape[2], self.x.shape[3])
        t, g, which = self.topology, self.geometry, "triton"
        return with_three(
            {
                "forward": lambda: ops.conv2d(self.x, self.values, t, g, impl=which),
                "dx": lambda: ops.conv2d_dgrad(self.dy, self.values, t, g, size=size, impl=which),
                "dw": lambda: ops.conv2d_wgrad(self.dy, self.x, t, g, impl=which),
            }
        )

    def dense(self) -> Runs:
        """The same by torch, which asks cuDNN."""
        g = self.geometry

        def gradient(index: int) -> Tensor:
            wanted = [index == 0, index == 1, False]
            gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
                *(self.dy, self.x, self.weight, None),
                *(list(g.stride), list(g.padding), list(g.dilation)),
                *(False, [0, 0], g.groups, wanted),
            )
            return gradients[index]

        return with_three(
            {
                "forward": lambda: functional.conv2d(
                    self.x, self.weight, None, g.stride, g.padding, g.dilation, g.groups
                ),
                "dx": lambda: gradient(0),
                "dw": lambda: gradient(1),
            }
        )


def conv(plan: Plan, device: torch.device) -> list[Case]:
    """A case for each layer, in bf16."""
    del device
    return [
        Case(_name(case), partial(_rows, case=case, kind="bf16"), 3.0)
        for case in (DRY if plan.dry else FULL)
    ]


def _name(case: Layer) -> str:
    s = case.shape
    return (
        f"conv {case.block[0]} {case.density:g} {s.batch}x{s.inputs}x{s.edge}x{s.edge} to "
        f"{s.outputs} by {s.kernel} stride {s.stride}"
    )


@contextmanager
def _fastest() -> Iterator[None]:
    """Let cuDNN choose its fastest algorithm."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _rows(bench: Bench, case: Layer, kind: str) -> Iterator[Row]:
    """A row for each product."""
    problem = case.shape.problem(case.block, case.density, kind)
    facts: Row = {"what": "conv", "M": problem.M, "K": problem.K, "N": problem.N}
    facts |= {"block": list(case.block), "kind": kind, "density": case.density}
    facts |= {"kernel_size": case.shape.kernel, "stride": case.shape.stride}
    facts |= {"edge": case.shape.edge, "batch": case.shape.batch}
    with precision(kind), torch.no_grad(), _fastest():
        o = _operands(bench, case, kind)
        verdicts = _verdicts(bench, o)
        sparse, dense = o.sparse(), o.dense()
        for operation, verdict in verdicts.items():
            row = facts | {"operation": operation, "status": verdict, "ms": None, "ratio": None}
            if verdict == "ok":
                pair = {"sparse": sparse[operation], "dense": dense[operation]}
                row |= bench.against_dense(bench.time(pair), operation, problem)
            yield row


def _operands(bench: Bench, case: Layer, kind: str) -> Operands:
    shape, g, dtype = case.shape, case.shape.geometry, DTYPES[kind]
    topology = Topology.random(
        (shape.outputs, g.taps * shape.inputs),
        case.block,
        sparsity=1 - case.density,
        taps=g.taps,
        generator=torch.Generator().manual_seed(0),
        device=bench.device,
    )
    generator = bench.generator()

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=bench.device).to(dtype)

    return Operands(
        topology,
        g,
        _last(normal(shape.batch, shape.inputs, shape.edge, shape.edge)),
        _last(normal(shape.batch, shape.outputs, shape.out_edge, shape.out_edge)),
        topology.clear_padding_(normal(*topology.values_shape)),
        _last(normal(shape.outputs, shape.inputs, *g.kernel)),
    )


def _verdicts(bench: Bench, o: Operands) -> dict[str, str]:
    """By operation and for "three": "ok" or "incorrect"."""
    generator = bench.generator(1)
    x, dy, values = (integers_like(t[:2] if t.dim() == 4 else t, generator) for t in
                     (o.x, o.dy, o.values))  # fmt: skip
    values = o.topology.clear_padding_(values)
    matrix = o.topology.unpack(values.double())
    weight = matrix.view(len(matrix), *o.geometry.kernel, -1).permute(0, 3, 1, 2).contiguous()
    exact = Operands(o.topology, o.geometry, x.double(), dy.double(), values, weight).dense()
    with poisoned():
        got = Operands(o.topology, o.geometry, _last(x), _last(dy), values, weight).sparse()
        found = {name: got[name]() for name in OPERATIONS}
    dense_dw = exact["dw"]()
    want = {
        "forward": exact["forward"](),
        "dx": exact["dx"](),
        "dw": o.topology.pack(dense_dw.permute(0, 2, 3, 1).reshape(o.topology.shape)),
    }
    verdicts = {
        name: "incorrect" if difference(found[name], want[name].to(found[name].dtype)) else "ok"
        for name in OPERATIONS
    }
    wrong = "incorrect" in verdicts.values()
    return verdicts | {"three": "incorrect" if wrong else "ok"}


def _last(image: Tensor) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last)
