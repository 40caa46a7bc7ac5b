"""Dense times dense, sampled at single entries: `dw = dyᵀ x`.

Shapes: dy (M, N), x (M, K), dw (nnz, 1, 1) in CSR order. Called by `sparsekern.ops` for the weight
gradient of block (1, 1).

FLOPs: 2 * M * nnz.
Bytes from L1 or L2, s = element size: s * M * nnz * (1 + 1 / BN), BN entries of a row sharing its
column of dy. Bytes from HBM, at least: s * (M * (N + K) + nnz); when tokens are not side by side
in memory, 2 * s * M * (N + K) more for the copies in which they are, made and used chunk by chunk,
and 8 * S * nnz for each chunk when its tokens are summed in S > 1 parts.

One program makes up to BN neighbouring entries of one row: lanes sum over tokens in order, then
across lanes in a fixed tree, then chunks and parts in order; no atomics.
"""

# triton decorates without types
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from typing import Any

import torch
import triton
import triton.language as tl

from . import plans
from .groups import slots_of_program
from .launch import (
    arch_class,
    compute_kind,
    empty,
    in_dtype,
    input_precision,
    output_dtype,
    splits,
    token_chunk,
    tokens_contiguous,
)
from .tables import find

__all__ = ["csr_sddmm"]


@triton.jit
def _csr_sddmm_kernel(
    dy_ptr,  # (M, N), strides sym, syn
    x_ptr,  # (M, K), strides sxm, sxk
    crow_ptr,  # (N + 1,) int32
    col_ptr,  # (nnz,) int32
    dw_ptr,  # (S, nnz), contiguous: one part for each tl.program_id(1)
    M,
    N,
    nnz,
    span,  # tokens of one part
    sym,
    syn,
    sxm,
    sxk,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ADD: tl.constexpr,
):
    r, lo, hi = slots_of_program(crow_ptr, tl.program_id(0), N, BN)
    if lo < hi:
        t = lo + tl.arange(0, BN)
        live = t < hi
        c = tl.load(col_ptr + t, mask=live, other=0).to(tl.int64)
        first = tl.program_id(1) * span
        dy_col = dy_ptr + r.to(tl.int64) * syn
        x_col = x_ptr + c[:, None] * sxk
        acc = tl.zeros([BN, BM], dtype=tl.float32)
        for m0 in range(first, min(first + span, M), BM):
            m = m0 + tl.arange(0, BM).to(tl.int64)
            dy = tl.load(dy_col + m * sym, mask=m < M, other=0.0).to(tl.float32)
            x = tl.load(
                x_col + m[None, :] * sxm, mask=live[:, None] & (m < M)[None, :], other=0.0
            ).to(tl.float32)
            acc += dy[None, :] * x
        dw = tl.sum(acc, axis=1)
        slot = tl.program_id(1).to(tl.int64) * nnz + t
        if ADD:
            dw += tl.load(dw_ptr + slot, mask=live, other=0.0).to(tl.float32)
        tl.store(dw_ptr + slot, dw.to(dw_ptr.dtype.element_ty), mask=live)


def csr_sddmm(
    dy: torch.Tensor,
    x: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`dw = (dyᵀ x)` at the active entries.

    Args:
        dy: (M, N), any strides; fp32, fp16 or bf16.
        x: (M, K), any strides; dy's dtype.
        crow: (N + 1,) int32.
        col: (nnz,) int32.
        out: (nnz, 1, 1), any float dtype: dw is added to it in place.

    Returns:
        (nnz, 1, 1), contiguous, x's dtype; `out` if it is given.
    """
    (M, N), nnz = dy.shape, col.numel()
    arch = arch_class(x.device)
    plan = plans.find(_csr_sddmm_kernel, x, _key(dy, x, nnz))
    kind = compute_kind(x.dtype)
    tile, _ = plan.decide(find, arch, "csr_sddmm", kind, "any", "any", tma=False)
    chunk = min(M, token_chunk(N + x.shape[1], tile.BM))
    programs = nnz // tile.BN + N
    parts = splits(arch, programs, triton.cdiv(chunk, tile.BM))
    span = triton.cdiv(triton.cdiv(chunk, parts), tile.BM) * tile.BM
    # rounded once: after the last chunk and part, and with what `out` holds
    whole = out is None and parts == 1 and chunk == M
    dtype = output_dtype(x.dtype, _csr_sddmm_kernel) if whole else torch.float32
    dw = empty(x, parts, nnz, dtype=dtype)
    sizes = {"N": N, "nnz": nnz, "span": span, "enable_fp_fusion": True} | tile._asdict()
    for i, (dys, xs) in enumerate(zip(dy.split(chunk), x.split(chunk), strict=True)):
        dyt, xt = tokens_contiguous(dys), tokens_contiguous(xs)
        tensors, ADD = (dyt, xt, crow, col, dw), i > 0
        variant = len(xs), ADD, dtype, parts, chunk
        ordinary_kernel = plan.start(_csr_sddmm_kernel, tensors, variant)
        if ordinary_kernel is not None:
            (sym, syn), (sxm, sxk) = dyt.stride(), xt.stride()
            with torch.cuda.device_of(x):
                ordinary_kernel[(programs, parts)](
                    *tensors, M=len(xs), sym=sym, syn=syn, sxm=sxm, sxk=sxk, ADD=ADD, **sizes
                )
    total = (dw[0] if parts == 1 else dw.sum(0)).view(nnz, 1, 1)
    return in_dtype(total, x.dtype) if out is None else out.add_(total)


def _key(dy: torch.Tensor, x: torch.Tensor, nnz: int) -> tuple[Any, ...]:
    """All that a product's launches depend on, the tokens of each apart."""
    operands = dy.shape, dy.stride(), dy.dtype, x.shape, x.stride(), x.dtype
    return "csr_sddmm", *operands, nnz, input_precision(x.dtype)
