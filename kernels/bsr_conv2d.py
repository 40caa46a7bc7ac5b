"""Block-sparse convolution `y = conv2d(x, w) (+ bias)` and its input gradient, without im2col.

Shapes: x (N, C_in, H, W), w (C_out, kh * kw * C_in / groups), tap-major, held as values
(nnzb, BH, BW) at the active blocks, y (N, C_out, P, Q). Blocks straddle neither a tap nor a group:
block row g * RB + rb holds output channels of group g, block column tap * CB + cb its input
channels at one tap. Called by `sparsekern.ops` for forward and for the input gradient.

FLOPs: 2 * N * P * Q * nnzb * BH * BW.
Bytes from L2, s = element size: s * N * P * Q * nnzb * IN for x, s * ceil(N * P * Q / BM) * nnzb *
BH * BW for w, s * N * P * Q * C_out out; IN is the block's edge along the sum. Bytes from HBM, at
least: s * (N * H * W * C_in + N * P * Q * C_out + nnzb * BH * BW).

It is the linear product with a shifted x: one program makes one tile of BM output pixels times one
block row, and a block adds one offset to the addresses of the pixels that its tap reads. Where a
tap reaches beyond the image a pixel's lanes are masked: zeros that are never stored anywhere.

The input gradient gathers too, so it needs no atomics: a program makes BM input pixels times one
block of input channels. Its blocks stand in one list for each tap; the lists of up to TAPS_AT_ONCE
taps are walked as one, so that short lists still fill the pipeline. With a stride, input pixels
fall into stride_h * stride_w phases; those of one phase meet the same taps, at consecutive outputs.

Tiles are loaded through pointers. Tensor descriptors would fill in the zeros, but of a patch of the
image (a box of more than one row) triton 3.9 takes the tile through registers on sm_90, with one
buffer less. A box of pixels along one axis alone stays in shared memory; that fits images as wide
as a tile, and is not built.
"""

# triton decorates without types
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment"
# mypy: disable-error-code="var-annotated"

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import arch_class, compute_kind, input_precision, is_interpreted, output_dtype
from .tables import SpmmConfig, find
from .window import (
    Window,
    channels_adjacent,
    empty_images,
    has_adjacent_channels,
    images_at_once,
    output_size,
    wanted_format,
)

__all__ = ["bsr_conv2d", "bsr_conv2d_dgrad"]

# taps whose lists of blocks the input gradient walks as one: two scalars in registers for each
TAPS_AT_ONCE = 9

# a row so far above the image that no tap reaches it
_FAR = tl.constexpr(-(2**30))


@triton.jit
def _tile_of_program(M, R, BM: tl.constexpr, GROUP: tl.constexpr):
    """Rank and first pixel of this program: ranks slow, the pixels of a group fast."""
    pid = tl.program_id(0)
    first = pid // (GROUP * R) * GROUP
    size = min(tl.cdiv(M, BM) - first, GROUP)
    within = pid % (GROUP * R)
    return within // size, (first + within % size) * BM


@triton.jit
def _pixel(m, PQ, Q):
    """Image, row and column of pixels, of images of PQ pixels in rows of Q."""
    n = m // PQ
    at = m - n * PQ
    p = at // Q
    return n, p, at - p * Q


@triton.jit
def _phase(H, W, SH: tl.constexpr, SW: tl.constexpr):
    """First row and column of the input pixels of this program, and how many of each follow."""
    fh = tl.program_id(1) // SW
    fw = tl.program_id(1) % SW
    return fh, fw, (H - fh + SH - 1) // SH, (W - fw + SW - 1) // SW


@triton.jit
def _inside(h, w, H, W):
    return (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
def _both(lanes, live, INTERPRET: tl.constexpr):
    """`lanes & live`, whose second part may be a scalar, which the interpreter makes an integer."""
    if INTERPRET:  # noqa: SIM108  two branches of which one is compiled
        keep = tl.where(live, lanes, False)
    else:
        keep = lanes & live
    return keep


# a new batch or image size must not mean a new compilation
@triton.jit(do_not_specialize=["M", "H", "W", "PQ", "Q", "R", "RB", "CB"])
def _bsr_conv2d_kernel(
    x_ptr,  # (N, H, W, C_in), strides sxn, sxh, sxw, 1
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
    rank, m0 = _tile_of_program(M, R, BM, GROUP)
    row = tl.load(order_ptr + rank)
    g = row // RB
    o = row % RB * OUT + tl.arange(0, OUT)  # output channels, counted within the group
    m = m0 + tl.arange(0, BM)
    n, p, q = _pixel(m, PQ, Q)
    h = tl.where(m < M, p * SH - PH, _FAR)[:, None]  # pixels beyond the last read nothing
    w = (q * SW - PW)[:, None]
    x_pixel = x_ptr + g * Cg + n.to(tl.int64)[:, None] * sxn
    x_pixel += h.to(tl.int64) * sxh + w.to(tl.int64) * sxw
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
        keep = _both(ch < Cg, t < hi, INTERPRET)
        dh = tap // KW * DH
        dw = tap % KW * DW
        if not WIDE:
            dh = dh[None, :]
            dw = dw[None, :]
        x = tl.load(
            x_pixel + (dh.to(tl.int64) * sxh + dw.to(tl.int64) * sxw) + ch[None, :],
            mask=_inside(h + dh, w + dw, H, W) & keep[None, :],
            other=0.0,
        )
        w_in = t.to(tl.int64) * (IN * OUT) + inner
        w_in = tl.max_contiguous(tl.multiple_of(w_in, min(IN, BK)), min(IN, BK))
        weight = tl.load(w_out + w_in[:, None], mask=keep[:, None], other=0.0)
        # loaded an iteration ahead: where it is used it would halve the depth of the pipeline
        t = lo + (k + BK) // IN if WIDE else lo + (k + BK + lane) // IN
        c = tl.load(index_ptr + t, mask=t < hi, other=0)
        if INTERPRET:  # the interpreter multiplies the bit patterns of bf16
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    at = g * Cog + o
    if HAS_BIAS:
        bias = tl.load(bias_ptr + at.to(tl.int64) * sb, mask=o < Cog, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    y = y_ptr + m.to(tl.int64)[:, None] * C_out + at[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (o < Cog)[None, :])


@triton.jit
def _place(i, starts, ends, U: tl.constexpr):
    """Tap (counted from the first of U) and place in the index of the i-th block of their lists."""
    tap = i * 0
    t = i + starts[0]
    for u in tl.static_range(U - 1):
        beyond = i >= ends[u]
        tap += beyond.to(tl.int32)
        t = tl.where(beyond, i + starts[u + 1], t)
    return tap, t


@triton.jit(do_not_specialize=["N", "M", "H", "W", "P", "Q", "R", "RB", "CB"])
def _bsr_conv2d_dgrad_kernel(
    dy_ptr,  # (N, P, Q, C_out), strides syn, syh, syw, 1
    w_ptr,  # (nnzb, IN, OUT), contiguous
    start_ptr,  # (groups * TAPS * CB + 1,) int32: ccol
    index_ptr,  # (nnzb,) int32: row
    perm_ptr,  # (nnzb,) int32: slot in w
    dx_ptr,  # (N, H, W, C_in), contiguous
    N,
    M,  # input pixels of the largest phase, all images
    H,
    W,
    P,
    Q,
    R,  # blocks of input channels, all groups
    RB,  # block rows of a group
    CB,  # blocks of input channels of a group
    Cg,  # input channels of a group
    Cog,  # its output channels
    C_in,
    syn,
    syh,
    syw,
    TAPS: tl.constexpr,
    U: tl.constexpr,
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
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row, m0 = _tile_of_program(M, R, BM, GROUP)
    fh, fw, rows, columns = _phase(H, W, SH, SW)
    g = row // CB
    cb = row - g * CB
    if m0 < N * rows * columns:
        m = m0 + tl.arange(0, BM)
        n, h, w = _pixel(m, rows * columns, columns)
        dy_pixel = dy_ptr + g * Cog + n.to(tl.int64)[:, None] * syn
        dy_pixel += h.to(tl.int64)[:, None] * syh + w.to(tl.int64)[:, None] * syw
        live = m < N * rows * columns
        p = tl.where(live, h, _FAR)[:, None]  # pixels beyond the last read nothing
        q = w[:, None]
        w_out = w_ptr + tl.arange(0, OUT)[None, :]
        lane = tl.arange(0, BK)
        WIDE: tl.constexpr = IN >= BK  # one block to an iteration: its tap is a scalar
        acc = tl.zeros([BM, OUT], dtype=tl.float32)
        for first in range(0, TAPS, U):
            starts = ()
            ends = ()
            total = 0 * row
            for u in tl.static_range(U):
                tap = first + u
                # of a tap that this phase never meets no block counts
                met = (fh + PH - tap // KW * DH) % SH == 0
                met = met & ((fw + PW - tap % KW * DW) % SW == 0) & (tap < TAPS)
                key = (g * TAPS + tap) * CB + cb
                lo = tl.load(start_ptr + key, mask=met, other=0)
                hi = tl.load(start_ptr + key + 1, mask=met, other=0)
                starts = starts + (lo - total,)  # noqa: RUF005
                total += hi - lo
                ends = ends + (total,)  # noqa: RUF005
            i = 0 * row if WIDE else lane // IN
            tap, t = _place(i, starts, ends, U)
            r = tl.load(index_ptr + t, mask=i < total, other=0)
            s = tl.load(perm_ptr + t, mask=i < total, other=0)
            for k in range(0, total * IN, BK):
                inner = (k + lane) % IN
                ch = (r - g * RB) * IN + inner
                ch = tl.max_contiguous(tl.multiple_of(ch, min(IN, BK)), min(IN, BK))
                keep = _both(ch < Cog, i < total, INTERPRET)
                # exact: other taps were left out
                dp = (fh + PH - (first + tap) // KW * DH) // SH
                dq = (fw + PW - (first + tap) % KW * DW) // SW
                if not WIDE:
                    dp = dp[None, :]
                    dq = dq[None, :]
                dy = tl.load(
                    dy_pixel + (dp.to(tl.int64) * syh + dq.to(tl.int64) * syw) + ch[None, :],
                    mask=_inside(p + dp, q + dq, P, Q) & keep[None, :],
                    other=0.0,
                )
                w_in = s.to(tl.int64) * (IN * OUT) + inner * OUT
                weight = tl.load(w_out + w_in[:, None], mask=keep[:, None], other=0.0)
                # loaded an iteration ahead: where it is used it would halve the pipeline
                i = (k + BK) // IN if WIDE else (k + BK + lane) // IN
                tap, t = _place(i, starts, ends, U)
                r = tl.load(index_ptr + t, mask=i < total, other=0)
                s = tl.load(perm_ptr + t, mask=i < total, other=0)
                if INTERPRET:  # the interpreter multiplies the bit patterns of bf16
                    dy = dy.to(tl.float32)
                    weight = weight.to(tl.float32)
                acc = tl.dot(dy, weight, acc, input_precision=PRECISION)
        c = cb * OUT + tl.arange(0, OUT)
        at = (n * H + h * SH + fh) * W + w * SW + fw
        dx = dx_ptr + at.to(tl.int64)[:, None] * C_in + (g * Cg + c)[None, :]
        tl.store(dx, acc.to(dx_ptr.dtype.element_ty), mask=live[:, None] & (c < Cg)[None, :])


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
            pixel are side by side, else copied into that layout, some images at a time.
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
        return y.to(x.dtype)
    values = values.contiguous()
    bh, bw = values.shape[1:]
    groups = window.groups
    tile, options = _options("conv2d", x, (bw, bh), window)
    R, RB, CB = order.numel(), triton.cdiv(n_out // groups, bh), triton.cdiv(n_in // groups, bw)

    def launch(x: torch.Tensor, y: torch.Tensor) -> None:
        M = len(x) * P * Q
        _bsr_conv2d_kernel[(triton.cdiv(M, tile.BM) * R,)](
            x,
            values,
            crow,
            col,
            order,
            x if bias is None else bias,
            y,
            M,
            H,
            W,
            P * Q,
            Q,
            R,
            RB,
            CB,
            n_in // groups,
            n_out // groups,
            n_out,
            *_pixel_strides(x),
            0 if bias is None else bias.stride(0),
            HAS_BIAS=bias is not None,
            **options,
        )

    _by_images(x, y, launch)
    return y.to(x.dtype)


def bsr_conv2d_dgrad(
    dy: torch.Tensor,
    values: torch.Tensor,
    ccol: torch.Tensor,
    row: torch.Tensor,
    perm: torch.Tensor,
    n_in: int,
    size: tuple[int, int],
    window: Window,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    """Gradient of `conv2d` with respect to its input, the values read in place through `perm`.

    Args:
        dy: (N, C_out, P, Q), any strides; fp32, fp16 or bf16. Read like `x` of `bsr_conv2d`.
        values: (nnzb, BH, BW), dy's dtype, in CSR order.
        ccol: (groups * taps * CB + 1,) int32: where the blocks of input channels cb of group g at
            a tap start, under the key (g * taps + tap) * CB + cb.
        row: (nnzb,) int32 block rows, in the order of the keys.
        perm: (nnzb,) int32 slots in values, in the order of the keys.
        n_in: C_in.
        size: (H, W) of the input.
        window: geometry; N * H * W is less than 2**31.
        memory_format: of the result; by default channels-last if dy is, else contiguous.

    Returns:
        (N, C_in, H, W), dy's dtype.
    """
    batch, n_out, P, Q = dy.shape
    H, W = size
    dtype = output_dtype(dy.dtype, _bsr_conv2d_dgrad_kernel)
    dx = empty_images(dy, (batch, n_in, H, W), dtype, memory_format or wanted_format(dy))
    if dx.numel() == 0:
        return dx.to(dy.dtype)
    values = values.contiguous()
    bh, bw = values.shape[1:]
    groups, (SH, SW), taps = window.groups, window.stride, window.kernel[0] * window.kernel[1]
    tile, options = _options("conv2d_dgrad", dy, (bh, bw), window)
    RB, CB = triton.cdiv(n_out // groups, bh), triton.cdiv(n_in // groups, bw)

    def launch(dy: torch.Tensor, dx: torch.Tensor) -> None:
        M = len(dy) * triton.cdiv(H, SH) * triton.cdiv(W, SW)
        _bsr_conv2d_dgrad_kernel[triton.cdiv(M, tile.BM) * groups * CB, SH * SW](
            dy,
            values,
            ccol,
            row,
            perm,
            dx,
            len(dy),
            M,
            H,
            W,
            P,
            Q,
            groups * CB,
            RB,
            CB,
            n_in // groups,
            n_out // groups,
            n_in,
            *_pixel_strides(dy),
            TAPS=taps,
            U=min(taps, TAPS_AT_ONCE),
            **options,
        )

    _by_images(dy, dx, launch)
    return dx.to(dy.dtype)


def window_options(window: Window) -> dict[str, int]:
    """The constants that a geometry sets in a kernel, one compilation for each geometry."""
    (SH, SW), (PH, PW), (DH, DW) = window.stride, window.padding, window.dilation
    shifts = {"SH": SH, "SW": SW, "PH": PH, "PW": PW, "DH": DH, "DW": DW}
    return {"KW": window.kernel[1]} | shifts


def _options(
    op: str, a: torch.Tensor, edges: tuple[int, int], window: Window
) -> tuple[SpmmConfig, dict[str, Any]]:
    """Launch entry of a product whose blocks have these edges along the sum and the output."""
    kind = compute_kind(a.dtype)
    tile, _ = find(arch_class(a.device), op, kind, edges[1], "any", tma=False)
    options = {
        "IN": edges[0],
        "OUT": edges[1],
        "BM": tile.BM,
        "BK": tile.BK,
        "GROUP": tile.GROUP,
        "PRECISION": input_precision(a.dtype),
        "INTERPRET": is_interpreted(_bsr_conv2d_kernel),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }
    return tile, options | window_options(window)


def _pixel_strides(a: torch.Tensor) -> tuple[int, int, int]:
    """Strides of image, row and column."""
    return a.stride(0), a.stride(2), a.stride(3)


def _by_images(
    a: torch.Tensor, out: torch.Tensor, launch: Callable[[torch.Tensor, torch.Tensor], None]
) -> None:
    """`launch(a, out)`, both channels-last in memory: copied there and back where they are not."""
    direct = out.is_contiguous(memory_format=torch.channels_last)
    copied = 0 if has_adjacent_channels(a) else a[0].numel()
    copied += 0 if direct else out[0].numel()
    step = images_at_once(len(a), copied=copied)
    for n in range(0, len(a), step):
        some, there = a[n : n + step], out[n : n + step]
        made = there if direct else torch.empty_like(there, memory_format=torch.channels_last)
        with torch.cuda.device_of(a):
            launch(channels_adjacent(some), made)
        if not direct:
            there.copy_(made)
