"""Dense times dense, sampled at the active blocks: `dw = dyᵀ x`.

Shapes: dy (M, N), x (M, K), dw (nnzb, BH, BW) in CSR order. Called by `sparsekern.ops` for the
weight gradient.

FLOPs: 2 * M * nnzb * BH * BW.
Bytes from L2, s = element size: s * M * nnzb * (BW + BH / G), G blocks of a block row sharing one
tile of dy. Bytes from HBM, at least: s * (M * (N + K) + nnzb * BH * BW); when the sum over tokens
is cut into S > 1 parts, 8 * S * nnzb * BH * BW more.

One program makes up to G neighbouring blocks of one block row. Block row r owns the programs from
crow[r] // G + r on, at least as many as it needs; the bound nnzb // G + R on all of them is known
without asking the device, and a program that finds nothing left in its row ends.
"""

# triton decorates without types
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import torch
import triton
import triton.language as tl

from .launch import (
    arch_class,
    bsr_sddmm_config,
    compute_kind,
    input_precision,
    is_interpreted,
    output_dtype,
    splits,
)

__all__ = ["bsr_sddmm"]


@triton.jit
def _group_of_program(crow_ptr, pid, R, G: tl.constexpr):
    """Row of program `pid`, and the slots [lo, hi) that are left in that row from its group on."""
    left = pid * 0
    right = left + R - 1
    while left < right:
        middle = (left + right + 1) // 2
        fits = tl.load(crow_ptr + middle) // G + middle <= pid
        left = tl.where(fits, middle, left)
        right = tl.where(fits, right, middle - 1)
    begin = tl.load(crow_ptr + left)
    lo = begin + (pid - begin // G - left) * G
    return left, lo, tl.load(crow_ptr + left + 1)


@triton.jit
def _bsr_sddmm_kernel(
    dy_ptr,  # (M, N), strides sym, syn
    x_ptr,  # (M, K), strides sxm, sxk
    crow_ptr,  # (R + 1,) int32
    col_ptr,  # (nnzb,) int32
    dw_ptr,  # (S, nnzb, BH, BW), contiguous: one part for each tl.program_id(1)
    M,
    N,
    K,
    R,  # block rows
    span,  # tokens of one part
    part,  # nnzb * BH * BW
    sym,
    syn,
    sxm,
    sxk,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BM: tl.constexpr,
    G: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    r, lo, hi = _group_of_program(crow_ptr, tl.program_id(0), R, G)
    if lo < hi:
        lane = tl.arange(0, G * BW)
        t = lo + lane // BW  # [G * BW] slot of each column of the gathered x
        j = lane % BW
        c = tl.load(col_ptr + t, mask=t < hi, other=0)
        k = tl.max_contiguous(tl.multiple_of(c.to(tl.int64) * BW + j, BW), BW)
        k_in = (k < K) & (t < hi)
        i = tl.arange(0, BH)
        n = r.to(tl.int64) * BH + i
        first = tl.program_id(1) * span
        acc = tl.zeros([G * BW, BH], dtype=tl.float32)
        for m0 in range(first, min(first + span, M), BM):
            m = m0 + tl.arange(0, BM).to(tl.int64)
            dy = tl.load(
                dy_ptr + m[:, None] * sym + n[None, :] * syn,
                mask=(m < M)[:, None] & (n < N)[None, :],
                other=0.0,
            )
            x = tl.load(
                x_ptr + m[:, None] * sxm + k[None, :] * sxk,
                mask=(m < M)[:, None] & k_in[None, :],
                other=0.0,
            )
            if INTERPRET:  # the interpreter multiplies the bit patterns of bf16
                dy = dy.to(tl.float32)
                x = x.to(tl.float32)
            acc = tl.dot(tl.trans(x), dy, acc, input_precision=PRECISION)
        # padding is zero by decree: masked zeros times an infinity would not be
        acc = tl.where(k_in[:, None] & (n < N)[None, :], acc, 0.0)
        slot = tl.program_id(1).to(tl.int64) * part + t.to(tl.int64) * (BH * BW)
        dw = dw_ptr + (slot + j)[:, None] + (i * BW)[None, :]
        tl.store(dw, acc.to(dw_ptr.dtype.element_ty), mask=(t < hi)[:, None])


def bsr_sddmm(
    dy: torch.Tensor,
    x: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    block: tuple[int, int],
) -> torch.Tensor:
    """`dw = (dyᵀ x)` at the active blocks.

    Args:
        dy: (M, N), any strides; fp32, fp16 or bf16.
        x: (M, K), any strides; dy's dtype.
        crow: (block rows + 1,) int32.
        col: (nnzb,) int32 block columns.
        block: (BH, BW).

    Returns:
        (nnzb, BH, BW), contiguous, x's dtype; rows and columns outside (N, K) are exact zeros.
    """
    (M, N), K, nnzb, R = dy.shape, x.shape[1], col.numel(), crow.numel() - 1
    bh, bw = block
    arch = arch_class(x.device)
    tile = bsr_sddmm_config(arch, compute_kind(x.dtype), block)
    programs = nnzb // tile.G + R
    parts = splits(arch, programs, triton.cdiv(M, tile.BM))
    span = triton.cdiv(triton.cdiv(M, parts), tile.BM) * tile.BM
    dtype = output_dtype(x.dtype, _bsr_sddmm_kernel) if parts == 1 else torch.float32
    dw = x.new_empty(parts, nnzb, bh, bw, dtype=dtype)
    if nnzb > 0:
        with torch.cuda.device_of(x):
            _bsr_sddmm_kernel[(programs, parts)](
                dy,
                x,
                crow,
                col,
                dw,
                M,
                N,
                K,
                R,
                span,
                nnzb * bh * bw,
                *dy.stride(),
                *x.stride(),
                BH=bh,
                BW=bw,
                BM=tile.BM,
                G=tile.G,
                PRECISION=input_precision(x.dtype),
                INTERPRET=is_interpreted(_bsr_sddmm_kernel),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                enable_fp_fusion=True,
            )
    return (dw[0] if parts == 1 else dw.sum(0)).to(x.dtype)
