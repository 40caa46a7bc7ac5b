"""Combinations of everything a convolution can be asked for, as data."""

import itertools
from typing import NamedTuple

import torch
from support import integers

from sparsekern.ops.geometry import ConvGeometry
from sparsekern.topology import Topology


class ConvCase(NamedTuple):
    """One convolution: geometry, channels of one group, image, block, layout."""

    geometry: ConvGeometry
    outputs: int
    inputs: int
    size: tuple[int, int]
    block: tuple[int, int]
    layout: str
    batch: int = 2
    density: float = 0.4

    def __str__(self):
        g = self.geometry
        sizes = (g.kernel, g.stride, g.padding, g.dilation, self.size, self.block)
        names = "kspdhb"
        parts = [f"{n}{a}x{b}" for n, (a, b) in zip(names, sizes, strict=True)]
        return "-".join([*parts, f"g{g.groups}", f"o{self.outputs}i{self.inputs}", self.layout])


LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed")
KERNELS = ((1, 1), (3, 3), (1, 3), (3, 1), (2, 2), (5, 5), (7, 7), (4, 3))
STRIDES = ((1, 1), (2, 2), (3, 3), (2, 1), (1, 2))
PADDINGS = ((0, 0), (1, 1), (2, 2), (0, 3), (3, 1))
DILATIONS = ((1, 1), (2, 2), (1, 3))
SIZES = ((1, 1), (1, 5), (7, 1), (4, 4), (8, 7), (5, 9), (14, 14))


def fits(geometry, size):
    """Whether there is at least one output."""
    return all(
        n + 2 * p >= d * (k - 1) + 1
        for n, p, d, k in zip(
            size, geometry.padding, geometry.dilation, geometry.kernel, strict=True
        )
    )


def combinations(blocks, count, seed=0, kernels=KERNELS):
    """`count` different cases, every value of every axis met many times over."""
    channels = ((1, 1), (1.5, 1), (1, 2.4), (2.2, 1.3), (3, 2))  # in blocks, ragged ones too
    axes = (kernels, STRIDES, PADDINGS, DILATIONS, (1, 1, 2, 3), SIZES, blocks, channels, LAYOUTS)
    every = [len(axis) for axis in axes]
    total = torch.tensor(every).prod().item()
    generator, found = torch.Generator().manual_seed(seed), {}
    while len(found) < count:
        number = int(torch.randint(total, (1,), generator=generator))
        choice = []
        for axis in axes:
            number, at = divmod(number, len(axis))
            choice.append(axis[at])
        kernel, stride, padding, dilation, groups, size, block, (rows, cols), layout = choice
        geometry = ConvGeometry(kernel, stride, padding, dilation, groups)
        if not fits(geometry, size):
            continue
        edge = (
            max(block[0], 3 if block == (1, 1) else 1),
            max(block[1], 3 if block == (1, 1) else 1),
        )
        outputs, inputs = max(int(edge[0] * rows), block[0]), max(int(edge[1] * cols), block[1])
        if groups > 1 and inputs == 1:
            continue
        case = ConvCase(geometry, outputs, inputs, size, block, layout)
        found[str(case)] = case
    return list(found.values())


def laid_out(image, layout):
    """The image in another memory layout, NaN around and between its numbers."""
    n, c, h, w = image.shape
    if layout == "contiguous":
        return image.contiguous()
    if layout == "channels_last":
        return image.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        store = image.new_full((n + 1, c + 2, h + 1, 2 * w), float("nan"))
        return store[1:, 1 : c + 1, :h, ::2].copy_(image)
    return image.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


class Operands(NamedTuple):
    """What a case multiplies: integers, so that every order of summation gives the same bits."""

    topology: Topology
    weight: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    x: torch.Tensor
    dy: torch.Tensor


def operands(case, dtype=torch.float32):
    """Integer operands; the padding of values holds NaN."""
    g = case.geometry
    rows, cols = g.groups * case.outputs, g.taps * case.inputs
    topology = Topology.random(
        (rows, cols), case.block, sparsity=1 - case.density, groups=g.groups, taps=g.taps
    )
    matrix = integers(rows, cols, dtype=dtype) * topology.to_mask()
    weight = matrix.view(rows, *g.kernel, -1).permute(0, 3, 1, 2).contiguous()
    inside = topology.pack(torch.ones(rows, cols)) == 1
    values = torch.where(inside, topology.pack(matrix), float("nan"))
    x = integers(case.batch, g.groups * case.inputs, *case.size, dtype=dtype)
    dy = integers(case.batch, rows, *g.output_size(*case.size), dtype=dtype)
    others = dict(zip(LAYOUTS, itertools.islice(itertools.cycle(LAYOUTS), 1, None), strict=False))
    return Operands(
        topology,
        weight,
        values,
        integers(rows, dtype=dtype),
        laid_out(x, case.layout),
        laid_out(dy, others[case.layout]),
    )
