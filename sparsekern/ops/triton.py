"""The Triton backend: hands tensors to the launchers in `sparsekern.kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.kernels.bsr_conv2d import bsr_conv2d
from sparsekern.kernels.bsr_conv2d_dgrad import bsr_conv2d_dgrad
from sparsekern.kernels.bsr_conv2d_wgrad import bsr_conv2d_wgrad
from sparsekern.kernels.bsr_sddmm import bsr_sddmm
from sparsekern.kernels.bsr_spmm import bsr_spmm, bsr_spmm_t
from sparsekern.kernels.csr_conv2d import csr_conv2d, csr_conv2d_dgrad
from sparsekern.kernels.csr_conv2d_wgrad import csr_conv2d_wgrad
from sparsekern.kernels.csr_sddmm import csr_sddmm
from sparsekern.kernels.csr_spmm import csr_spmm, csr_spmm_t
from sparsekern.kernels.window import Window
from sparsekern.ops.geometry import ConvGeometry
from sparsekern.ops.layout import format_of, image_of, pixels_of
from sparsekern.topology import Topology


def spmm(
    x: Tensor, values: Tensor, topology: Topology, bias: Tensor | None, *, relu: bool = False
) -> Tensor:
    """y = x wᵀ + bias, or max(y, 0): (M, cols) -> (M, rows)."""
    launch = csr_spmm if topology.block == (1, 1) else bsr_spmm
    indices = topology.crow, topology.col, topology.row_order
    return launch(x, values, *indices, bias, topology.shape[0], relu=relu)


def spmm_t(dy: Tensor, values: Tensor, topology: Topology) -> Tensor:
    """dx = dy w: (M, rows) -> (M, cols)."""
    launch = csr_spmm_t if topology.block == (1, 1) else bsr_spmm_t
    indices = topology.ccol, topology.row, topology.perm, topology.col_order
    return launch(dy, values, *indices, topology.shape[1])


def sddmm(dy: Tensor, x: Tensor, topology: Topology, *, out: Tensor | None = None) -> Tensor:
    """dw = dyᵀ x at active blocks: (nnzb, bh, bw); added to `out` if it is given."""
    if topology.block == (1, 1):
        return csr_sddmm(dy, x, topology.crow, topology.col, out=out)
    return bsr_sddmm(dy, x, topology.crow, topology.col, topology.block, out=out)


def backward(dy: Tensor, x: Tensor, values: Tensor, topology: Topology) -> tuple[Tensor, Tensor]:
    """(dx, dw) of `spmm`."""
    return spmm_t(dy, values, topology), sddmm(dy, x, topology)


def conv2d(
    x: Tensor, values: Tensor, topology: Topology, geometry: ConvGeometry, bias: Tensor | None
) -> Tensor:
    """y = x * w + bias: (N, C_in, H, W) -> (N, C_out, P, Q)."""
    if geometry.pointwise and _channels_last(x):
        y = image_of(spmm(pixels_of(x), values, topology, bias), len(x), *x.shape[2:])
        return y.contiguous(memory_format=format_of(x))
    launch = csr_conv2d if topology.block == (1, 1) else bsr_conv2d
    indices = topology.crow, topology.col, topology.row_order
    return launch(x, values, *indices, bias, topology.shape[0], _window(geometry))


def conv2d_dgrad(
    dy: Tensor,
    values: Tensor,
    topology: Topology,
    geometry: ConvGeometry,
    *,
    size: tuple[int, int],
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """Input gradient: (N, C_out, P, Q) -> (N, C_in, *size), by default in dy's memory format."""
    memory_format = memory_format or format_of(dy)
    if geometry.pointwise and _channels_last(dy):
        dx = image_of(spmm_t(pixels_of(dy), values, topology), len(dy), *size)
        return dx.contiguous(memory_format=memory_format)
    launch = csr_conv2d_dgrad if topology.block == (1, 1) else bsr_conv2d_dgrad
    indices = topology.ccol, topology.row, topology.perm
    n_in = topology.shape[1] // topology.taps * topology.groups
    return launch(dy, values, *indices, n_in, size, _window(geometry), memory_format)


def conv2d_wgrad(dy: Tensor, x: Tensor, topology: Topology, geometry: ConvGeometry) -> Tensor:
    """Weight gradient at active blocks: (nnzb, bh, bw)."""
    if geometry.pointwise and _channels_last(x) and _channels_last(dy):
        return sddmm(pixels_of(dy), pixels_of(x), topology)
    crow, col, window = topology.crow, topology.col, _window(geometry)
    if topology.block == (1, 1):
        return csr_conv2d_wgrad(dy, x, crow, col, window)
    return bsr_conv2d_wgrad(dy, x, crow, col, topology.block, window)


def conv2d_backward(
    dy: Tensor, x: Tensor, values: Tensor, topology: Topology, geometry: ConvGeometry
) -> tuple[Tensor, Tensor]:
    """(dx, dw) of `conv2d`, dx in x's memory format."""
    size, memory_format = (x.shape[2], x.shape[3]), format_of(x)
    dx = conv2d_dgrad(dy, values, topology, geometry, size=size, memory_format=memory_format)
    return dx, conv2d_wgrad(dy, x, topology, geometry)


def _channels_last(a: Tensor) -> bool:
    """Whether the (N H W, C) matrix of pixels is a contiguous view."""
    return a.is_contiguous(memory_format=torch.channels_last)


def _window(geometry: ConvGeometry) -> Window:
    g = geometry
    return Window(g.groups, g.kernel, g.stride, g.padding, g.dilation)
