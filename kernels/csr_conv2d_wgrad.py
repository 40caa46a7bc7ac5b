"""Weight gradient of an unstructured sparse convolution, at the active entries only.

Shapes: dy (N, C_out, P, Q), x (N, C_in, H, W), dw (nnz, 1, 1) in CSR order. Called by
`sparsekern.ops` for the weight gradient of block (1, 1).

FLOPs: 2 * N * P * Q * nnz.
Bytes from L1 or L2, s = element size: s * N * P * Q * nnz * (1 + 1 / BN), BN entries of a row
sharing its channel of dy. Bytes from HBM, at least: s * (N * P * Q * C_out + N * H * W * C_in +
nnz); channels-last activations are copied some images at a time, 2 * s * N * (P * Q * C_out + H * W
* C_in) more, and 8 * S * nnz for each such launch whose pixels are summed in S > 1 parts.

One program makes up to BN neighbouring entries of one row: lanes sum over pixels in order, then
across lanes in a fixed tree, then launches and parts in order; no atomics.
"""

# triton decorates without types
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from typing import Any

import torch
import triton
import triton.language as tl

from . import plans
from .groups import slots_of_program
from .launch import arch_class, empty, in_dtype, input_precision, output_dtype, splits
from .pixels import advance, inside, pixel
from .window import (
    Window,
    columns_adjacent,
    entry_options,
    has_adjacent_columns,
    images_at_once,
)

__all__ = ["csr_conv2d_wgrad"]


# a new batch or image size must not mean a new compilation
@triton.jit(do_not_specialize=["M", "N", "H", "W", "P", "Q", "C_out", "Cg", "Cog", "nnz", "span"])
def _csr_conv2d_wgrad_kernel(
    dy_ptr,  # (N, C_out, P, Q), strides syn, syc, syh, syw
    x_ptr,  # (N, C_in, H, W), strides sxn, sxc, sxh, sxw
    crow_ptr,  # (C_out + 1,) int32
    col_ptr,  # (nnz,) int32
    dw_ptr,  # (S, nnz), contiguous: one part for each tl.program_id(1)
    M,  # output pixels of all images
    N,
    H,
    W,
    P,
    Q,
    C_out,
    Cg,  # input channels of a group
    Cog,  # its output channels
    nnz,
    span,  # pixels of one part, a multiple of BM
    syn,
    syc,
    syh,
    syw,
    sxn,
    sxc,
    sxh,
    sxw,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ADD: tl.constexpr,
):
    o, lo, hi = slots_of_program(crow_ptr, tl.program_id(0), C_out, BN)
    if lo < hi:
        t = lo + tl.arange(0, BN)
        live = t < hi
        c = tl.load(col_ptr + t, mask=live, other=0)
        tap = c // Cg
        ch = (o // Cog * Cg + c - tap * Cg).to(tl.int64)
        h = tap // KW * DH - PH
        w = tap % KW * DW - PW
        x_lane = (x_ptr + ch * sxc + h.to(tl.int64) * sxh + w * sxw)[:, None]
        dy_lane = dy_ptr + o.to(tl.int64) * syc
        first = tl.program_id(1) * span
        n, p, q = pixel(first + tl.arange(0, BM), P * Q, Q)
        dp = BM // Q
        dn = dp // P
        dp -= dn * P
        dq = BM % Q
        acc = tl.zeros([BN, BM], dtype=tl.float32)
        for _ in range(first, min(first + span, M), BM):
            image = n.to(tl.int64)
            dy = tl.load(
                dy_lane + image * syn + p.to(tl.int64) * syh + q * syw, mask=n < N, other=0.0
            ).to(tl.float32)
            at = image * sxn + (p * SH).to(tl.int64) * sxh + q * SW * sxw
            seen = inside(h[:, None] + (p * SH)[None, :], w[:, None] + (q * SW)[None, :], H, W)
            x = tl.load(
                x_lane + at[None, :],
                mask=seen & live[:, None] & (n < N)[None, :],
                other=0.0,
            ).to(tl.float32)
            acc += dy[None, :] * x
            n, p, q = advance(n, p, q, dn, dp, dq, P, Q)
        dw = tl.sum(acc, axis=1)
        slot = tl.program_id(1).to(tl.int64) * nnz + t
        if ADD:
            dw += tl.load(dw_ptr + slot, mask=live, other=0.0).to(tl.float32)
        tl.store(dw_ptr + slot, dw.to(dw_ptr.dtype.element_ty), mask=live)


def csr_conv2d_wgrad(
    dy: torch.Tensor,
    x: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    window: Window,
) -> torch.Tensor:
    """Gradient of `conv2d` with respect to the active entries of its weight.

    Args:
        dy: (N, C_out, P, Q), any strides; fp32, fp16 or bf16. Read as it lies if the pixels of an
            image's row are side by side, else copied into that layout, some images at a time.
        x: (N, C_in, H, W), dy's dtype, read likewise.
        crow: (C_out + 1,) int32.
        col: (nnz,) int32: tap * (C_in / groups) + channel.
        window: geometry; N * P * Q is less than 2**31.

    Returns:
        (nnz, 1, 1), contiguous, x's dtype.
    """
    batch, n_out, P, Q = dy.shape
    _, n_in, H, W = x.shape
    nnz, groups = col.numel(), window.groups
    plan = plans.find(_csr_conv2d_wgrad_kernel, x, _key(dy, x, nnz, window))
    cut = plan.decide(entry_options, "csr_conv2d_wgrad", x, window)
    copied = sum(0 if has_adjacent_columns(a) else a.shape[1:].numel() for a in (dy, x))
    step = images_at_once(batch, copied=copied)
    programs, M = nnz // cut["BN"] + n_out, step * P * Q
    parts = splits(arch_class(x.device), programs, triton.cdiv(M, cut["BM"]))
    # rounded once: after the last images and part
    whole = parts == 1 and step >= batch
    dtype = output_dtype(x.dtype, _csr_conv2d_wgrad_kernel) if whole else torch.float32
    dw = empty(x, parts, nnz, dtype=dtype)
    if dw.numel() == 0 or dy.numel() == 0:
        return in_dtype(dw[0].zero_(), x.dtype).view(nnz, 1, 1)
    span = triton.cdiv(triton.cdiv(M, parts), cut["BM"]) * cut["BM"]
    sizes = {"H": H, "W": W, "P": P, "Q": Q, "C_out": n_out, "nnz": nnz, "span": span}
    sizes |= {"Cg": n_in // groups, "Cog": n_out // groups}
    for first in range(0, batch, step):
        dys, xs = (columns_adjacent(a[first : first + step]) for a in (dy, x))
        tensors = dys, xs, crow, col, dw
        ADD = first > 0
        variant = len(xs), ADD, dtype, parts
        ordinary_kernel = plan.start(_csr_conv2d_wgrad_kernel, tensors, variant)
        if ordinary_kernel is not None:
            with torch.cuda.device_of(x):
                ordinary_kernel[programs, parts](
                    *tensors,
                    M=len(xs) * P * Q,
                    N=len(xs),
                    **dict(zip(("syn", "syc", "syh", "syw"), dys.stride(), strict=True)),
                    **dict(zip(("sxn", "sxc", "sxh", "sxw"), xs.stride(), strict=True)),
                    ADD=ADD,
                    **sizes,
                    **cut,
                )
    return in_dtype(dw[0] if parts == 1 else dw.sum(0), x.dtype).view(nnz, 1, 1)


def _key(dy: torch.Tensor, x: torch.Tensor, nnz: int, window: Window) -> tuple[Any, ...]:
    """All that a product's launches depend on, the images of each apart."""
    operands = dy.shape, dy.stride(), dy.dtype, x.shape, x.stride(), x.dtype
    return "csr_conv2d_wgrad", *operands, nnz, window, input_precision(x.dtype)
