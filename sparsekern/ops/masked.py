"""The masked-dense reference: a dense weight that is zero where no connection exists.

It defines what is correct. Torch only, any dtype up to float64. It also serves as the named mode
`impl="dense"`: a dense weight that lives only as long as the operator, at dense FLOPs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sparsekern.ops.geometry import ConvGeometry
from sparsekern.ops.layout import format_of
from sparsekern.topology import Topology


def spmm(
    x: Tensor, values: Tensor, topology: Topology, bias: Tensor | None, *, relu: bool = False
) -> Tensor:
    """y = x wᵀ + bias, or max(y, 0): (M, cols) -> (M, rows)."""
    y = x @ topology.unpack(values).t()
    y = y if bias is None else y + bias
    return y.relu() if relu else y


def spmm_t(dy: Tensor, values: Tensor, topology: Topology) -> Tensor:
    """dx = dy w: (M, rows) -> (M, cols)."""
    return dy @ topology.unpack(values)


def sddmm(dy: Tensor, x: Tensor, topology: Topology, *, out: Tensor | None = None) -> Tensor:
    """dw = dyᵀ x at active blocks: (nnzb, bh, bw); added to `out` if it is given."""
    dw = topology.pack(dy.t() @ x)
    return dw if out is None else out.add_(dw)


def backward(dy: Tensor, x: Tensor, values: Tensor, topology: Topology) -> tuple[Tensor, Tensor]:
    """(dx, dw) of `spmm`."""
    return spmm_t(dy, values, topology), sddmm(dy, x, topology)


# ---- convolution


def to_kernel(matrix: Tensor, geometry: ConvGeometry) -> Tensor:
    """(C_out, C_in / groups, kh, kw) of a matrix (C_out, kh kw C_in / groups), taps first."""
    return matrix.view(len(matrix), *geometry.kernel, -1).permute(0, 3, 1, 2).contiguous()


def to_matrix(kernel: Tensor) -> Tensor:
    """Inverse of `to_kernel`."""
    return kernel.permute(0, 2, 3, 1).reshape(len(kernel), -1)


def conv2d(
    x: Tensor, values: Tensor, topology: Topology, geometry: ConvGeometry, bias: Tensor | None
) -> Tensor:
    """y = x * w + bias: (N, C_in, H, W) -> (N, C_out, P, Q)."""
    return dense_conv2d(x, topology.unpack(values), geometry, bias)


def dense_conv2d(x: Tensor, matrix: Tensor, geometry: ConvGeometry, bias: Tensor | None) -> Tensor:
    """The same with the dense weight (C_out, kh kw C_in / groups), taps first."""
    g, kernel = geometry, to_kernel(matrix, geometry)
    y = functional.conv2d(x, kernel, bias, g.stride, g.padding, g.dilation, g.groups)
    # torch may choose by the weight, which as 1 x 1 is both contiguous and channels-last
    return y.contiguous(memory_format=format_of(x))


def conv2d_dgrad(
    dy: Tensor,
    values: Tensor,
    topology: Topology,
    geometry: ConvGeometry,
    *,
    size: tuple[int, int],
) -> Tensor:
    """dx of `conv2d`: (N, C_out, P, Q) -> (N, C_in, *size)."""
    kernel = to_kernel(topology.unpack(values), geometry)
    x = dy.new_empty(1).expand(len(dy), kernel.shape[1] * geometry.groups, *size)
    dx = _gradients(dy, x, kernel, geometry, (True, False))[0]
    return dx.contiguous(memory_format=format_of(dy))


def conv2d_wgrad(dy: Tensor, x: Tensor, topology: Topology, geometry: ConvGeometry) -> Tensor:
    """dw of `conv2d` at active blocks: (nnzb, bh, bw)."""
    return topology.pack(dense_wgrad(dy, x, geometry))


def dense_wgrad(dy: Tensor, x: Tensor, geometry: ConvGeometry) -> Tensor:
    """dw of `conv2d` everywhere: (C_out, kh kw C_in / groups)."""
    shape = dy.shape[1], x.shape[1] // geometry.groups, *geometry.kernel
    kernel = x.new_empty(1).expand(shape)
    return to_matrix(_gradients(dy, x, kernel, geometry, (False, True))[1])


def conv2d_backward(
    dy: Tensor, x: Tensor, values: Tensor, topology: Topology, geometry: ConvGeometry
) -> tuple[Tensor, Tensor]:
    """(dx, dw) of `conv2d`."""
    kernel = to_kernel(topology.unpack(values), geometry)
    dx, dw = _gradients(dy, x, kernel, geometry, (True, True))
    return dx.contiguous(memory_format=format_of(x)), topology.pack(to_matrix(dw))


def _gradients(
    dy: Tensor, x: Tensor, kernel: Tensor, geometry: ConvGeometry, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Torch's own gradients of a dense convolution, those that are wanted."""
    g = geometry
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy,
        x,
        kernel,
        None,
        list(g.stride),
        list(g.padding),
        list(g.dilation),
        False,
        [0, 0],
        g.groups,
        [*wanted, False],
    )
    return dx, dw
