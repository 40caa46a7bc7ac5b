"""Block-sparse convolution `y = conv2d(x, w) (+ bias)`, without im2col.

Shapes: x (N, C_in, H, W), w (C_out, kh * kw * C_in / groups), tap-major, held as values
(nnzb, BH, BW) at the active blocks, y (N, C_out, P, Q). Blocks straddle neither a tap nor a group:
block row g * RB + rb holds output channels of group g, block column tap * CB + cb its input
channels at one tap. Called by `sparsekern.ops` for forward; the input gradient is in
`bsr_conv2d_dgrad`.

FLOPs: 2 * N * P * Q * nnzb * BH * BW.
Bytes from L2, s = element size: s * N * P * Q * nnzb * IN for x, s * ceil(N * P * Q / BM) * nnzb *
BH * BW for w, s * N * P * Q * C_out out; IN is the block's edge along the sum. Bytes from HBM, at
least: s * (N * H * W * C_in + N * P * Q * C_out + nnzb * BH * BW).

It is the linear product with a shifted x: one program makes one tile of BM output pixels times one
block row, and a block adds one offset to the addresses of the pixels that its tap reads. Where a
tap reaches beyond the image a pixel's lanes are masked: zeros that are never stored anywhere.

Tiles are loaded through pointers. Tensor descriptors would fill in the zeros, but of a patch of the
image (a box of more than one row) triton 3.9 takes the tile through registers on sm_90, with one
buffer less. A box of pixels along one axis alone stays in shared memory; that fits images as wide
as a tile, and is not built.
"""

# triton decorates without types
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment"
# mypy: disable-error-code="var-annotated"

from typing import Any

import torch
import triton
import triton.language as tl

from . import plans
from .launch import (
    in_dtype,
    input_precision,
    is_interpreted,
    load_unit,
    output_dtype,
    unit_of,
)
from .pixels import FAR, both, inside, pixel, tile_of_program
from .window import (
    Window,
    block_options,
    by_images,
    channels_layout,
    empty_images,
    output_size,
    pixel_strides,
    wanted_format,
)

__all__ = ["bsr_conv2d"]


# a new batch or image size must not mean a new compilation
@triton.jit(
    do_not_specialize=[
        "M", "H", "W", "PQ", "Q", "R", "RB", "CB", "Cg", "Cog", "C_out", "sxn", "sxh", "sxw"
    ]
)  # fmt: skip
def _bsr_conv2d_kernel(
    x_ptr,  # (N, H, W, groups, Cg rounded up to UNIT), strides UNIT * (sxn, sxh, sxw), then dense
    w_ptr,  # (nnzb, OUT, IN), contiguous
    start_ptr,  # (R + 1,) int32: crow
    index_ptr,  # (nnzb,) int32: col
    order_ptr,  # (R,) int32: block rows, longest first
    bias_ptr,  # (C_out,), stride sb; read only if HAS_BIAS
    y_ptr,  # (M, C_out), contiguous
    M,  # output pixels of all images
    H,
    W,
    PQ,
    Q,
    R,  # block rows
    RB,  # of which a group has
    CB,  # block columns of a tap
    Cg,  # input channels of a group
    Cog,  # its output channels
    C_out,
    sxn,
    sxh,
    sxw,
    sb,
    UNIT: tl.constexpr,
    C_UNIT: tl.constexpr,  # divides Cg: UNIT or 1
    O_UNIT: tl.constexpr,  # divides Cog
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    rank, m0 = tile_of_program(M, R, BM, GROUP)
    row = tl.load(order_ptr + rank)
    g = row // RB
    o = row % RB * OUT + tl.arange(0, OUT)  # output channels, counted within the group
    m = m0 + tl.arange(0, BM)
    n, p, q = pixel(m, PQ, Q)
    h = tl.where(m < M, p * SH - PH, FAR)[:, None]  # pixels beyond the last read nothing
    w = (q * SW - PW)[:, None]
    width = tl.cdiv(Cg, UNIT) * UNIT
    x_pixel = x_ptr + g * width + n.to(tl.int64)[:, None] * sxn * UNIT
    x_pixel += (h.to(tl.int64) * sxh + w.to(tl.int64) * sxw) * UNIT
    w_out = w_ptr + tl.arange(0, OUT)[None, :] * IN
    lane = tl.arange(0, BK)
    lo = tl.load(start_ptr + row)
    hi = tl.load(start_ptr + row + 1)
    WIDE: tl.constexpr = IN >= BK  # all lanes of an iteration are of one block: its tap is a scalar
    t = lo if WIDE else lo + lane // IN  # place of each lane's block in this row's list
    c = tl.load(index_ptr + t, mask=t < hi, other=0)
    acc = tl.zeros([BM, OUT], dtype=tl.float32)
    for k in range(0, (hi - lo) * IN, BK):
        inner = (k + lane) % IN
        tap = c // CB
        ch = (c - tap * CB) * IN + inner
        ch = tl.max_contiguous(tl.multiple_of(ch, min(IN, BK)), min(IN, BK))
        keep = both(ch < width, t < hi, INTERPRET)
        dh = tap // KW * DH
        dw = tap % KW * DW
        if not WIDE:
            dh = dh[None, :]
            dw = dw[None, :]
        x = tl.load(
            x_pixel + (dh.to(tl.int64) * sxh + dw.to(tl.int64) * sxw) * UNIT + ch[None, :],
            mask=inside(h + dh, w + dw, H, W) & keep[None, :],
            other=0.0,
        )
        w_in = t.to(tl.int64) * (IN * OUT) + inner
        w_in = tl.max_contiguous(tl.multiple_of(w_in, min(IN, BK)), min(IN, BK))
        weight = tl.load(w_out + w_in[:, None], mask=keep[:, None], other=0.0)
        if C_UNIT == 1:  # a mask that no unit divides would be one of single elements
            weight = tl.where((ch < Cg)[:, None], weight, 0.0)
        # loaded an iteration ahead: where it is used it would halve the depth of the pipeline
        t = lo + (k + BK) // IN if WIDE else lo + (k + BK + lane) // IN
        c = tl.load(index_ptr + t, mask=t < hi, other=0)
        if INTERPRET:  # the interpreter multiplies the bit patterns of bf16
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    Cog = tl.cdiv(Cog, O_UNIT) * O_UNIT
    C_out = tl.cdiv(C_out, O_UNIT) * O_UNIT
    at = g * Cog + o
    if HAS_BIAS:
        bias = tl.load(bias_ptr + at.to(tl.int64) * sb, mask=o < Cog, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    y = y_ptr + m.to(tl.int64)[:, None] * C_out + at[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (o < Cog)[None, :])


def bsr_conv2d(
    x: torch.Tensor,
    values: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    order: torch.Tensor,
    bias: torch.Tensor | None,
    n_out: int,
    window: Window,
) -> torch.Tensor:
    """`y = conv2d(x, w) (+ bias)`.

    Args:
        x: (N, C_in, H, W), any strides; fp32, fp16 or bf16. Read as it lies if the channels of a
            pixel's groups are side by side in whole 16-byte loads, else copied into such, some
            images at a time.
        values: (nnzb, BH, BW), x's dtype, in CSR order.
        crow: (block rows + 1,) int32.
        col: (nnzb,) int32 block columns.
        order: (block rows,) int32, the order in which block rows are started.
        bias: (n_out,) or None.
        n_out: C_out.
        window: geometry; N * P * Q is less than 2**31.

    Returns:
        (N, C_out, P, Q), x's dtype, channels-last if x is, else contiguous.
    """
    batch, n_in, H, W = x.shape
    P, Q = output_size(window, (H, W))
    dtype = output_dtype(x.dtype, _bsr_conv2d_kernel)
    y = empty_images(x, (batch, n_out, P, Q), dtype, wanted_format(x))
    if y.numel() == 0:
        return in_dtype(y, x.dtype)
    values = values.contiguous()
    bh, bw = values.shape[1:]
    plan = plans.find(_bsr_conv2d_kernel, x, _key(x, values, bias, n_out, window))
    cut = plan.decide(
        block_options, "conv2d", x, (bw, bh), window, is_interpreted(_bsr_conv2d_kernel)
    )
    groups, R, sb = window.groups, order.numel(), 0 if bias is None else bias.stride(0)
    sizes = {"H": H, "W": W, "PQ": P * Q, "Q": Q, "R": R, "C_out": n_out, "sb": sb}
    sizes |= {"RB": triton.cdiv(n_out // groups, bh), "CB": triton.cdiv(n_in // groups, bw)}
    Cg, Cog, unit = n_in // groups, n_out // groups, load_unit(x.dtype)
    sizes |= {"Cg": Cg, "Cog": Cog, "HAS_BIAS": bias is not None}
    sizes |= {"UNIT": unit, "C_UNIT": unit_of(Cg, x.dtype), "O_UNIT": unit_of(Cog, x.dtype)}

    def launch(x: torch.Tensor, y: torch.Tensor) -> None:
        M = len(y) * P * Q
        tensors = x, values, crow, col, order, x if bias is None else bias, y
        ordinary_kernel = plan.start(_bsr_conv2d_kernel, tensors, len(y))
        if ordinary_kernel is not None:
            steps = (step // unit for step in pixel_strides(x, (H, W)))
            strides = dict(zip(("sxn", "sxh", "sxw"), steps, strict=True))
            ordinary_kernel[(triton.cdiv(M, cut["BM"]) * R,)](
                *tensors, M=M, **strides, **sizes, **cut
            )

    by_images(x, y, channels_layout(groups), launch)
    return in_dtype(y, x.dtype)


def _key(
    x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, n_out: int, window: Window
) -> tuple[Any, ...]:
    """All that a product's launches depend on, the images of each apart."""
    added = None if bias is None else (bias.stride(0), bias.dtype)
    held = values.shape, values.dtype
    return (
        "bsr_conv2d", x.shape, x.stride(), x.dtype, *held, added, n_out, window,
        input_precision(x.dtype), x.data_ptr() % 16 == 0,
    )  # fmt: skip
