"""Unstructured sparse convolution `y = conv2d(x, w) (+ bias)` and its input gradient.

Shapes: x (N, C_in, H, W), w (C_out, kh * kw * C_in / groups), tap-major, held as values (nnz, 1, 1)
at the active entries, y (N, C_out, P, Q). Called by `sparsekern.ops` for forward and for the input
gradient of block (1, 1).

FLOPs: 2 * N * P * Q * nnz.
Bytes from L1 or L2, s = element size: s * N * P * Q * nnz for x, ceil(N * P * Q / BM) * nnz *
(s + 4) for values and indices (+ 4 through perm), s * N * P * Q * C_out out. Bytes from HBM, at
least: s * (N * H * W * C_in + N * P * Q * C_out + nnz); channels-last activations are copied and
turned back some images at a time, 2 * s * N * (H * W * C_in + P * Q * C_out) more.

Neighbouring lanes hold neighbouring pixels, so here, unlike for blocks, plain contiguous images are
the layout that needs no copy: a channel shifted by a tap is nearly one run of memory. One program
makes BM pixels times BN channels, each summed in order by itself, without atomics; forward, the
channels of a program are neighbours in length, as a program runs as long as its longest row.
"""

# triton decorates without types
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from typing import Any

import torch
import triton
import triton.language as tl

from . import plans
from .launch import in_dtype, input_precision, output_dtype
from .pixels import FAR, inside, phase, pixel
from .window import (
    COLUMNS,
    Window,
    by_images,
    empty_images,
    entry_options,
    output_size,
    wanted_format,
)

__all__ = ["csr_conv2d", "csr_conv2d_dgrad"]


# a new batch or image size must not mean a new compilation
@triton.jit(do_not_specialize=["M", "H", "W", "PQ", "Q", "Cg", "Cog", "C_out"])
def _csr_conv2d_kernel(
    x_ptr,  # (N, C_in, H, W), strides sxn, sxc, sxh, sxw
    v_ptr,  # (nnz,)
    start_ptr,  # (C_out + 1,) int32: crow
    index_ptr,  # (nnz,) int32: col
    order_ptr,  # (C_out,) int32: rows, longest first
    bias_ptr,  # (C_out,), stride sb; read only if HAS_BIAS
    y_ptr,  # (N, C_out, PQ), contiguous
    M,  # output pixels of all images
    H,
    W,
    PQ,
    Q,
    Cg,  # input channels of a group
    Cog,  # its output channels
    C_out,
    sxn,
    sxc,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    # rows change fastest: the programs in flight share few pixels, whose channels stay in L2
    pid = tl.program_id(0)
    tiles = tl.cdiv(C_out, BN)
    rank = (pid % tiles) * BN + tl.arange(0, BN)
    in_o = rank < C_out
    o = tl.load(order_ptr + rank, mask=in_o, other=0)
    m = (pid // tiles) * BM + tl.arange(0, BM)
    n, p, q = pixel(m, PQ, Q)
    h = tl.where(m < M, p * SH - PH, FAR)[None, :]  # pixels beyond the last read nothing
    w = (q * SW - PW)[None, :]
    lo = tl.load(start_ptr + o, mask=in_o, other=0)
    hi = tl.load(start_ptr + o + 1, mask=in_o, other=0)
    x_pixel = x_ptr + n.to(tl.int64)[None, :] * sxn + h.to(tl.int64) * sxh + w * sxw
    c0 = o // Cog * Cg  # first input channel of each row's group
    acc = tl.zeros([BN, BM], dtype=tl.float32)
    for i in range(0, tl.max(hi - lo), UNROLL):
        for u in tl.static_range(UNROLL):
            t = lo + i + u  # [BN]
            live = t < hi
            c = tl.load(index_ptr + t, mask=live, other=0)
            tap = c // Cg
            ch = (c0 + c - tap * Cg).to(tl.int64)
            dh = tap // KW * DH
            dw = tap % KW * DW
            shift = ch * sxc + dh.to(tl.int64) * sxh + dw * sxw
            v = tl.load(v_ptr + t, mask=live, other=0.0).to(tl.float32)
            x = tl.load(
                x_pixel + shift[:, None],
                mask=inside(h + dh[:, None], w + dw[:, None], H, W) & live[:, None],
                other=0.0,
            ).to(tl.float32)
            acc += v[:, None] * x
    if HAS_BIAS:
        b = tl.load(bias_ptr + o.to(tl.int64) * sb, mask=in_o, other=0.0)
        acc += b.to(tl.float32)[:, None]
    at = n.to(tl.int64) * PQ * C_out + (p * Q + q)
    y = y_ptr + o.to(tl.int64)[:, None] * PQ + at[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=in_o[:, None] & (m < M)[None, :])


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "Cg", "Cog", "C_in"])
def _csr_conv2d_dgrad_kernel(
    dy_ptr,  # (N, C_out, P, Q), strides syn, syc, syh, syw
    v_ptr,  # (nnz,)
    start_ptr,  # (groups * TAPS * Cg + 1,) int32: ccol
    index_ptr,  # (nnz,) int32: row
    perm_ptr,  # (nnz,) int32: slot in v
    dx_ptr,  # (N, C_in, H, W), contiguous
    N,
    H,
    W,
    P,
    Q,
    Cg,  # input channels of a group
    C_in,
    syn,
    syc,
    syh,
    syw,
    TAPS: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UNROLL: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles = tl.cdiv(C_in, BN)
    c = (pid % tiles) * BN + tl.arange(0, BN)
    in_c = c < C_in
    g = c // Cg
    fh, fw, rows, columns = phase(H, W, SH, SW)
    m0 = (pid // tiles) * BM
    if m0 < N * rows * columns:
        m = m0 + tl.arange(0, BM)
        live_m = m < N * rows * columns
        n, h, w = pixel(m, rows * columns, columns)
        p = tl.where(live_m, h, FAR)  # pixels beyond the last read nothing
        dy_pixel = dy_ptr + n.to(tl.int64) * syn
        acc = tl.zeros([BN, BM], dtype=tl.float32)
        for tap in range(TAPS):
            up = fh + PH - tap // KW * DH
            left = fw + PW - tap % KW * DW
            # a tap that this phase never meets has no entries
            met = c < tl.where((up % SH == 0) & (left % SW == 0), C_in, 0)
            key = (g * TAPS + tap) * Cg + (c - g * Cg)
            lo = tl.load(start_ptr + key, mask=met, other=0)
            hi = tl.load(start_ptr + key + 1, mask=met, other=0)
            ph = p + up // SH
            pw = w + left // SW
            seen = inside(ph, pw, P, Q)[None, :]
            dy_tap = (dy_pixel + ph.to(tl.int64) * syh + pw * syw)[None, :]
            for i in range(0, tl.max(hi - lo), UNROLL):
                for u in tl.static_range(UNROLL):
                    t = lo + i + u  # [BN]
                    live = t < hi
                    o = tl.load(index_ptr + t, mask=live, other=0).to(tl.int64)
                    s = tl.load(perm_ptr + t, mask=live, other=0)
                    v = tl.load(v_ptr + s, mask=live, other=0.0).to(tl.float32)
                    dy = tl.load(
                        dy_tap + o[:, None] * syc, mask=live[:, None] & seen, other=0.0
                    ).to(tl.float32)
                    acc += v[:, None] * dy
        at = n.to(tl.int64) * C_in * H * W + (h * SH + fh) * W + (w * SW + fw)
        dx = dx_ptr + c.to(tl.int64)[:, None] * (H * W) + at[None, :]
        tl.store(dx, acc.to(dx_ptr.dtype.element_ty), mask=in_c[:, None] & live_m[None, :])


def csr_conv2d(
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
        x: (N, C_in, H, W), any strides; fp32, fp16 or bf16. Read as it lies if the pixels of an
            image's row are side by side, else copied into that layout, some images at a time.
        values: (nnz, 1, 1), x's dtype, in CSR order.
        crow: (n_out + 1,) int32.
        col: (nnz,) int32: tap * (C_in / groups) + channel.
        order: (n_out,) int32, the order in which rows are taken.
        bias: (n_out,) or None.
        n_out: C_out.
        window: geometry; N * P * Q and H * W are less than 2**31.

    Returns:
        (N, C_out, P, Q), x's dtype, channels-last if x is, else contiguous.
    """
    batch, n_in, H, W = x.shape
    P, Q = output_size(window, (H, W))
    dtype = output_dtype(x.dtype, _csr_conv2d_kernel)
    y = empty_images(x, (batch, n_out, P, Q), dtype, wanted_format(x))
    if y.numel() == 0:
        return in_dtype(y, x.dtype)
    values = values.contiguous()
    plan = plans.find(_csr_conv2d_kernel, x, _key("csr_conv2d", x, values, bias, n_out, window))
    cut = plan.decide(entry_options, "csr_conv2d", x, window)
    tiles = triton.cdiv(n_out, cut["BN"])
    sizes = {"H": H, "W": W, "PQ": P * Q, "Q": Q, "C_out": n_out}
    sizes |= {"Cg": n_in // window.groups, "Cog": n_out // window.groups}
    sizes |= {"sb": 0 if bias is None else bias.stride(0), "HAS_BIAS": bias is not None}

    def launch(x: torch.Tensor, y: torch.Tensor) -> None:
        M, strides = (
            len(x) * P * Q,
            dict(zip(("sxn", "sxc", "sxh", "sxw"), x.stride(), strict=True)),
        )
        tensors = x, values, crow, col, order, x if bias is None else bias, y
        ordinary_kernel = plan.start(_csr_conv2d_kernel, tensors, len(x))
        if ordinary_kernel is not None:
            ordinary_kernel[(triton.cdiv(M, cut["BM"]) * tiles,)](
                *tensors, M=M, **strides, **sizes, **cut
            )

    by_images(x, y, COLUMNS, launch)
    return in_dtype(y, x.dtype)


def _key(
    op: str,
    a: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    n_out: int,
    window: Window,
) -> tuple[Any, ...]:
    """All that a product's launches depend on, the images of each apart."""
    added = None if bias is None else (bias.stride(0), bias.dtype)
    held = values.shape, values.dtype, added, n_out, window
    return op, a.shape, a.stride(), a.dtype, *held, input_precision(a.dtype)


def csr_conv2d_dgrad(
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
        dy: (N, C_out, P, Q), any strides; fp32, fp16 or bf16. Read like `x` of `csr_conv2d`.
        values: (nnz, 1, 1), dy's dtype, in CSR order.
        ccol: (groups * taps * C_in / groups + 1,) int32: where the entries of input channel c of
            group g at a tap start, under the key (g * taps + tap) * (C_in / groups) + c.
        row: (nnz,) int32 output channels, in the order of the keys.
        perm: (nnz,) int32 slots in values, in the order of the keys.
        n_in: C_in.
        size: (H, W) of the input.
        window: geometry; N * H * W is less than 2**31.
        memory_format: of the result; by default channels-last if dy is, else contiguous.

    Returns:
        (N, C_in, H, W), dy's dtype.
    """
    batch, _, P, Q = dy.shape
    (H, W), (SH, SW) = size, window.stride
    dtype = output_dtype(dy.dtype, _csr_conv2d_dgrad_kernel)
    dx = empty_images(dy, (batch, n_in, H, W), dtype, memory_format or wanted_format(dy))
    if dx.numel() == 0:
        return in_dtype(dx, dy.dtype)
    values = values.contiguous()
    key = *_key("csr_conv2d_dgrad", dy, values, None, n_in, window), H, W
    plan = plans.find(_csr_conv2d_dgrad_kernel, dy, key)
    cut = plan.decide(entry_options, "csr_conv2d_dgrad", dy, window)
    tiles = triton.cdiv(n_in, cut["BN"])
    sizes = {"H": H, "W": W, "P": P, "Q": Q, "Cg": n_in // window.groups, "C_in": n_in}
    sizes |= {"TAPS": window.kernel[0] * window.kernel[1]}

    def launch(dy: torch.Tensor, dx: torch.Tensor) -> None:
        M = len(dy) * triton.cdiv(H, SH) * triton.cdiv(W, SW)  # pixels of the largest phase
        strides = dict(zip(("syn", "syc", "syh", "syw"), dy.stride(), strict=True))
        tensors = dy, values, ccol, row, perm, dx
        ordinary_kernel = plan.start(_csr_conv2d_dgrad_kernel, tensors, len(dy))
        if ordinary_kernel is not None:
            ordinary_kernel[triton.cdiv(M, cut["BM"]) * tiles, SH * SW](
                *tensors, N=len(dy), **strides, **sizes, **cut
            )

    by_images(dy, dx, COLUMNS, launch)
    return in_dtype(dx, dy.dtype)
