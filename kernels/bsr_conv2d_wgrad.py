"""Weight gradient of a block-sparse convolution, at the active blocks only, without im2col.

Shapes: dy (N, C_out, P, Q), x (N, C_in, H, W), dw (nnzb, BH, BW) in CSR order; blocks as in
`bsr_conv2d`. Called by `sparsekern.ops` for the weight gradient.

FLOPs: 2 * N * P * Q * nnzb * BH * BW.
Bytes from L2, s = element size: s * N * P * Q * nnzb * (BW + BH / G), G blocks of a block row
sharing one tile of dy. Bytes from HBM, at least: s * (N * P * Q * C_out + N * H * W * C_in + nnzb *
BH * BW); when the sum over pixels is cut into S > 1 parts, 8 * S * nnzb * BH * BW more.

The linear sampled product with a shift of x for each lane: one program makes up to G neighbouring
blocks of one block row, whose taps are fixed for the whole sum. It walks the output pixels and
counts their image, row and column up, as dividing would cost more than the product. Parts are
summed in order by a second pass: no atomics.
"""

# triton decorates without types
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from typing import Any

import torch
import triton
import triton.language as tl

from . import plans
from .bsr_sddmm import _group_of_program
from .launch import (
    arch_class,
    compute_kind,
    empty,
    in_dtype,
    input_precision,
    is_interpreted,
    output_dtype,
    splits,
)
from .pixels import FAR, advance, inside, pixel
from .tables import find
from .window import (
    Window,
    channels_adjacent,
    has_adjacent_channels,
    images_at_once,
    window_options,
)

__all__ = ["bsr_conv2d_wgrad"]


# a new batch or image size must not mean a new compilation
@triton.jit(do_not_specialize=["M", "N", "H", "W", "P", "Q", "R", "RB", "CB", "span"])
def _bsr_conv2d_wgrad_kernel(
    dy_ptr,  # (N, P, Q, C_out), strides syn, syh, syw, 1
    x_ptr,  # (N, H, W, C_in), strides sxn, sxh, sxw, 1
    crow_ptr,  # (R + 1,) int32
    col_ptr,  # (nnzb,) int32
    dw_ptr,  # (S, nnzb, BH, BW), contiguous: one part for each tl.program_id(1)
    M,  # output pixels of all images
    N,
    H,
    W,
    P,
    Q,
    R,  # block rows
    RB,  # of which a group has
    CB,  # block columns of a tap
    Cg,  # input channels of a group
    Cog,  # its output channels
    span,  # pixels of one part, a multiple of BM
    part,  # nnzb * BH * BW
    syn,
    syh,
    syw,
    sxn,
    sxh,
    sxw,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BM: tl.constexpr,
    G: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row, lo, hi = _group_of_program(crow_ptr, tl.program_id(0), R, G)
    if lo < hi:
        g = row // RB
        lane = tl.arange(0, G * BW)
        t = lo + lane // BW  # [G * BW] slot of each lane of the gathered x
        j = lane % BW
        # scalars: what comes from a load of a tensor the compiler would not compute anew in the
        # layout of x, but move there in every iteration
        c = lane * 0
        for u in tl.static_range(G):
            c = tl.where(lane // BW == u, tl.load(col_ptr + lo + u, mask=lo + u < hi, other=0), c)
        tap = c // CB
        ch = tl.max_contiguous(tl.multiple_of((c - tap * CB) * BW + j, BW), BW)
        c_in = (ch < Cg) & (t < hi)
        h = tap // KW * DH - PH
        w = (tap % KW * DW - PW)[None, :]
        x_lane = x_ptr + g * Cg + h.to(tl.int64) * sxh + ch
        x_lane = x_lane[None, :] + w.to(tl.int64) * sxw
        h = tl.where(c_in, h, FAR)[None, :]  # lanes of no channel read nothing
        i = tl.arange(0, BH)
        o = row % RB * BH + i
        dy_lane = dy_ptr + (g * Cog + o)[None, :]
        first = tl.program_id(1) * span
        n, p, q = pixel(first + tl.arange(0, BM), P * Q, Q)
        dp = BM // Q
        dn = dp // P
        dp -= dn * P
        dq = BM % Q
        acc = tl.zeros([G * BW, BH], dtype=tl.float32)
        for _ in range(first, min(first + span, M), BM):
            live = n < N
            top = tl.where(live, p * SH, FAR)[:, None]  # pixels beyond the last read nothing
            image = n.to(tl.int64)[:, None]
            at = image * syn + p.to(tl.int64)[:, None] * syh + q.to(tl.int64)[:, None] * syw
            dy = tl.load(
                dy_lane + at,
                mask=live[:, None] & (o < Cog)[None, :],
                other=0.0,
            )
            left = (q * SW)[:, None]
            at = image * sxn + (p * SH).to(tl.int64)[:, None] * sxh + left.to(tl.int64) * sxw
            x = tl.load(x_lane + at, mask=inside(h + top, w + left, H, W), other=0.0)
            n, p, q = advance(n, p, q, dn, dp, dq, P, Q)
            if INTERPRET:  # the interpreter multiplies the bit patterns of bf16
                dy = dy.to(tl.float32)
                x = x.to(tl.float32)
            acc = tl.dot(tl.trans(x), dy, acc, input_precision=PRECISION)
        # padding is zero by decree: masked zeros times an infinity would not be
        acc = tl.where(c_in[:, None] & (o < Cog)[None, :], acc, 0.0)
        slot = tl.program_id(1).to(tl.int64) * part + t.to(tl.int64) * (BH * BW)
        dw = dw_ptr + (slot + j)[:, None] + (i * BW)[None, :]
        if ADD:
            acc += tl.load(dw, mask=(t < hi)[:, None], other=0.0).to(tl.float32)
        tl.store(dw, acc.to(dw_ptr.dtype.element_ty), mask=(t < hi)[:, None])


def bsr_conv2d_wgrad(
    dy: torch.Tensor,
    x: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    block: tuple[int, int],
    window: Window,
) -> torch.Tensor:
    """Gradient of `conv2d` with respect to the active blocks of its weight.

    Args:
        dy: (N, C_out, P, Q), any strides; fp32, fp16 or bf16. Read as it lies if the channels of a
            pixel are side by side, else copied into that layout, some images at a time.
        x: (N, C_in, H, W), dy's dtype, read likewise.
        crow: (block rows + 1,) int32.
        col: (nnzb,) int32 block columns.
        block: (BH, BW).
        window: geometry; N * P * Q is less than 2**31.

    Returns:
        (nnzb, BH, BW), contiguous, x's dtype; rows and columns that stand for no channel are exact
        zeros.
    """
    batch, n_out, P, Q = dy.shape
    _, n_in, H, W = x.shape
    (bh, bw), groups = block, window.groups
    plan = plans.find(_bsr_conv2d_wgrad_kernel, x, _key(dy, x, crow, col, block, window))
    cut = plan.decide(_options, x, block, window)
    copied = sum(0 if has_adjacent_channels(a) else a.shape[1:].numel() for a in (dy, x))
    step = images_at_once(batch, copied=copied)
    R, M = crow.numel() - 1, step * P * Q
    programs = col.numel() // cut["G"] + R
    parts = splits(arch_class(x.device), programs, triton.cdiv(M, cut["BM"]))
    # rounded once: after the last images and part
    whole = parts == 1 and step >= batch
    dtype = output_dtype(x.dtype, _bsr_conv2d_wgrad_kernel) if whole else torch.float32
    dw = empty(x, parts, col.numel(), *block, dtype=dtype)
    if dw.numel() == 0 or dy.numel() == 0:
        return in_dtype(dw[0].zero_(), x.dtype)
    span = triton.cdiv(triton.cdiv(M, parts), cut["BM"]) * cut["BM"]
    sizes = {"H": H, "W": W, "P": P, "Q": Q, "R": R, "span": span, "part": dw[0].numel()}
    sizes |= {"RB": triton.cdiv(n_out // groups, bh), "CB": triton.cdiv(n_in // groups, bw)}
    sizes |= {"Cg": n_in // groups, "Cog": n_out // groups}
    for first in range(0, batch, step):
        dys, xs = (channels_adjacent(a[first : first + step]) for a in (dy, x))
        tensors = dys, xs, crow, col, dw
        ADD = first > 0
        variant = len(xs), ADD, dtype, parts
        ordinary_kernel = plan.start(_bsr_conv2d_wgrad_kernel, tensors, variant)
        if ordinary_kernel is not None:
            with torch.cuda.device_of(x):
                ordinary_kernel[programs, parts](
                    *tensors,
                    M=len(xs) * P * Q,
                    N=len(xs),
                    **{f"sy{name}": dys.stride(dim) for name, dim in _STRIDES},
                    **{f"sx{name}": xs.stride(dim) for name, dim in _STRIDES},
                    ADD=ADD,
                    **sizes,
                    **cut,
                )
    return in_dtype(dw[0] if parts == 1 else dw.sum(0), x.dtype)


_STRIDES = ("n", 0), ("h", 2), ("w", 3)


def _options(x: torch.Tensor, block: tuple[int, int], window: Window) -> dict[str, Any]:
    kind = compute_kind(x.dtype)
    tile, _ = find(arch_class(x.device), "conv2d_wgrad", kind, max(block), "any", tma=False)
    return {
        "BH": block[0],
        "BW": block[1],
        "BM": tile.BM,
        "G": max(1, tile.LANES // block[1]),
        "PRECISION": input_precision(x.dtype),
        "INTERPRET": is_interpreted(_bsr_conv2d_wgrad_kernel),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
        **window_options(window),
    }


def _key(
    dy: torch.Tensor,
    x: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    block: tuple[int, int],
    window: Window,
) -> tuple[Any, ...]:
    """All that a product's launches depend on, the images of each apart."""
    operands = dy.shape, dy.stride(), dy.dtype, x.shape, x.stride(), x.dtype
    held = crow.numel(), col.numel(), block, window
    return "bsr_conv2d_wgrad", *operands, *held, input_precision(x.dtype)
