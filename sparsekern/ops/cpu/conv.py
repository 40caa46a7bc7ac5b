"""Sparse convolution on the CPU: which implementation runs, and the arithmetic type it runs in.

The rule is that of `choice`: with numba `jit.conv`, else `unfold`, which unfolds a
bounded number of pixels at a time and takes the linear products of `blas` or `csr`. With
numba too, a kernel so dilated that its outermost taps lie megabytes apart is unfolded, for
`jit.linear`: what `jit.conv` holds grows with that distance. A pointwise convolution of a
channels-last image is a linear map of its pixels and goes to `linear` as such. float16 and
bfloat16 are computed in float32 and rounded once.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekern.ops.cpu import linear
from sparsekern.ops.cpu.choice import backend_for, compute_dtype
from sparsekern.ops.geometry import ConvGeometry
from sparsekern.ops.layout import format_of, image_of, pixels_of

if TYPE_CHECKING:
    from sparsekern.topology import Topology

SPAN_BYTES = 1 << 21
"""From a kernel's first tap to its last, all channels: a chunk holds up to three times that."""


def conv2d(x: Tensor, values: Tensor, t: Topology, g: ConvGeometry, bias: Tensor | None) -> Tensor:
    """y = x * w + bias.

    Args:
        x: (N, C_in, H, W), any strides.
        values: (nnzb, bh, bw) in CSR order of `t`.
        t: the topology of w, (C_out, kh kw C_in / groups).
        g: the geometry.
        bias: (C_out,) or None.

    Returns:
        (N, C_out, P, Q) of x's dtype, channels-last if x is.
    """
    if _is_linear(g, x):
        return _image(linear.spmm(pixels_of(x), values, t, bias), x)
    run, kind = plan(t, g, x)
    added = None if bias is None else bias.to(kind)
    return _like(x, run.conv2d(x.to(kind), values.to(kind), t, g, added))


def conv2d_dgrad(
    dy: Tensor, values: Tensor, t: Topology, g: ConvGeometry, *, size: tuple[int, int]
) -> Tensor:
    """dx: (N, C_out, P, Q) of any strides -> (N, C_in, *size) of dy's dtype."""
    if _is_linear(g, dy):
        return _image(linear.spmm_t(pixels_of(dy), values, t), dy)
    run, kind = plan(t, g, dy)
    return _like(dy, run.conv2d_dgrad(dy.to(kind), values.to(kind), t, g, size=size))


def conv2d_wgrad(dy: Tensor, x: Tensor, t: Topology, g: ConvGeometry) -> Tensor:
    """dw at active blocks: (nnzb, bh, bw) of x's dtype, exact 0 in padding."""
    if _is_linear(g, x, dy):
        return linear.sddmm(pixels_of(dy), pixels_of(x), t)
    run, kind = plan(t, g, x)
    dw: Tensor = run.conv2d_wgrad(dy.to(kind), x.to(kind), t, g)
    return dw.to(x.dtype)


def conv2d_backward(
    dy: Tensor, x: Tensor, values: Tensor, t: Topology, g: ConvGeometry
) -> tuple[Tensor, Tensor]:
    """(dx, dw) of `conv2d`, sharing what the two products have in common; dx is laid out as x."""
    if _is_linear(g, x, dy):
        dx, dw = linear.backward(pixels_of(dy), pixels_of(x), values, t)
        return _image(dx, x), dw
    run, kind = plan(t, g, x)
    dx, dw = run.conv2d_backward(dy.to(kind), x.to(kind), values.to(kind), t, g)
    return _like(x, dx), dw.to(values.dtype)


def _is_linear(g: ConvGeometry, image: Tensor, *others: Tensor) -> bool:
    """Whether a product is one of pixels: pointwise, channels-last, and no copy is due."""
    if not g.pointwise or format_of(image) is not torch.channels_last:
        return False
    return all(
        a.stride(2) == a.shape[3] * a.stride(3) and a.stride(0) == a.shape[2] * a.stride(2)
        for a in others
    )


def _image(pixels: Tensor, like: Tensor) -> Tensor:
    return image_of(pixels, like.shape[0], like.shape[2], like.shape[3])


def _like(x: Tensor, result: Tensor) -> Tensor:
    return result.to(x.dtype).contiguous(memory_format=format_of(x))


def plan(t: Topology, g: ConvGeometry, image: Tensor) -> tuple[Any, torch.dtype]:
    """What runs a convolution that reads or makes this image, and the type it computes in."""
    name, kind = backend_for(t, image.dtype), compute_dtype(image.dtype)
    channels = max(t.shape[0], t.shape[1] // t.taps * t.groups)
    lines = (g.kernel[0] - 1) * g.dilation[0] // g.stride[0]
    span = lines * (image.shape[3] + g.padding[1]) + (g.kernel[1] - 1) * g.dilation[1]
    return _module(name, name == "jit" and channels * span * kind.itemsize <= SPAN_BYTES), kind


@functools.cache
def _module(name: str, in_place: bool) -> Any:
    if in_place:
        return importlib.import_module("sparsekern.ops.cpu.jit.conv")
    torch_only = importlib.import_module("sparsekern.ops.cpu.unfold")
    return torch_only.Products(linear.module_of(name))
