"""Sparse convolution with numba: compiled loops over the active blocks, split over torch's threads.

The line of pixels (`conv_line`) is cut into chunks that fit into L2; a task is a run of chunks.
The weight gradient is summed in a number of parts that depends on shapes alone, and the parts are
added in order, so the number of threads changes no bit. Workspace: per thread, a chunk of x and of
dy (about `BYTES`, at most three times `cpu.conv.SPAN_BYTES`) and one block row of it; the parts of
dw, together at most a quarter of the activations; a few int32 per active block. FLOPs:
2 N P Q bh bw per active block and product.

An infinite or NaN pixel may reach the weight gradient of more taps than read it: it meets the zeros
around dy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsekern.ops.cpu.jit.conv_job import Job
from sparsekern.ops.geometry import ConvGeometry
from sparsekern.ops.layout import format_of

if TYPE_CHECKING:
    from sparsekern.topology import Topology


def conv2d(x: Tensor, values: Tensor, t: Topology, g: ConvGeometry, bias: Tensor | None) -> Tensor:
    """y = x * w + bias: (N, C_in, H, W) -> (N, C_out, P, Q)."""
    shape = (x.shape[0], t.shape[0], *g.output_size(x.shape[2], x.shape[3]))
    y = _empty(x, shape, format_of(x))
    if y.numel():
        bias = None if bias is None else bias.contiguous()
        Job(t, g, *_flat(g, x, y)).forward(values.contiguous(), bias)
    return y


def conv2d_dgrad(
    dy: Tensor, values: Tensor, t: Topology, g: ConvGeometry, *, size: tuple[int, int]
) -> Tensor:
    """dx: (N, C_out, P, Q) -> (N, C_in, *size)."""
    shape = (dy.shape[0], t.shape[1] // t.taps * t.groups, *size)
    dx = _empty(dy, shape, format_of(dy))
    if dx.numel():
        dxs, dys = _flat(g, dx, dy)
        Job(t, g, dxs, dys).backward(None, values.contiguous(), dxs)
    return dx


def conv2d_wgrad(dy: Tensor, x: Tensor, t: Topology, g: ConvGeometry) -> Tensor:
    """dw at active blocks: (nnzb, bh, bw), zero in the padding."""
    if not dy.numel():
        return dy.new_zeros(t.values_shape)
    xs, dys = _flat(g, x, dy)
    return Job(t, g, xs, dys).backward(xs, None, None)


def conv2d_backward(
    dy: Tensor, x: Tensor, values: Tensor, t: Topology, g: ConvGeometry
) -> tuple[Tensor, Tensor]:
    """(dx, dw); dy is copied into scratch once for both."""
    dx = _empty(x, x.shape, format_of(x))
    if not dy.numel():
        return dx, dy.new_zeros(t.values_shape)
    xs, dys, dxs = _flat(g, x, dy, dx)
    return dx, Job(t, g, xs, dys).backward(xs, values.contiguous(), dxs)


def _empty(x: Tensor, shape: Sequence[int], layout: torch.memory_format) -> Tensor:
    return torch.empty(tuple(shape), dtype=x.dtype, device=x.device, memory_format=layout)


def _flat(g: ConvGeometry, *images: Tensor) -> list[Tensor]:
    """Images as single rows of H W pixels, where a kernel of one tap allows it and no copy is due.

    The line then has no gaps and is copied in long runs.
    """
    plain = (g.taps, g.stride, g.padding) == (1, (1, 1), (0, 0))
    if not plain or any(i.stride(2) != i.stride(3) * i.shape[3] for i in images):
        return list(images)
    return [i.flatten(2).unsqueeze(2) for i in images]
