"""Unstructured sparse times dense: `y = x wᵀ (+ bias)` and, with the same kernel, `dx = dy w`.

Shapes: x (M, K), w (N, K) held as values (nnz, 1, 1) at the active entries, y (M, N). Called by
`sparsekern.ops` for forward and for the input gradient of block (1, 1).

FLOPs: 2 * M * nnz.
Bytes from L1 or L2, s = element size: s * M * nnz for x, ceil(M / BM) * nnz * (s + 4) for values
and indices (+ 4 through perm), s * M * N out. Bytes from HBM, at least: s * (M * K + M * N + nnz);
when tokens are not side by side in memory, 2 * s * M * K more for the copy in which they are, and
2 * s * M * N to turn the result back; both copies are made and used chunk by chunk.

Neighbouring lanes hold neighbouring tokens, so a gathered column of x is one run of memory, and so
is a row of the transposed result: stored as it is returned, each number would be a sector. One
program makes BM tokens times BN rows; each row is summed in order by itself, without atomics. The
rows of a program are neighbours in length, not in place, as in Sputnik's row swizzle (Gale et al.
2020, section 5): a program runs as long as its longest row.
"""

# triton decorates without types
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from typing import Any

import torch
import triton
import triton.language as tl

from . import plans
from .launch import (
    arch_class,
    compute_kind,
    empty,
    in_dtype,
    input_precision,
    output_dtype,
    token_chunk,
    tokens_contiguous,
)
from .tables import find

__all__ = ["csr_spmm", "csr_spmm_t"]


@triton.jit
def _csr_spmm_kernel(
    x_ptr,  # (M, K), strides sxm, sxk
    v_ptr,  # (nnz,)
    start_ptr,  # (N + 1,) int32: crow, or ccol
    index_ptr,  # (nnz,) int32: col, or row
    perm_ptr,  # (nnz,) int32: slot in v; read only if TRANS
    order_ptr,  # (N,) int32: rows, longest first
    bias_ptr,  # (N,), stride sb; read only if HAS_BIAS
    y_ptr,  # (N, M), contiguous
    M,
    N,
    sxm,
    sxk,
    sb,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UNROLL: tl.constexpr,
    TRANS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
):
    # rows change fastest: the programs in flight share few tokens, whose columns stay in L2
    pid = tl.program_id(0)
    tiles = tl.cdiv(N, BN)
    rank = (pid % tiles) * BN + tl.arange(0, BN)
    in_n = rank < N
    n = tl.load(order_ptr + rank, mask=in_n, other=0)
    m = (pid // tiles).to(tl.int64) * BM + tl.arange(0, BM)
    lo = tl.load(start_ptr + n, mask=in_n, other=0)
    hi = tl.load(start_ptr + n + 1, mask=in_n, other=0)
    x_row = x_ptr + m[None, :] * sxm
    acc = tl.zeros([BN, BM], dtype=tl.float32)
    for i in range(0, tl.max(hi - lo), UNROLL):
        for u in tl.static_range(UNROLL):
            t = lo + i + u  # [BN]
            live = t < hi
            c = tl.load(index_ptr + t, mask=live, other=0).to(tl.int64)
            s = tl.load(perm_ptr + t, mask=live, other=0) if TRANS else t
            v = tl.load(v_ptr + s, mask=live, other=0.0).to(tl.float32)
            x = tl.load(
                x_row + c[:, None] * sxk, mask=live[:, None] & (m < M)[None, :], other=0.0
            ).to(tl.float32)
            acc += v[:, None] * x
    if HAS_BIAS:
        b = tl.load(bias_ptr + n.to(tl.int64) * sb, mask=in_n, other=0.0)
        acc += b.to(tl.float32)[:, None]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)  # unlike a maximum, this keeps NaN
    y = y_ptr + n.to(tl.int64)[:, None] * M + m[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=in_n[:, None] & (m < M)[None, :])


def csr_spmm(
    x: torch.Tensor,
    values: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    order: torch.Tensor,
    bias: torch.Tensor | None,
    n_out: int,
    *,
    relu: bool = False,
) -> torch.Tensor:
    """`y = x wᵀ (+ bias)`.

    Args:
        x: (M, K), any strides; fp32, fp16 or bf16.
        values: (nnz, 1, 1), x's dtype, in CSR order.
        crow: (n_out + 1,) int32.
        col: (nnz,) int32.
        order: (n_out,) int32, the order in which rows are taken.
        bias: (n_out,) or None.
        n_out: N, the rows of w.
        relu: return `max(y, 0)`.

    Returns:
        (M, N), contiguous, x's dtype.
    """
    return _launch(x, values, (crow, col, None, order), bias, n_out, relu)


def csr_spmm_t(
    dy: torch.Tensor,
    values: torch.Tensor,
    ccol: torch.Tensor,
    row: torch.Tensor,
    perm: torch.Tensor,
    order: torch.Tensor,
    n_out: int,
) -> torch.Tensor:
    """`dx = dy w`, the values read in place through `perm`.

    Args:
        dy: (M, N), any strides; fp32, fp16 or bf16.
        values: (nnz, 1, 1), dy's dtype, in CSR order.
        ccol: (n_out + 1,) int32.
        row: (nnz,) int32, in CSC order.
        perm: (nnz,) int32 slots in values, in CSC order.
        order: (n_out,) int32, the order in which columns are taken.
        n_out: K, the columns of w.

    Returns:
        (M, K), contiguous, dy's dtype.
    """
    return _launch(dy, values, (ccol, row, perm, order), None, n_out, False)


def _launch(
    x: torch.Tensor,
    values: torch.Tensor,
    side: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor],
    bias: torch.Tensor | None,
    n_out: int,
    relu: bool,
) -> torch.Tensor:
    (M, K), (start, index, perm, order) = x.shape, side
    y = empty(x, M, n_out, dtype=output_dtype(x.dtype, _csr_spmm_kernel))
    if y.numel() == 0:
        return in_dtype(y, x.dtype)
    values = values.contiguous()
    plan = plans.find(_csr_spmm_kernel, x, _key(x, values, perm is None, bias, n_out, relu))
    op, kind = "csr_spmm" if perm is None else "csr_spmm_t", compute_kind(x.dtype)
    tile, _ = plan.decide(find, arch_class(x.device), op, kind, "any", "any", tma=False)
    chunk = token_chunk(max(K, n_out), tile.BM)
    sizes = {"N": n_out, "sb": 0 if bias is None else bias.stride(0)}
    flags = {"TRANS": perm is not None, "HAS_BIAS": bias is not None, "RELU": relu}
    for m in range(0, M, chunk):
        xs, ys = (x, y) if chunk >= M else (x[m : m + chunk], y[m : m + chunk])
        xs = tokens_contiguous(xs)
        yt = y.new_empty(n_out, ys.shape[0])
        indices = start, index, index if perm is None else perm, order
        tensors = xs, values, *indices, xs if bias is None else bias, yt
        ordinary_kernel = plan.start(_csr_spmm_kernel, tensors, len(ys))
        if ordinary_kernel is not None:
            grid = (triton.cdiv(len(ys), tile.BM) * triton.cdiv(n_out, tile.BN),)
            sizes |= {"M": len(ys), "sxm": xs.stride(0), "sxk": xs.stride(1)}
            with torch.cuda.device_of(x):
                ordinary_kernel[grid](
                    *tensors, **sizes, **flags, **tile._asdict(), enable_fp_fusion=True
                )
        ys.copy_(yt.t())
    return in_dtype(y, x.dtype)


def _key(
    x: torch.Tensor,
    values: torch.Tensor,
    forward: bool,
    bias: torch.Tensor | None,
    n_out: int,
    relu: bool,
) -> tuple[Any, ...]:
    """All that a product's launches depend on, the tokens of each apart."""
    added = None if bias is None else (bias.stride(0), bias.dtype)
    held = values.shape, values.dtype, forward, added, n_out, relu
    return "csr_spmm", x.shape, x.stride(), x.dtype, *held, input_precision(x.dtype)
