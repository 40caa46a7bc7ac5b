"""Block norms of the dense gradient `dyᵀ x`, which is never stored: what RigL grows by.

Shapes: dy (M, N), x (M, K), scores (block rows, block columns) in fp32. Called by `sparsekern.ops`
at topology updates only.

FLOPs: 2 * M * N * K, those of the dense product.
Bytes from L2, s = element size: s * M * N * K * (1 / TK + 1 / TN). Bytes from HBM, at least:
s * M * (N + K) + 4 * block rows * block columns; a dense gradient would write N * K.

One program makes one TN x TK tile over all tokens, so the sum is complete before its norm is
taken, and reduces it to TN / BH x TK / BW scores in registers. Neighbouring programs share TN rows
of dy; GROUP of them in turn share x.
"""

# triton decorates without types
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import (
    aligned_rows,
    arch_class,
    compute_kind,
    input_precision,
    is_interpreted,
    load_unit,
    tma_fits,
)
from .tables import find

__all__ = ["NORMS", "bsr_grow"]

NORMS = ("l1", "l2", "max")

_GROUP = 8  # tiles of rows walked together


@triton.jit(do_not_specialize=["M", "N", "K", "R", "C", "sym", "sxm"])
def _bsr_grow_kernel(
    dy,  # (M, N): pointer with strides UNIT * sym, 1, or descriptor with tiles of (BM, TN)
    x,  # (M, K): pointer with strides UNIT * sxm, 1, or descriptor with tiles of (BM, TK)
    scores_ptr,  # (R, C) fp32
    M,
    N,
    K,
    R,  # block rows
    C,  # block columns
    sym,
    sxm,
    UNIT: tl.constexpr,  # rows are of whole units, whatever N and K are
    BH: tl.constexpr,
    BW: tl.constexpr,
    TN: tl.constexpr,
    TK: tl.constexpr,
    BM: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    pid = tl.program_id(0)
    across = tl.cdiv(K, TK)
    first = pid // (GROUP * across) * GROUP
    size = min(tl.cdiv(N, TN) - first, GROUP)
    within = pid % (GROUP * across)
    n0 = (first + within % size) * TN
    k0 = within // size * TK
    n = n0.to(tl.int64) + tl.arange(0, TN)
    k = k0.to(tl.int64) + tl.arange(0, TK)
    acc = tl.zeros([TN, TK], dtype=tl.float32)
    for m0 in range(0, M, BM):
        if TMA:
            a = dy.load([m0, n0])
            b = x.load([m0, k0])
        else:
            m = m0 + tl.arange(0, BM).to(tl.int64)
            a = tl.load(
                dy + m[:, None] * UNIT * sym + n[None, :],
                mask=(m < M)[:, None] & (n < tl.cdiv(N, UNIT) * UNIT)[None, :],
                other=0.0,
            )
            b = tl.load(
                x + m[:, None] * UNIT * sxm + k[None, :],
                mask=(m < M)[:, None] & (k < tl.cdiv(K, UNIT) * UNIT)[None, :],
                other=0.0,
            )
        if INTERPRET:  # the interpreter multiplies the bit patterns of bf16
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    # zeros beyond the edges times an infinity are not zero
    acc = tl.where((n < N)[:, None] & (k < K)[None, :], acc, 0.0)
    size_of = acc * acc if NORM == "l2" else tl.abs(acc)
    tiles = tl.reshape(size_of, [TN // BH, BH, TK // BW, BW])
    if NORM == "max":
        # NaN must reach the score: a maximum would drop it
        tiles = tl.where(tiles == tiles, tiles, float("inf"))  # noqa: PLR0124
        score = tl.max(tl.max(tiles, 3), 1)
    else:
        score = tl.sum(tl.sum(tiles, 3), 1)
    i = n0 // BH + tl.arange(0, TN // BH)
    j = k0 // BW + tl.arange(0, TK // BW)
    at = scores_ptr + i.to(tl.int64)[:, None] * C + j[None, :]
    tl.store(at, score, mask=(i < R)[:, None] & (j < C)[None, :])


def bsr_grow(
    dy: torch.Tensor, x: torch.Tensor, block: tuple[int, int], norm: str = "l1"
) -> torch.Tensor:
    """Norm of every block of `dyᵀ x`.

    Args:
        dy: (M, N), any strides; fp32, fp16 or bf16.
        x: (M, K), any strides; dy's dtype.
        block: (BH, BW), edges of 16 to 128.
        norm: "l1" (sum of magnitudes), "l2" (sum of squares) or "max". A block that holds a NaN
            scores NaN or infinity.

    Returns:
        (block rows, block columns) fp32, ragged edge blocks counted by what lies inside (N, K).
    """
    (M, N), K, (bh, bw) = dy.shape, x.shape[1], block
    R, C = triton.cdiv(N, bh), triton.cdiv(K, bw)
    if M == 0 or R * C == 0:
        return x.new_zeros(R, C, dtype=torch.float32)
    dy, x = aligned_rows(dy), aligned_rows(x)
    tile, tma = find(
        arch_class(x.device), "grow", compute_kind(x.dtype), "any", "any", tma=tma_fits(dy, x)
    )
    scores = x.new_empty(R, C, dtype=torch.float32)
    operands = (dy, x)
    if tma:
        operands = (
            TensorDescriptor.from_tensor(dy, [tile.BM, tile.TN]),
            TensorDescriptor.from_tensor(x, [tile.BM, tile.TK]),
        )
    with torch.cuda.device_of(x):
        _bsr_grow_kernel[(triton.cdiv(N, tile.TN) * triton.cdiv(K, tile.TK),)](
            *operands,
            scores,
            M,
            N,
            K,
            R,
            C,
            dy.stride(0) // load_unit(x.dtype),
            x.stride(0) // load_unit(x.dtype),
            UNIT=load_unit(x.dtype),
            BH=bh,
            BW=bw,
            TN=tile.TN,
            TK=tile.TK,
            BM=tile.BM,
            GROUP=_GROUP,
            NORM=norm,
            TMA=tma,
            PRECISION=input_precision(x.dtype),
            INTERPRET=is_interpreted(_bsr_grow_kernel),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
    return scores
