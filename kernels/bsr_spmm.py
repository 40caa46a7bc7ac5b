"""Block-sparse times dense: `y = x wᵀ (+ bias)` and, with the same kernel, `dx = dy w`.

Shapes: x (M, K), w (N, K) held as values (nnzb, BH, BW) at the active blocks, y (M, N). Called by
`sparsekern.ops` for forward and for the input gradient.

FLOPs: 2 * M * nnzb * BH * BW.
Bytes from L2, s = element size: s * M * nnzb * IN for x, s * ceil(M / BM) * nnzb * BH * BW for w,
s * M * N out; IN is the block's edge along the sum (BW forward, BH transposed). Bytes from HBM, at
least: s * (M * K + M * N + nnzb * BH * BW).

One program makes one tile of BM tokens times one block row, walking that row's active blocks in
order, so the sum has one order and needs no atomics. Blocks narrower than BK are gathered several
to an iteration; wider ones are cut into BK lanes.
"""

# triton decorates without types
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import torch
import triton
import triton.language as tl

from .launch import (
    arch_class,
    bsr_spmm_config,
    compute_kind,
    input_precision,
    is_interpreted,
    output_dtype,
)

__all__ = ["bsr_spmm", "bsr_spmm_t"]


@triton.jit
def _bsr_spmm_kernel(
    x_ptr,  # (M, K), strides sxm, sxk
    w_ptr,  # (nnzb, IN, OUT) read through the strides that TRANS sets
    start_ptr,  # (R + 1,) int32: crow, or ccol
    index_ptr,  # (nnzb,) int32: col, or row
    perm_ptr,  # (nnzb,) int32: slot in w; read only if TRANS
    bias_ptr,  # (N,), stride sb; read only if HAS_BIAS
    y_ptr,  # (M, N), contiguous
    M,
    K,
    N,
    R,  # block rows of the output
    sxm,
    sxk,
    sb,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    TRANS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    # block rows change fastest: the programs in flight share few tiles of x, which stay in L2
    pid = tl.program_id(0)
    r = pid % R
    m = (pid // R).to(tl.int64) * BM + tl.arange(0, BM)
    o = tl.arange(0, OUT)
    n = r.to(tl.int64) * OUT + o
    lane = tl.arange(0, BK)
    lo = tl.load(start_ptr + r)
    hi = tl.load(start_ptr + r + 1)
    x_row = x_ptr + m[:, None] * sxm
    # w[slot][BH][BW]: the sum runs along BW forward, along BH transposed
    w_out = w_ptr + (o if TRANS else o * IN)[None, :]
    t = lo + lane // IN  # [BK] place of each lane's block in this row's list
    c = tl.load(index_ptr + t, mask=t < hi, other=0)
    s = tl.load(perm_ptr + t, mask=t < hi, other=0) if TRANS else t
    acc = tl.zeros([BM, OUT], dtype=tl.float32)
    for k in range(0, (hi - lo) * IN, BK):
        inner = (k + lane) % IN
        kk = c.to(tl.int64) * IN + inner
        kk = tl.max_contiguous(tl.multiple_of(kk, min(IN, BK)), min(IN, BK))
        keep = (kk < K) & (t < hi)
        x = tl.load(x_row + kk[None, :] * sxk, mask=(m < M)[:, None] & keep[None, :], other=0.0)
        w_in = s.to(tl.int64) * (IN * OUT) + inner * (OUT if TRANS else 1)
        if not TRANS:
            w_in = tl.max_contiguous(tl.multiple_of(w_in, min(IN, BK)), min(IN, BK))
        w = tl.load(w_out + w_in[:, None], mask=keep[:, None], other=0.0)
        # next iteration's indices now, so that its tiles never wait for them
        t = lo + (k + BK + lane) // IN
        c = tl.load(index_ptr + t, mask=t < hi, other=0)
        s = tl.load(perm_ptr + t, mask=t < hi, other=0) if TRANS else t
        if INTERPRET:  # the interpreter multiplies the bit patterns of bf16
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n * sb, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y = y_ptr + m[:, None] * N + n[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def bsr_spmm(
    x: torch.Tensor,
    values: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    bias: torch.Tensor | None,
    n_out: int,
) -> torch.Tensor:
    """`y = x wᵀ (+ bias)`.

    Args:
        x: (M, K), any strides; fp32, fp16 or bf16.
        values: (nnzb, BH, BW), x's dtype, in CSR order.
        crow: (block rows + 1,) int32.
        col: (nnzb,) int32 block columns.
        bias: (n_out,) or None.
        n_out: N, the rows of w.

    Returns:
        (M, N), contiguous, x's dtype.
    """
    return _launch(x, values, crow, col, None, bias, n_out)


def bsr_spmm_t(
    dy: torch.Tensor,
    values: torch.Tensor,
    ccol: torch.Tensor,
    row: torch.Tensor,
    perm: torch.Tensor,
    n_out: int,
) -> torch.Tensor:
    """`dx = dy w`, the values read in place through `perm`.

    Args:
        dy: (M, N), any strides; fp32, fp16 or bf16.
        values: (nnzb, BH, BW), dy's dtype, in CSR order.
        ccol: (block columns + 1,) int32.
        row: (nnzb,) int32 block rows, in CSC order.
        perm: (nnzb,) int32 slots in values, in CSC order.
        n_out: K, the columns of w.

    Returns:
        (M, K), contiguous, dy's dtype.
    """
    return _launch(dy, values, ccol, row, perm, None, n_out)


def _launch(
    x: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    index: torch.Tensor,
    perm: torch.Tensor | None,
    bias: torch.Tensor | None,
    n_out: int,
) -> torch.Tensor:
    (M, K), R = x.shape, start.numel() - 1
    y = x.new_empty(M, n_out, dtype=output_dtype(x.dtype, _bsr_spmm_kernel))
    if y.numel() == 0:
        return y.to(x.dtype)
    bh, bw = values.shape[1:]
    reduce, out = (bw, bh) if perm is None else (bh, bw)
    tile = bsr_spmm_config(arch_class(x.device), compute_kind(x.dtype), out)
    with torch.cuda.device_of(x):
        _bsr_spmm_kernel[(triton.cdiv(M, tile.BM) * R,)](
            x,
            values.contiguous(),
            start,
            index,
            index if perm is None else perm,
            x if bias is None else bias,
            y,
            M,
            K,
            n_out,
            R,
            x.stride(0),
            x.stride(1),
            0 if bias is None else bias.stride(0),
            IN=reduce,
            OUT=out,
            BM=tile.BM,
            BK=tile.BK,
            TRANS=perm is not None,
            HAS_BIAS=bias is not None,
            PRECISION=input_precision(x.dtype),
            INTERPRET=is_interpreted(_bsr_spmm_kernel),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
    return y.to(x.dtype)
